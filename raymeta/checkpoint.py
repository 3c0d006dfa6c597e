"""Checkpoints: the state of a run between two outer steps, in safetensors and JSON, written such that a reader finds
a whole one or none.

In a run directory: `checkpoints/step-NNNNNNNN/` with `params.safetensors`, `optimizer.safetensors` and, written last,
`state.json`, which carries size and SHA-256 of the other two and of itself; beside `checkpoints/`, `best.json` and
then `latest.json` name a step and its metrics. Older steps are deleted after that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import pyarrow
import safetensors.torch
from torch import Tensor

from raymeta.errors import InputError, RunError
from raymeta.storage import Storage

Place = str | PathLike[str] | Storage

STEPS = "checkpoints"
PARAMS = "params.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
POINTERS = ("best", "latest")
FORMAT = 1

# JSON has no such numbers, and a state must come back as it was.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
NON_FINITE_KEY = "non-finite"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: outer steps done.
        params: named tensors, in the order of the run's layout.
        optimizer: named tensors of the outer optimiser's state.
        state: what else there is, as JSON: dicts with text keys, lists, texts, numbers, booleans, None. (A tuple comes
            back as a list; nan and the infinities come back as they were.)
    """

    step: int
    params: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Pointer:
    """What `latest.json` or `best.json` says: a step, and the metrics that it had (non-finite ones are None)."""

    step: int
    metrics: dict[str, Any]


def step_name(step: int) -> str:
    """The name of a step's directory."""
    return f"step-{step:08d}"


def save(
    checkpoint: Checkpoint,
    directory: Place,
    *,
    metrics: Mapping[str, Any] | None = None,
    best: bool = False,
    keep: int = 2,
) -> None:
    """Write a checkpoint into a run directory, then point `latest.json` at it, then delete what is older.

    Args:
        checkpoint: its tensors may be on any device; they are copied.
        directory: the run directory.
        metrics: what the pointers carry beside the step.
        best: whether `best.json` is to point at it too.
        keep: how many of the newest steps stay, beside the best one.

    Raises:
        RunError: it could not be written (no space, no permission, ...). The earlier checkpoints are all there.
    """
    assert keep >= 1, "the checkpoint just written must stay"
    root = Storage.of(directory)
    name = step_name(checkpoint.step)
    tensors = {PARAMS: checkpoint.params, OPTIMIZER: checkpoint.optimizer}
    files = {file: _tensor_bytes(named) for file, named in tensors.items()}
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        # safetensors sorts by dtype and name; the order in which a layout flattens is kept here.
        "files": {file: {**_seal(files[file]), "names": list(named)} for file, named in tensors.items()},
        "state": _to_json(checkpoint.state, "state"),
    }
    manifest["sha256"] = _manifest_digest(manifest)
    files[STATE] = json.dumps(manifest, indent=1, allow_nan=False).encode()
    pointer = {"checkpoint": f"{STEPS}/{name}", "step": checkpoint.step, "metrics": without_non_finite(metrics or {})}
    pointer_bytes = (json.dumps(pointer, indent=1, allow_nan=False) + "\n").encode()
    earlier: list[int] = []
    try:
        earlier = steps(root)
        root.at(STEPS).write_directory(name, files)
        if best:
            root.write("best.json", pointer_bytes)
        # Last: a process that ends before this line resumes from the step before, which finds `best.json` again.
        root.write("latest.json", pointer_bytes)
        _prune(root, checkpoint.step, keep)
    except (OSError, pyarrow.ArrowException) as error:
        raise RunError(
            f"{root.shown}: the checkpoint of step {checkpoint.step} could not be written: {error}. The earlier "
            f"checkpoints ({_listed(earlier)}) are kept; make room or give the permission, then use --resume."
        ) from error


def load(directory: Place, which: str | int = "latest") -> Checkpoint:
    """Read a checkpoint of a run directory, on the CPU, after checking every byte of it.

    Args:
        directory: the run directory.
        which: "latest", "best", or a step (a number, or its digits).

    Raises:
        InputError: there is no such checkpoint, or a file of it is missing, cut off or altered.
    """
    root = Storage.of(directory)
    step = find_step(root, which)
    place = root.at(STEPS).at(step_name(step))
    manifest = _read_manifest(place, root, step)
    tensors = {}
    for file in (PARAMS, OPTIMIZER):
        stated = manifest["files"][file]
        content = _read(place, file, root, step)
        if _seal(content) != {"size": stated["size"], "sha256": stated["sha256"]}:
            detail = f"{len(content)} bytes, {stated['size']} were written"
            raise _damaged(place, file, root, step, "is cut off or altered", detail)
        loaded = safetensors.torch.load(content)
        tensors[file] = {name: loaded[name] for name in stated["names"]}
    return Checkpoint(step, tensors[PARAMS], tensors[OPTIMIZER], _from_json(manifest["state"]))


def find_step(directory: Place, which: str | int = "latest") -> int:
    """The step that "latest", "best" or a step names.

    `latest.json` decides what is latest; before there is one, the newest whole checkpoint is.

    Raises:
        InputError: there is no such checkpoint; the message lists those that there are.
    """
    root = Storage.of(directory)
    try:
        there = steps(root)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{root.shown} cannot be read: {error}. Expected a run directory.") from error
    if not there:
        raise InputError(f"{root.shown} has no checkpoint; expected a run directory with {STEPS}/step-NNNNNNNN in it.")
    if which in POINTERS:
        pointer = read_pointer(root, str(which))
        if pointer is None and which == "latest":
            return there[-1]
        if pointer is None:
            raise InputError(
                f"{root.shown} has no best.json: no validation has chosen a checkpoint yet. "
                f"Use latest or one of the steps {_listed(there)}."
            )
        step = pointer.step
    elif isinstance(which, int) or re.fullmatch(r"\d+", which):
        step = int(which)
    else:
        raise InputError(f"checkpoint {which!r}: expected best, latest or one of the steps {_listed(there)}.")
    if step not in there:
        named = f" ({which}.json names it)" if which in POINTERS else ""
        raise InputError(f"{root.shown} has no checkpoint of step {step}{named}. Steps there are: {_listed(there)}.")
    return step


def steps(directory: Place) -> list[int]:
    """The steps that have a whole checkpoint, ascending."""
    place = Storage.of(directory).at(STEPS)
    found = [int(match[1]) for match in map(re.compile(r"step-(\d{8,})").fullmatch, place.names()) if match]
    return sorted(step for step in found if place.at(step_name(step)).has_file(STATE))


def read_pointer(directory: Place, which: str) -> Pointer | None:
    """What `latest.json` or `best.json` says; None when there is none.

    Raises:
        InputError: the file is no such JSON.
    """
    root = Storage.of(directory)
    file = f"{which}.json"
    if not root.has_file(file):
        return None
    try:
        content = json.loads(root.read(file))
        return Pointer(int(content["step"]), dict(content["metrics"]))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{root.shown}/{file} is cut off or altered ({error!r}). Delete it, or name a step: {_listed(steps(root))}."
        ) from error


def clean(directory: Place) -> None:
    """Remove what a killed writer left: temporary files, and steps without a `state.json`.

    Only for the one process that writes this run directory, before it writes.
    """
    root = Storage.of(directory)
    place = root.at(STEPS)
    root.clean()
    place.clean()
    whole = {step_name(step) for step in steps(root)}
    for name, is_directory in place.names().items():
        if is_directory and name.startswith("step-") and name not in whole:
            place.delete_directory(name)


def without_non_finite(value: Any) -> Any:
    """A copy of a JSON value with None (null) where a number is nan or infinite, for files that others read."""
    if isinstance(value, Mapping):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _prune(root: Storage, step: int, keep: int) -> None:
    place = root.at(STEPS)
    there = steps(root)
    best = read_pointer(root, "best")
    # A step beyond this one is from a future that a resumed run gave up.
    kept = {*[other for other in there if other <= step][-keep:], best.step if best else step}
    for other in there:
        if other not in kept:
            # Without its last file it is no checkpoint any more, however far the deletion gets.
            place.at(step_name(other)).delete_file(STATE)
            place.delete_directory(step_name(other))


def _tensor_bytes(named: Mapping[str, Tensor]) -> bytes:
    # Copies: safetensors takes no tensors that share memory, and those of a layout are views of one vector.
    return safetensors.torch.save({name: value.detach().cpu().contiguous().clone() for name, value in named.items()})


def _seal(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    sealed = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_manifest(place: Storage, root: Storage, step: int) -> dict[str, Any]:
    content = _read(place, STATE, root, step)
    try:
        manifest = json.loads(content)
        intact = manifest["sha256"] == _manifest_digest(manifest) and manifest["step"] == step
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(place, STATE, root, step, "is cut off or altered", type(error).__name__) from error
    if not intact:
        raise _damaged(place, STATE, root, step, "is altered", "its checksum or its step does not fit")
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{place.shown}/{STATE} has format {manifest['format']}; this version of raymeta reads {FORMAT}. "
            "Use the version that wrote it."
        )
    return manifest


def _read(place: Storage, file: str, root: Storage, step: int) -> bytes:
    try:
        return place.read(file)
    except OSError as error:
        raise _damaged(place, file, root, step, "cannot be read", str(error)) from error


def _damaged(place: Storage, file: str, root: Storage, step: int, what: str, detail: str) -> InputError:
    others = [other for other in steps(root) if other != step]
    advice = f"Use another checkpoint; steps there are: {_listed(others)}." if others else "There is no other one."
    return InputError(f"{place.shown}/{file} {what} ({detail}). {advice}")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _to_json(value: Any, where: str) -> Any:
    """`value` as JSON that `_from_json` turns back. Raises TypeError for what is no JSON, naming its place."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {NON_FINITE_KEY: str(value)}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} of a checkpoint is {value!r}; expected JSON (dicts with text keys, lists, numbers, ...)")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if list(value) == [NON_FINITE_KEY]:
            return NON_FINITE[value[NON_FINITE_KEY]]
        return {key: _from_json(item) for key, item in value.items()}
    return value
