"""Where a run's files lie: a local directory, or a directory of any filesystem that Arrow opens (S3, GCS, HDFS, ...).

Two kinds of place differ in one thing. A local one can rename, so that a file or a directory appears whole or not at
all. An object store cannot; there each file appears whole when it is closed, and what is written last vouches for
what was written before it.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import fs

from raymeta.errors import InputError

TEMPORARY = ".tmp-"  # what a killed writer may leave begins with this; nothing else does


@dataclass(frozen=True)
class Storage:
    """A directory. Making the object touches nothing.

    Attributes:
        filesystem: the Arrow filesystem.
        path: the directory's path in it, without a slash at the end.
        shown: how messages name the directory.
    """

    filesystem: fs.FileSystem
    path: str
    shown: str

    @classmethod
    def of(cls, place: str | os.PathLike[str] | Storage) -> Storage:
        """The directory that a local path or a URI (`s3://bucket/runs/1`, `file:///runs/1`, ...) names.

        Raises:
            InputError: a URI that Arrow cannot open.
        """
        if isinstance(place, Storage):
            return place
        text = os.fspath(place)
        if not text:
            raise InputError("the empty text names no directory; expected a path or a URI such as s3://bucket/runs/1")
        if "://" not in text:
            path = os.path.abspath(os.path.expanduser(text))
            return cls(fs.LocalFileSystem(), path, text)
        # Neither options nor what may be a password.
        shown = re.sub(r"://[^/]*@", "://", text.split("?")[0]).rstrip("/")
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{shown!r} cannot be opened ({reason}); expected a local path or a URI that pyarrow.fs opens, "
                "such as s3://bucket/runs/1"
            ) from error
        return cls(filesystem, path.rstrip("/"), shown)

    @property
    def is_local(self) -> bool:
        """Whether files can be renamed, locked and appended to here."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def at(self, name: str) -> Storage:
        """The directory `name` in this one."""
        return Storage(self.filesystem, f"{self.path}/{name}", f"{self.shown}/{name}")

    def names(self) -> dict[str, bool]:
        """What lies directly in here, sorted: name -> whether it is a directory. Empty when nothing is here."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return {info.base_name: info.type == fs.FileType.Directory for info in sorted(found, key=lambda i: i.path)}

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.File

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError or another OSError."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
            return stream.read()

    def make(self) -> None:
        """Make the directory and those above it; one that is there already is left as it is."""
        self.filesystem.create_dir(self.path, recursive=True)

    def write(self, name: str, content: bytes) -> None:
        """Write one file, replacing one of that name. Locally it is old or new after any crash, never a part.

        Raises:
            OSError: no space, no permission, ...; locally the old file is then as it was.
        """
        self.make()
        if self.is_local:
            target = Path(self.path, name)
            temporary = target.with_name(f"{TEMPORARY}{name}-{os.getpid()}")
            try:
                _write_synced(temporary, content)
                os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            _sync_directory(target.parent)
        else:
            _write_stream(self.filesystem, f"{self.path}/{name}", content)

    def write_directory(self, name: str, files: dict[str, bytes]) -> None:
        """Write a directory of files, replacing one of that name; its last file vouches for the others.

        Locally the whole directory appears at once. Elsewhere a reader must take a directory without the last file
        for incomplete (an old last file is deleted first).

        Raises:
            OSError: no space, no permission, ...; locally an old directory of that name is then as it was.
        """
        self.make()
        if not self.is_local:
            last = list(files)[-1]
            self.at(name).delete_file(last)
            self.at(name).make()
            for file, content in files.items():
                _write_stream(self.filesystem, f"{self.path}/{name}/{file}", content)
            return
        target = Path(self.path, name)
        temporary = target.with_name(f"{TEMPORARY}{name}-{os.getpid()}")
        replaced = target.with_name(f"{TEMPORARY}old-{name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for file, content in files.items():
                _write_synced(temporary / file, content)
            _sync_directory(temporary)
            # A directory cannot be renamed onto another: the old one steps aside, and `clean` puts it back should
            # the process end between the two renames.
            if target.exists():
                os.rename(target, replaced)
            os.rename(temporary, target)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaced.exists() and not target.exists():
                os.rename(replaced, target)
            raise
        _sync_directory(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def delete_file(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        if self.has_file(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def delete_directory(self, name: str) -> None:
        """Delete a directory with what is in it."""
        self.filesystem.delete_dir(f"{self.path}/{name}")

    def clean(self) -> None:
        """Remove what writers that were killed left in here. Only for who alone writes here."""
        for name, is_directory in self.names().items():
            if not name.startswith(TEMPORARY):
                continue
            replaced = name.removeprefix(f"{TEMPORARY}old-")
            if is_directory and replaced != name and replaced not in self.names():
                self.filesystem.move(f"{self.path}/{name}", f"{self.path}/{replaced}")
            elif is_directory:
                self.delete_directory(name)
            else:
                self.delete_file(name)


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    # A rename is safe from a power cut only when the directory that holds the name is on disk.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_stream(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(content)
