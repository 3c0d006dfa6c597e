"""Checkpoints come back as they were, a damaged one is refused by name, and no failure loses an earlier one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from raymeta.checkpoint import Checkpoint, clean, find_step, load, read_pointer, save, steps
from raymeta.errors import InputError
from raymeta.params import ParameterLayout
from raymeta.storage import Storage


def make(step: int, size: int = 3, **state: object) -> Checkpoint:
    # Views of one flat vector, in an order that is not the alphabet's, as the trainer has them.
    shapes = {"model.b.weight": torch.zeros(size, 2), "model.a.bias": torch.zeros(2), "inner_rate.a": torch.zeros(())}
    layout = ParameterLayout.of(shapes)
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(step))
    optimizer = {"exp_avg": flat * 2, "step": torch.tensor(float(step)), "half": flat.to(torch.bfloat16)}
    return Checkpoint(step, layout.unflatten(flat), optimizer, {"step_seen": step, **state})


def same(one: Checkpoint, other: Checkpoint) -> bool:
    def bits(named: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...], bytes]]:
        return [
            (name, value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, value in named.items()
        ]

    return (one.step, bits(one.params), bits(one.optimizer), one.state) == (
        other.step,
        bits(other.params),
        bits(other.optimizer),
        other.state,
    )


def memory_storage() -> Storage:
    """An Arrow filesystem that cannot rename a directory over another, lock or append: like an object store."""
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.store, memory.pseudo_dirs = {}, [""]
    return Storage(fs.PyFileSystem(fs.FSSpecHandler(memory)), "bucket/run", "memory://bucket/run")


def subtree_storage(path: Path) -> Storage:
    path.mkdir(exist_ok=True)
    return Storage(fs.SubTreeFileSystem(str(path), fs.LocalFileSystem()), "run", "sub://run")


@pytest.fixture(params=["local", "subtree", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.of(tmp_path / "run")
    made = memory_storage() if request.param == "memory" else subtree_storage(tmp_path / "tree")
    assert not made.is_local
    return made


def test_it_comes_back_bit_for_bit_and_in_order(storage: Storage) -> None:
    written = make(7, best=0.5, scheduler={"last": [1, 2.5, None, True, "x"]})
    save(written, storage, metrics={"accuracy": 0.5, "ci95": math.nan}, best=True)
    read = load(storage)
    assert same(read, written)
    assert list(read.params) == ["model.b.weight", "model.a.bias", "inner_rate.a"]
    assert ParameterLayout.of(read.params) == ParameterLayout.of(written.params)
    for which in ("best", "latest", 7, "7"):
        assert same(load(storage, which), written)
    pointer = read_pointer(storage, "best")
    assert pointer is not None
    assert (pointer.step, pointer.metrics) == (7, {"accuracy": 0.5, "ci95": None})


def test_the_files_are_those_of_the_contract(tmp_path: Path) -> None:
    save(make(7), tmp_path, best=True)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    inside = [
        f"checkpoints/step-00000007/{name}" for name in ("optimizer.safetensors", "params.safetensors", "state.json")
    ]
    assert found == ["best.json", *inside, "latest.json"]
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert latest == {"checkpoint": "checkpoints/step-00000007", "step": 7, "metrics": {}}
    assert (tmp_path / latest["checkpoint"] / "params.safetensors").exists()


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(state=st.dictionaries(st.text(max_size=5), plain, max_size=4))
def test_any_json_state_comes_back(state: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("state")
    save(Checkpoint(1, {"model.w": torch.ones(1)}, {}, state), directory)
    read = load(directory)
    assert read.state == state
    assert read.optimizer == {}
    shutil.rmtree(directory)


def test_non_finite_numbers_of_the_state_come_back(tmp_path: Path) -> None:
    save(make(1, best=-math.inf, ci95=math.nan, pair=(1, math.inf)), tmp_path)
    state = load(tmp_path).state
    assert state["best"] == -math.inf
    assert math.isnan(state["ci95"])
    assert state["pair"] == [1, math.inf]
    # Strict JSON all the same: a reader in another language takes it.
    text = (tmp_path / "checkpoints/step-00000001/state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", [torch.ones(1), {1: 2}, object(), {"deep": [b"bytes"]}])
def test_a_state_that_is_no_json_is_an_error_before_anything_is_written(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.thing"):
        save(make(1, thing=value), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_old_steps_go_and_the_best_stays(storage: Storage) -> None:
    for step in (10, 20, 30, 40, 50):
        save(make(step), storage, best=step == 20)
    assert steps(storage) == [20, 40, 50]
    assert find_step(storage, "best") == 20
    assert find_step(storage) == 50
    save(make(60), storage, keep=1, best=True)
    assert steps(storage) == [60]


def test_steps_of_a_future_that_was_given_up_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(make(step), tmp_path, best=step == 10)
    save(make(15), tmp_path)
    assert steps(tmp_path) == [10, 15]
    assert find_step(tmp_path) == 15


def test_saving_a_step_again_replaces_it(storage: Storage) -> None:
    save(make(5, try_=1), storage)
    save(make(5, try_=2), storage)
    assert load(storage).state["try_"] == 2
    assert [name for name in storage.at("checkpoints").names() if name.startswith(".")] == []


def test_without_latest_json_the_newest_whole_step_is_latest(tmp_path: Path) -> None:
    save(make(10), tmp_path)
    save(make(20), tmp_path)
    (tmp_path / "latest.json").unlink()
    assert find_step(tmp_path) == 20


# What is refused


def test_missing_checkpoints_are_named_with_those_that_are_there(storage: Storage) -> None:
    with pytest.raises(InputError, match="has no checkpoint; expected a run directory"):
        load(storage)
    for step in (10, 20):
        save(make(step), storage)
    with pytest.raises(InputError, match=r"no checkpoint of step 15\. Steps there are: 10, 20\."):
        load(storage, 15)
    with pytest.raises(InputError, match=r"no best\.json.*latest or one of the steps 10, 20"):
        load(storage, "best")
    with pytest.raises(InputError, match="'bset': expected best, latest or one of the steps 10, 20"):
        load(storage, "bset")
    storage.at("checkpoints").delete_directory("step-00000020")
    with pytest.raises(InputError, match=r"no checkpoint of step 20 \(latest\.json names it\)\. Steps there are: 10"):
        load(storage)


def test_a_place_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no directory")
    with pytest.raises(InputError, match=rf"{tmp_path} (cannot be read|has no checkpoint).*xpected a run directory"):
        load(tmp_path)


FILES = ["params.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "longer"])
def test_damage_is_refused_naming_the_file_and_the_other_steps(file: str, damage: str, tmp_path: Path) -> None:
    save(make(10), tmp_path)
    save(make(20), tmp_path)
    path = tmp_path / "checkpoints/step-00000020" / file
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:-5],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "emptied": b"",
            "longer": content + b"\0",
        }[damage]
    )
    with pytest.raises(InputError, match=rf"step-00000020/{file} is .*altered.*Use another checkpoint.*there are: 10"):
        load(tmp_path)
    assert same(load(tmp_path, 10), make(10))


@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_of_a_checkpoint_is_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    save(make(3, best=0.25), directory)
    path = directory / "checkpoints/step-00000003" / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))
    try:
        read = load(directory)
    except InputError:
        pass
    else:  # white space of state.json may become other white space; what was read is the same
        assert path.name == "state.json"
        assert same(read, make(3, best=0.25))
    shutil.rmtree(directory)


@pytest.mark.parametrize("file", FILES[:2])
def test_a_missing_file_is_refused(file: str, tmp_path: Path) -> None:
    save(make(20), tmp_path)
    (tmp_path / "checkpoints/step-00000020" / file).unlink()
    with pytest.raises(InputError, match=rf"{file} cannot be read.*There is no other one"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": "x", "metrics": {}}'])
def test_a_damaged_pointer_is_refused(content: str, tmp_path: Path) -> None:
    save(make(20), tmp_path)
    (tmp_path / "latest.json").write_text(content)
    with pytest.raises(InputError, match=r"latest\.json is cut off or altered.*name a step: 20"):
        load(tmp_path)
    assert load(tmp_path, 20).step == 20


def test_a_step_of_another_number_is_refused(tmp_path: Path) -> None:
    save(make(20), tmp_path)
    (tmp_path / "checkpoints/step-00000020").rename(tmp_path / "checkpoints/step-00000021")
    with pytest.raises(InputError, match=r"state\.json is altered"):
        load(tmp_path, 21)


# What a crash leaves


def test_what_a_killed_writer_left_is_cleaned(storage: Storage) -> None:
    save(make(10), storage)
    place = storage.at("checkpoints")
    for name in (".tmp-step-00000020-123", "step-00000030"):
        place.at(name).make()
        place.at(name).write("params.safetensors", b"part")
    if storage.is_local:
        storage.write(".tmp-latest.json-99", b"part")
    assert steps(storage) == [10]
    clean(storage)
    assert list(place.names()) == ["step-00000010"]
    assert list(storage.names()) == ["checkpoints", "latest.json"]
    assert same(load(storage), make(10))


def test_a_step_that_stepped_aside_comes_back(tmp_path: Path) -> None:
    save(make(10), tmp_path)
    place = tmp_path / "checkpoints"
    (place / "step-00000010").rename(place / ".tmp-old-step-00000010")  # killed between the two renames
    clean(tmp_path)
    assert same(load(tmp_path), make(10))


WRITER = """
import resource, signal, sys, torch
from raymeta.checkpoint import Checkpoint, save
from raymeta.errors import RunError
mode, directory = sys.argv[1:]
def make(step, size):
    value = torch.full((size,), float(step))
    return Checkpoint(step, {"model.w": value}, {"exp_avg": value}, {"step_seen": step})
if mode == "full":
    save(make(1, 10), directory, best=True)
    save(make(2, 10), directory)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    try:
        save(make(3, 100_000), directory)
    except RunError as error:
        print(error)
        sys.exit(7)
else:
    step = 0
    while True:
        step += 1
        save(make(step, 200_000), directory, best=step % 3 == 1)
        print(step, flush=True)
"""


def test_a_write_that_the_system_refuses_loses_no_earlier_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITER, "full", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
    assert "step 3 could not be written" in done.stdout
    assert "checkpoints (1, 2) are kept" in done.stdout
    assert steps(tmp_path) == [1, 2]
    assert load(tmp_path).step == 2
    assert load(tmp_path, "best").step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root mounts a file system")
def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        size = 100_000  # numbers, in 1 MiB: two checkpoints of params and optimiser never fit
        saved = [OrderedDict([("model.w", torch.full((size,), float(step)))]) for step in (1, 2, 3)]
        save(Checkpoint(1, saved[0], {}, {}), tmp_path)
        save(Checkpoint(2, saved[1], {}, {}), tmp_path)
        with pytest.raises(RuntimeError, match=r"No space left on device.*checkpoints \(1, 2\) are kept"):
            save(Checkpoint(3, saved[2], {}, {}), tmp_path)
        assert steps(tmp_path) == [1, 2]
        assert torch.equal(load(tmp_path).params["model.w"], saved[1]["model.w"])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=60)


def test_sigkill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    for attempt in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, "endless", str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(3):
            last = int(writer.stdout.readline())
        time.sleep(0.003 * attempt)
        writer.send_signal(signal.SIGKILL)
        last = max([last, *map(int, writer.stdout.read().split())])
        writer.wait(timeout=60)
        clean(tmp_path)
        assert find_step(tmp_path) in (last, last + 1)
        for step in steps(tmp_path):
            assert torch.equal(load(tmp_path, step).params["model.w"], torch.full((200_000,), float(step)))
        assert load(tmp_path, "best").step % 3 == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []
