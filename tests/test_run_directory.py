"""The run directory, on a local path and on a filesystem that can neither append, rename nor lock."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from pyarrow import fs
from tensorboardX.proto.event_pb2 import Event

from raymeta.checkpoint import Checkpoint
from raymeta.errors import InputError, RunError
from raymeta.run_directory import RunDirectory
from raymeta.storage import Storage

CHECKPOINT = Checkpoint(2, {"model.w": torch.arange(3.0)}, {"exp_avg": torch.ones(3)}, {"best": 0.5})


def memory_storage() -> Storage:
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.store, memory.pseudo_dirs = {}, [""]
    return Storage(fs.PyFileSystem(fs.FSSpecHandler(memory)), "bucket/run", "memory://bucket/run")


@pytest.fixture(params=["local", "uri", "subtree", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.of(tmp_path / "deep" / "run")
    if request.param == "uri":
        return Storage.of((tmp_path / "run with space").as_uri())
    if request.param == "memory":
        return memory_storage()
    (tmp_path / "tree").mkdir()
    return Storage(fs.SubTreeFileSystem(str(tmp_path / "tree"), fs.LocalFileSystem()), "run", "sub://run")


def events(storage: Storage) -> list[Event]:
    """The TensorBoard events of a directory: records of length, checksum, bytes, checksum."""
    found = []
    for name in storage.names():
        if name.startswith("events.out.tfevents."):
            content = storage.read(name)
            while content:
                length = int.from_bytes(content[:8], "little")
                found.append(Event.FromString(content[12 : 12 + length]))
                content = content[16 + length :]
    return found


def test_a_run_from_its_beginning_to_its_end(storage: Storage) -> None:
    config = {"seed": 3, "outer": {"rate": 1e-5, "betas": [0.9, 0.999]}, "name": "1e-3", "none": None}
    with RunDirectory(storage) as run:
        run.create()
        run.write_config(config)
        run.append_metrics({"step": 1, "loss": 0.5})
        run.append_metrics({"step": 2, "loss": math.nan, "list": [math.inf, 1.0]})
        run.write_scalars(2, {"loss": 0.25, "accuracy": None})
        run.save(CHECKPOINT, metrics={"accuracy": 0.5}, best=True)
        # What is there when the checkpoint is there lasts, without any close.
        assert len(RunDirectory(storage).read_metrics()) == 2
        run.append_metrics({"step": 3, "loss": 0.125})
    read = RunDirectory(storage)
    assert read.read_config() == config
    assert read.read_metrics() == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "list": [None, 1.0]},
        {"step": 3, "loss": 0.125},
    ]
    assert torch.equal(read.load("best").params["model.w"], CHECKPOINT.params["model.w"])
    assert read.steps() == [2]
    best = read.best()
    assert best is not None
    assert (best.step, best.metrics) == (2, {"accuracy": 0.5})
    scalars = [
        (event.step, value.tag, value.simple_value) for event in events(storage) for value in event.summary.value
    ]
    assert scalars == [(2, "loss", 0.25)]


def test_a_resumed_run_leaves_the_file_of_an_undisturbed_one(storage: Storage) -> None:
    def record(step: int) -> dict[str, float]:
        return {"step": step, "loss": 1 / step}

    with RunDirectory(storage) as run:
        run.create()
        run.append_metrics(record(1))
        run.append_metrics(record(2))
        run.write_scalars(2, {"loss": 1.0})
        run.save(CHECKPOINT)
        run.append_metrics(record(3))
    with RunDirectory(storage) as run:
        run.create(resume=True)
        run.truncate_metrics(run.load().step)
        assert run.read_metrics() == [record(1), record(2)]
        for step in (3, 4):
            run.append_metrics(record(step))
        run.write_scalars(3, {"loss": 2.0})
    expected = "".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3, 4))
    assert storage.read("metrics.jsonl").decode() == expected
    assert [event.step for event in events(storage) if event.HasField("session_log")] == [3]  # hides 3 and later
    with RunDirectory(storage) as run:
        run.create(resume=True)
        run.truncate_metrics(None)
        assert run.read_metrics() == []
    assert storage.read("metrics.jsonl") == b""


def test_a_cut_off_last_line_is_dropped_and_a_broken_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with RunDirectory(tmp_path) as run:
        assert run.read_metrics() == [{"step": 1}]
        run.create(resume=True)
        run.truncate_metrics(5)
        run.append_metrics({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for broken in ('{"ste\n', "[1]\n", '{"loss": 1}\n', '{"step": "x"}\n'):
        path.write_text('{"step": 1}\n' + broken + '{"step": 3}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is no JSON object with a step"):
            RunDirectory(tmp_path).read_metrics()


def test_a_directory_in_use_is_refused_without_resume(storage: Storage) -> None:
    with RunDirectory(storage) as run:
        run.create()
        run.write_config({"seed": 1})
    with pytest.raises(InputError, match=r"exists already and holds config\.yaml.*--resume.*another --run-dir"):
        RunDirectory(storage).create()
    with RunDirectory(storage) as run:
        run.create(resume=True)
        assert run.read_config() == {"seed": 1}


def test_an_empty_directory_and_a_missing_one_are_taken(tmp_path: Path) -> None:
    for place, resume in ((tmp_path / "none", False), (tmp_path / "none2", True), (tmp_path / "empty", False)):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with RunDirectory(place) as run:
            run.create(resume=resume)
            assert run.steps() == []
            assert not run.has_config()
        with RunDirectory(place) as run:  # nothing was written: it counts as new
            run.create()


def test_a_new_writer_cleans_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step-00000004-1").mkdir(parents=True)
    (tmp_path / ".tmp-config.yaml-1").write_text("see")
    with RunDirectory(tmp_path) as run:
        run.create(resume=True)
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "checkpoints"]


def test_two_writers_of_one_directory_are_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.create()
        with pytest.raises(InputError, match=r"is being written by process \d+ on .*another --run-dir"):
            RunDirectory(tmp_path).create(resume=True)
        assert RunDirectory(tmp_path).read_metrics() == []  # readers are not held up
    with RunDirectory(tmp_path) as run:
        run.create(resume=True)


HOLDER = """
import sys, time
from raymeta.run_directory import RunDirectory
RunDirectory(sys.argv[1]).create()
run = RunDirectory(sys.argv[1] + "-2"); run.create()
print("held", flush=True); time.sleep(600)
"""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    place = f"{tmp_path}/run-2"
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"is being written by process {holder.pid} on"):
        RunDirectory(place).create(resume=True)
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=60)
    with RunDirectory(place) as run:
        run.create(resume=True)


@pytest.mark.parametrize(
    ("place", "message"),
    [("", "names no directory"), ("foo://bucket/run", "'foo://bucket/run' cannot be opened.*s3://")],
)
def test_places_that_cannot_be_opened_are_refused(place: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunDirectory(place)


def test_messages_show_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    run = RunDirectory("s3://key:secret@bucket/runs/1?region=us-east-1")
    assert str(run) == "s3://bucket/runs/1"
    assert run.storage.path == "bucket/runs/1"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"run directory .*file/run cannot be written.*another --run-dir"):
        RunDirectory(tmp_path / "file" / "run").create()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is no run directory: there is no config\.yaml"),
        (b"\xff\xfe\x00\xd8", "is no run directory"),
        (b"a: [1", r"config\.yaml is no YAML: .* at line 1"),
        (b"- 1\n", "holds a list; expected a mapping"),
        (b"a: 1\na: 2\n", "the key 'a' stands twice at line 2, column 1"),
    ],
)
def test_a_config_that_is_none_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        RunDirectory(tmp_path).read_config()


def test_a_write_that_fails_is_a_run_error(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.create()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"metrics\.jsonl could not be written: .*No space left on device"):
            run.append_metrics({"step": 1})
        (tmp_path / "metrics.jsonl").unlink()


def test_a_full_disk_is_said_of_the_events_too(tmp_path: Path) -> None:
    """In a process whose files may not grow beyond 4 KiB; the first error is the one that is seen."""
    lines = [
        "import resource, sys",
        "from raymeta.run_directory import RunDirectory",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))",
        "with RunDirectory(sys.argv[1]) as run:",
        "    run.create()",
        "    for step in range(1000):",
        "        run.write_scalars(step, {'loss': 1.0})",
    ]
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(tmp_path / "run")], capture_output=True, text=True, timeout=60
    )
    assert found.stderr.count("Traceback") == 2  # the OSError, and the RunError that comes of it
    assert "TensorBoard's events could not be written: [Errno 27]" in found.stderr.splitlines()[-1]
    assert found.returncode == 1
