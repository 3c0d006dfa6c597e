"""Where a machine's processes keep what they make once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raymeta.cache import cache_folder

PRINT_IT = "from raymeta.cache import cache_folder; print(cache_folder())"


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user has no cache: what should be its folder is a file. Returns the folder of temporary files."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "a file"))
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    return tmp_path


def of_another_process() -> Path:
    return Path(
        subprocess.run([sys.executable, "-c", PRINT_IT], capture_output=True, text=True, check=True).stdout[:-1]
    )


def test_a_cache_that_is_not_this_users_alone_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that others can write, one in the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert cache_folder() == tmp_path / "raymeta"
    (tmp_path / "raymeta").chmod(0o777)
    assert cache_folder() != tmp_path / "raymeta"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder().is_absolute()


def test_without_a_cache_all_processes_of_the_user_have_one_folder(blocked: Path) -> None:
    folder = blocked / f"raymeta-{os.geteuid()}"
    assert cache_folder() == cache_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert of_another_process() == folder
    assert not list(blocked.glob("raymeta-cache-*"))


def test_a_temporary_folder_that_is_not_this_users_alone_is_not_used(blocked: Path) -> None:
    """One that others can write, and a link; what is used instead ends with the process."""
    folder, target = blocked / f"raymeta-{os.geteuid()}", blocked / "elsewhere"
    for make in (lambda: (folder.mkdir(), folder.chmod(0o777)), lambda: (target.mkdir(), folder.symlink_to(target))):
        make()
        used = of_another_process()
        assert used.name.startswith("raymeta-cache-")
        assert not used.exists()
        folder.rename(blocked / f"done-{used.name}")
