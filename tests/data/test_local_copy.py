"""Data by URI: one copy for all processes of a machine, of the file as it is now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from raymeta.data.local_copy import copied, local_file
from raymeta.data.omniglot import open_omniglot
from raymeta.data.store import Store
from raymeta.errors import InputError, RunError
from raymeta.storage import Storage
from raymeta.tasks.class_episodes import ClassEpisodes
from raymeta.tasks.regression_table import RegressionTable


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    return tmp_path / "cache" / "raymeta" / "data"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def there(bucket: Path, name: str = "photos.arrow") -> Storage:
    """A file of a filesystem that cannot be mapped into memory."""
    return Storage(fs.SubTreeFileSystem(os.fspath(bucket), fs.LocalFileSystem()), name, f"sub://bucket/{name}")


def versions(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]


def test_it_is_copied_once_and_again_when_it_changed(cache: Path, bucket: Path) -> None:
    original = bucket / "photos.arrow"
    original.write_bytes(b"first")
    copy = copied(there(bucket))
    made = copy.stat().st_mtime_ns
    assert copy.read_bytes() == b"first"
    assert copy.name == "photos.arrow"  # messages show it
    assert copied(there(bucket)) == copy
    assert copy.stat().st_mtime_ns == made
    original.write_bytes(b"2nd..")
    os.utime(original, ns=(made, made + 10**9))
    again = copied(there(bucket))
    assert again.read_bytes() == b"2nd.."
    assert versions(cache) == [again]


def test_a_copy_that_was_cut_off_is_none(cache: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bucket / "photos.arrow").write_bytes(b"0123456789")
    whole = fs.SubTreeFileSystem.open_input_stream

    class CutOff(fs.SubTreeFileSystem):
        def open_input_stream(self, *arguments, **named):  # type: ignore[no-untyped-def]
            import pyarrow

            return pyarrow.BufferReader(whole(self, *arguments, **named).read()[:4])

    broken = Storage(CutOff(os.fspath(bucket), fs.LocalFileSystem()), "photos.arrow", "sub://bucket/photos.arrow")
    with pytest.raises(RunError, match=r"^sub://bucket/photos\.arrow cannot be copied to .*: 4 bytes came of 10"):
        copied(broken)
    assert copied(there(bucket)).read_bytes() == b"0123456789"
    assert [path.name for path in versions(cache)] == ["photos.arrow"]


@pytest.mark.parametrize(("name", "what"), [("missing.arrow", "does not exist"), ("folder", "is a directory")])
def test_what_is_no_file_is_refused(cache: Path, bucket: Path, name: str, what: str) -> None:
    (bucket / "folder").mkdir()
    with pytest.raises(InputError, match=rf"^sub://bucket/{name} {what}; expected a file"):
        copied(there(bucket, name))


def test_a_path_and_a_local_uri_are_the_file_itself(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "with space.csv"
    assert local_file(file) == local_file(file.as_uri()) == file
    assert local_file("~/x.arrow") == Path.home() / "x.arrow"
    assert not cache.exists()
    with pytest.raises(InputError, match="'foo://bucket/x' cannot be opened"):
        local_file("foo://bucket/x")


def test_processes_that_ask_at_once_share_one_copy(cache: Path, bucket: Path) -> None:
    """Each is given the whole file, and none makes a second copy."""
    (bucket / "photos.arrow").write_bytes(os.urandom(2**25))
    code = (
        "import sys; from pyarrow import fs; from raymeta.data.local_copy import copied; from raymeta.storage import "
        "Storage; s = Storage(fs.SubTreeFileSystem(sys.argv[1], fs.LocalFileSystem()), 'photos.arrow', 'sub://b'); "
        "c = copied(s); print(c.stat().st_size, c.stat().st_ino)"
    )
    asked = [
        subprocess.Popen([sys.executable, "-c", code, os.fspath(bucket)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {process.communicate(timeout=120)[0] for process in asked}
    assert len(answers) == 1
    assert answers.pop().split()[0] == str(2**25)
    assert len(versions(cache)) == 1


def test_task_sources_take_uris(cache: Path, tmp_path: Path) -> None:
    store: Store = open_omniglot()
    by_path = ClassEpisodes(os.fspath(store.path), queries=2)
    by_uri = ClassEpisodes(store.path.absolute().as_uri(), queries=2)
    assert torch.equal(by_path.tasks("test", [3]).query_x, by_uri.tasks("test", [3]).query_x)
    assert by_path.fingerprint() == by_uri.fingerprint()
    table = tmp_path / "rows.csv"
    lines = [f"{task},{x},{2 * x}" for task in range(10) for x in np.linspace(0, 1, 8)]
    table.write_text("\n".join(["task,x,target", *lines]))
    found = RegressionTable(table.as_uri(), shots=3, queries=4)
    assert found.feature_names == ("x",)
    assert found.fingerprint() == RegressionTable(os.fspath(table), shots=3, queries=4).fingerprint()
