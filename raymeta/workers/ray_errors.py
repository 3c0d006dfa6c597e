"""What Ray's errors mean here: a worker is lost, there is no room, or the user's code is wrong."""

from __future__ import annotations

from ray import exceptions

from raymeta.errors import InputError, RunError

# The worker or what it held is lost, not the user's code wrong. (Several are no RayActorError in Ray 2.60.)
LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
    exceptions.GetTimeoutError,
)
# Ray puts on disk what its object store cannot hold: it has no room when that is full too.
NO_ROOM = (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError)


def cause_of(error: exceptions.RayTaskError, where: str) -> Exception:
    """The user's error as the worker raised it, or one that says where an unexpected one came from."""
    if isinstance(error.cause, (InputError, RunError)):
        return error.cause
    return RunError(f"{where} failed: {error}")


def no_room(what: str, where: str) -> RunError:
    """In one sentence, what did not fit and where."""
    return RunError(
        f"Ray has no room for {what} on {where}: its object store is full, and so is the disk that takes what does "
        "not fit. Start Ray with a larger object_store_memory, or make room on the disk of its temp_dir."
    )
