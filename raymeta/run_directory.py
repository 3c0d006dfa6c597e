"""The run directory: what a run leaves behind, on a local path or on any filesystem that Arrow opens.

    config.yaml           the resolved configuration, usable as input
    metrics.jsonl         one JSON object per line, `step` in each
    events.out.tfevents.* TensorBoard
    checkpoints/          see `raymeta.checkpoint`
    best.json latest.json

Object stores cannot append: there, metrics and events are written to a local folder and uploaded whole, at each
checkpoint (before it, so that the metrics reach at least as far) and at the end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow

from raymeta import checkpoint as checkpoints
from raymeta import yaml_text
from raymeta.checkpoint import Checkpoint, Place, Pointer, without_non_finite
from raymeta.errors import InputError, RunError
from raymeta.event_file import EventFile
from raymeta.storage import Storage

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = ".lock"

log = logging.getLogger(__name__)


def require_created(run: object) -> None:
    """Raises InputError for what is no `RunDirectory`, or one that is not open for writing."""
    if not isinstance(run, RunDirectory):
        raise InputError(
            f"run is a {type(run).__name__}; expected a raymeta.run_directory.RunDirectory(path) after its create()"
        )
    if not run._writing:
        raise InputError(f"the run directory {run} is not open for writing; call its create() first")


class RunDirectory:
    """One run's directory. Making the object touches nothing; `create` makes it the writer, `close` ends that.

    Everything that reads works without `create`.
    """

    def __init__(self, place: Place) -> None:
        self.storage = Storage.of(place)
        self._writing = False
        self._lock: IO[str] | None = None
        self._folder: Path | None = None  # where metrics and events are written: the directory, or a staging folder
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of the staged files that are there already
        self._events: EventFile | None = None
        self._purge_step: int | None = None

    def __str__(self) -> str:
        return self.storage.shown

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except RunError:
            if error is None:  # else that error came first and says more
                raise

    # Writing: beginning and end

    def create(self, *, resume: bool = False) -> None:
        """Make the directory, become its only writer, and remove what a killed writer left.

        The lock is the kernel's (flock): it ends with the process that holds it, however that ends. On other
        filesystems than local ones there is no lock.

        Args:
            resume: take a directory that is in use already.

        Raises:
            InputError: the directory holds something and `resume` is false, another process is writing it, or it
                cannot be made.
        """
        assert not self._writing, "this run directory is open for writing"
        try:
            there = [name for name in self.storage.names() if name != LOCK]
            if there and not resume:
                raise InputError(
                    f"the run directory {self} exists already and holds {', '.join(there[:3])}"
                    f"{', ...' if len(there) > 3 else ''}; expected a new one. Continue that run with --resume, or "
                    "give another --run-dir."
                )
            self.storage.make()
            self._take_lock()
            checkpoints.clean(self.storage)
            if self.storage.is_local:
                self._folder = Path(self.storage.path)
            else:
                self._folder = Path(tempfile.mkdtemp(prefix="raymeta-run-"))
                if self.storage.has_file(METRICS):
                    (self._folder / METRICS).write_bytes(self.storage.read(METRICS))
        except (OSError, pyarrow.ArrowException) as error:
            self._release()
            raise InputError(
                f"the run directory {self} cannot be written: {error}. Give another --run-dir, or the permission."
            ) from error
        self._writing = True

    def close(self) -> None:
        """Write out what is pending and let others write. Closing twice is no error.

        Raises:
            RunError: the last of it could not be written.
        """
        if not self._writing:
            return
        try:
            if self._events is not None:
                self._events.close()
            self.sync()
        finally:
            self._release()

    def sync(self) -> None:
        """Bring metrics and events to where they last: to the disk, or to the object store.

        Raises:
            RunError: that failed.
        """
        assert self._folder is not None, "create() comes first"
        try:
            if self.storage.is_local:
                if (self._folder / METRICS).exists():
                    with open(self._folder / METRICS, "rb") as file:
                        os.fsync(file.fileno())
                return
            for path in sorted(self._folder.iterdir()):
                seen = (path.stat().st_size, path.stat().st_mtime_ns)
                if self._uploaded.get(path.name) != seen:
                    self.storage.write(path.name, path.read_bytes())
                    self._uploaded[path.name] = seen
        except (OSError, pyarrow.ArrowException) as error:
            raise RunError(f"{self}: metrics could not be written: {error}. Make room, then use --resume.") from error

    # Configuration

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, replacing what was there. Raises RunError when that fails."""
        try:
            self.storage.write(CONFIG, yaml_text.dump(config).encode())
        except (OSError, pyarrow.ArrowException) as error:
            raise RunError(f"{self}/{CONFIG} could not be written: {error}.") from error

    def has_config(self) -> bool:
        """Whether there is a config.yaml. Raises InputError when the directory cannot be read."""
        try:
            return self.storage.has_file(CONFIG)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{self} cannot be read: {error}. Expected a run directory.") from error

    def read_config(self) -> dict[str, Any]:
        """What config.yaml holds.

        Raises:
            InputError: there is none, or it is no mapping in YAML.
        """
        try:
            text = self.storage.read(CONFIG).decode()
        except FileNotFoundError as error:
            raise InputError(
                f"{self} is no run directory: there is no {CONFIG}. Expected what `raymeta train --run-dir` wrote."
            ) from error
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{self} is no run directory: {CONFIG} cannot be read ({error}). Expected what `raymeta train "
                "--run-dir` wrote."
            ) from error
        config = yaml_text.parse(text, f"{self}/{CONFIG}")
        if not isinstance(config, dict):
            raise InputError(f"{self}/{CONFIG} holds a {type(config).__name__}; expected a mapping.")
        return config

    # Metrics

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one record, which has an int `step` (outer steps done), to metrics.jsonl, as one flushed line.

        JSON has no nan and no infinity: such a number is written as null.

        Raises:
            RunError: the line could not be written.
        """
        assert self._folder is not None, "create() comes first"
        assert isinstance(record.get("step"), int), f"a record without its step: {record}"
        line = json.dumps(without_non_finite(record), allow_nan=False)
        try:
            with open(self._folder / METRICS, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunError(f"{self}/{METRICS} could not be written: {error}. Make room, then use --resume.") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in order; none when there is no file. A last line cut off is left out.

        Raises:
            InputError: a line that is no JSON object with a step, other than the last one.
        """
        if self._folder is not None:
            path = self._folder / METRICS
            content = path.read_bytes() if path.exists() else b""
        else:
            content = self.storage.read(METRICS) if self.storage.has_file(METRICS) else b""
        return [record for _, record in self._records(content)]

    def truncate_metrics(self, step: int | None, without: Collection[str] = ()) -> None:
        """Drop the records after a step (None: all), so that a resumed run's file is an undisturbed one's.

        Records of that very step whose `kind` is one of `without` are dropped too.

        TensorBoard is told to hide what it was given after that step.

        Raises:
            InputError: see `read_metrics`.
        """
        assert self._folder is not None, "create() comes first"
        path = self._folder / METRICS
        self._purge_step = 0 if step is None else step + 1
        if path.exists():
            kept = [
                line
                for line, record in self._records(path.read_bytes())
                if step is not None
                and (record["step"] < step or (record["step"] == step and record.get("kind") not in without))
            ]
            Storage.of(self._folder).write(METRICS, b"".join(kept))

    def _records(self, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
        """The lines of metrics.jsonl, each with the object in it."""
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # its writer was killed in the middle
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int):
                    raise TypeError("its step is no whole number")
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{self}/{METRICS} line {number} is no JSON object with a step ({error!r}). Delete the line."
                ) from error
            records.append((line, record))
        return records

    def write_scalars(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Give numbers to TensorBoard; what is None is left out. Raises RunError when that fails."""
        assert self._folder is not None, "create() comes first"
        try:
            if self._events is None:
                self._events = EventFile(self._folder, self._purge_step)
            self._events.add_scalars(step, {name: value for name, value in scalars.items() if value is not None})
        except OSError as error:
            raise RunError(
                f"{self}: TensorBoard's events could not be written: {error}. Make room, then use --resume."
            ) from error

    # Checkpoints

    def save(
        self, checkpoint: Checkpoint, *, metrics: Mapping[str, Any] | None = None, best: bool = False, keep: int = 2
    ) -> None:
        """Write a checkpoint, after what metrics and events there are (see `raymeta.checkpoint.save`)."""
        assert self._writing, "create() comes first"
        self.sync()
        checkpoints.save(checkpoint, self.storage, metrics=metrics, best=best, keep=keep)

    def load(self, which: str | int = "latest") -> Checkpoint:
        """Read a checkpoint: "latest", "best" or a step (see `raymeta.checkpoint.load`)."""
        return checkpoints.load(self.storage, which)

    def find_step(self, which: str | int = "latest") -> int:
        """The step that "latest", "best" or a step names (see `raymeta.checkpoint.find_step`)."""
        return checkpoints.find_step(self.storage, which)

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending; none where there is no directory."""
        return checkpoints.steps(self.storage)

    def best(self) -> Pointer | None:
        """Step and metrics of the best checkpoint; None before there is one."""
        return checkpoints.read_pointer(self.storage, "best")

    # The lock

    def _take_lock(self) -> None:
        if not self.storage.is_local:
            return
        lock = open(Path(self.storage.path, LOCK), "a+", encoding="utf-8")  # noqa: SIM115 (open while we write)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise InputError(
                f"the run directory {self} is being written by {holder}. "
                "Wait for it or end it, or give another --run-dir."
            ) from error
        except OSError as error:  # a network filesystem without locks
            log.warning("%s has no locks (%s): take care that one process alone writes it", self, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None and not self.storage.is_local:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._writing, self._lock, self._folder, self._events = False, None, None, None
        self._uploaded = {}
