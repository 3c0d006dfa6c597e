"""A data set of fits: tasks fitted by themselves, one by one on the workers, for learners that predict parameters
(`raymeta.algorithms.learned_map`, stage 1).

A directory (a local path or a URI): `about.json` says of what the fits are; `train-NNNNNNNNN-NNNNNNNNN.arrow`, each an
Arrow IPC file with the tasks of those numbers, hold task (int64), parameters (a list of float32 of fixed size),
first_loss, loss and gradient_norm (float32). A part appears whole or not at all. Doing the same again goes on where it
stopped, or adds more tasks.

Legend: M tasks, P numbers that a task has of its own.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from raymeta.algorithms.fitting import Fit, fit_tasks
from raymeta.errors import InputError
from raymeta.storage import Storage
from raymeta.workers.pool import WorkerPool

ABOUT = "about.json"
FORMAT = 1
# Tasks in a part: what a run that is killed loses at most.
TASKS_PER_PART = 256
PART = re.compile(r"([a-z]+)-(\d{9})-(\d{9})\.arrow")


@dataclass(frozen=True)
class Fits:
    """A data set in memory, in the order of the task numbers.

    Attributes:
        about: what the fits are of.
        tasks: [M] int64. parameters: [M, P] float32. first_loss, loss, gradient_norm: [M] float32.
    """

    about: Mapping[str, Any]
    tasks: np.ndarray
    parameters: np.ndarray
    first_loss: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray


def read_fits(place: str | Storage, split: str = "train") -> Fits:
    """The fits of a split. Raises InputError where there are none, or a part that cannot be read."""
    storage = Storage.of(place)
    about, names = _about(storage), _parts(storage, split)
    if about is None or not names:
        raise _no_fits(storage, f" of split {split!r}")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("task", "parameters", *Fit._fields[1:])}
    for name in names:
        try:
            with pa.ipc.open_file(pa.BufferReader(storage.read(name))) as reader:
                table = reader.read_all().combine_chunks()
            for column, found in columns.items():
                values = table.column(column).combine_chunks()
                flat = values.flatten().to_numpy() if column == "parameters" else values.to_numpy()
                found.append(flat.reshape(len(table), -1) if column == "parameters" else flat)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InputError(
                f"{storage.shown}/{name} cannot be read ({error}). Delete it, and run the same `raymeta fit` again."
            ) from error
    task, parameters, *others = (np.concatenate(values) for values in columns.values())
    return Fits(about, task, parameters, *others)


def read_about(place: str | Storage) -> dict[str, Any]:
    """What the fits are of, without reading them: they are as large as a model for each task. Raises InputError where
    there are none."""
    storage = Storage.of(place)
    about = _about(storage)
    if about is None:
        raise _no_fits(storage)
    return about


def make_fits(
    pool: WorkerPool,
    params: Tensor,
    place: str | Storage,
    about: Mapping[str, Any],
    tasks: int,
    on_part: Callable[[int, int, Sequence[Fit]], None] | None = None,
    split: str = "train",
    stop: Callable[[], bool] | None = None,
) -> int:
    """Fits those of the tasks 0 .. tasks-1 that the data set lacks; returns how many it then has.

    Args:
        params: [P] the flat outer parameters: the common start.
        about: what the fits are of, as JSON; must equal what a data set that is there says.
        on_part: called after each part with (tasks done, tasks in all, the part's fits).
        stop: asked between two parts; True ends the work there.

    Raises:
        InputError: the data set is of something else.
        TaskError, RunError: as `WorkerPool.map`.
    """
    storage = Storage.of(place)
    _begin(storage, dict(about))
    done = tasks - sum(last - first + 1 for first, last in _missing(storage, split, tasks))
    for first, last in _missing(storage, split, tasks):
        if stop is not None and stop():
            break
        numbers = range(first, last + 1)
        fits: list[Fit] = pool.map(fit_tasks, params, split, numbers)
        storage.write(f"{split}-{first:09d}-{last:09d}.arrow", _as_arrow(numbers, fits))
        done += len(fits)
        if on_part is not None:
            on_part(done, tasks, fits)
    return done


def _as_arrow(numbers: Sequence[int], fits: Sequence[Fit]) -> bytes:
    parameters = np.stack([fit.parameters for fit in fits]).astype(np.float32)
    flat = pa.array(parameters.reshape(-1))
    columns: dict[str, pa.Array] = {
        "task": pa.array(list(numbers), pa.int64()),
        "parameters": pa.FixedSizeListArray.from_arrays(flat, parameters.shape[1]),
    }
    columns |= {name: pa.array([getattr(fit, name) for fit in fits], pa.float32()) for name in Fit._fields[1:]}
    table, sink = pa.table(columns), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _begin(storage: Storage, about: dict[str, Any]) -> None:
    there, wanted = _about(storage), json.loads(json.dumps({"format": FORMAT, **about}))
    if there is None:
        storage.write(ABOUT, json.dumps(wanted, indent=1).encode())
    elif there != wanted:
        different = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        raise InputError(
            f"{storage.shown} holds fits of something else: {', '.join(different)} differ. Give the settings that it "
            "was made with, or another --output."
        )


def _no_fits(storage: Storage, which: str = "") -> InputError:
    return InputError(f"{storage.shown} holds no fits{which}; expected a directory that `raymeta fit` made.")


def _about(storage: Storage) -> dict[str, Any] | None:
    if not storage.has_file(ABOUT):
        return None
    try:
        found = json.loads(storage.read(ABOUT))
    except ValueError as error:
        raise InputError(f"{storage.shown}/{ABOUT} is no JSON ({error}); expected what `raymeta fit` wrote.") from error
    if found.get("format") != FORMAT:
        raise InputError(f"{storage.shown} has format {found.get('format')!r}; this raymeta reads {FORMAT}.")
    return found


def _parts(storage: Storage, split: str) -> dict[str, tuple[int, int]]:
    """The parts of a split, by name in order: their first and last task."""
    found = {name: PART.fullmatch(name) for name in storage.names()}
    return {name: (int(m[2]), int(m[3])) for name, m in found.items() if m is not None and m[1] == split}


def _missing(storage: Storage, split: str, tasks: int) -> Iterator[tuple[int, int]]:
    """First and last task of each part that is to be made."""
    place = 0
    for first, last in [*_parts(storage, split).values(), (tasks, tasks)]:
        while place < min(first, tasks):
            stop = min(place + TASKS_PER_PART, first, tasks)
            yield place, stop - 1
            place = stop
        place = max(place, last + 1)
