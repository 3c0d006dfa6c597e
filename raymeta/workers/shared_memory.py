"""Memory that processes of one machine share: how parameters and sums travel between the driver and workers beside it.

A region is an anonymous file (memfd) that others of the same user open through /proc by its owner's process: it has no
name in a file system, so that nothing is left when the last process that has it ends, however it ends. On systems
without such files there are no regions, and arrays travel through Ray. No ray in here.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

ALIGNMENT = 64  # bytes: a cache line


class Handle(NamedTuple):
    """Where another process finds a region."""

    process: int
    file: int
    name: str


class Region:
    """Memory that grows as it is asked for, and keeps its content as it grows.

    Arrays of it are views, and stay valid after `close`; who writes must know that nobody reads.
    """

    def __init__(self, file: int, name: str) -> None:
        self._file: int | None = file
        self._name = name
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> Self | None:
        """A new, empty region; None where the system has none."""
        if not hasattr(os, "memfd_create"):
            return None
        name = f"raymeta-{secrets.token_hex(8)}"
        try:
            return cls(os.memfd_create(name), name)
        except OSError:
            return None

    @classmethod
    def open(cls, handle: Handle) -> Self | None:
        """Another process's region; None where it cannot be reached: on another machine, in another container."""
        path = f"/proc/{handle.process}/fd/{handle.file}"
        try:
            # The name is random: elsewhere the same numbers belong to another file, which is not to be opened.
            if not os.readlink(path).startswith(f"/memfd:{handle.name}"):
                return None
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), handle.name)
        except OSError:
            return None

    def handle(self) -> Handle:
        """What another process opens it with."""
        assert self._file is not None, "the region is closed"
        return Handle(os.getpid(), self._file, self._name)

    def array(self, shape: int | Sequence[int], dtype: np.dtype, offset: int = 0) -> np.ndarray:
        """The array that begins `offset` bytes into the region, which grows to hold it.

        Raises:
            OSError: the system has no room.
        """
        count = int(np.prod(shape))
        return np.frombuffer(self._mapped(offset + count * dtype.itemsize), dtype, count, offset).reshape(shape)

    def _mapped(self, size: int) -> mmap.mmap:
        assert self._file is not None, "the region is closed"
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._map = mmap.mmap(self._file, 0)
        return self._map

    def close(self) -> None:
        """Gives back what this process holds, as far as no array of it is left. A second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = self._map = None


class Letter(NamedTuple):
    """Where arrays of one kind lie in a region, one after another."""

    offsets: tuple[int, ...]
    size: int
    dtype: str


class Outbox:
    """The sums that a worker leaves in its region for the driver, which reads them in place.

    The sums of one job lie one after another: the driver may hold earlier ones while it waits for their siblings. With
    the next job the region begins anew: the sums of the one before are added up, or not wanted.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._job: int | None = None
        self._end = 0

    def put(self, job: int, arrays: Sequence[np.ndarray]) -> Letter | None:
        """Copies arrays of one size and type into the region; None where the system has no room for them."""
        if job != self._job:
            self._job, self._end = job, 0
        size, dtype = arrays[0].size, arrays[0].dtype
        step = -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        offsets = tuple(self._end + number * step for number in range(len(arrays)))
        try:
            for offset, array in zip(offsets, arrays, strict=True):
                np.copyto(self._region.array(size, dtype, offset), array)
        except OSError:
            return None
        self._end += step * len(arrays)
        return Letter(offsets, size, dtype.name)


def read(region: Region, letter: Letter) -> list[np.ndarray]:
    """The arrays that another process has put there: views."""
    return [region.array(letter.size, np.dtype(letter.dtype), offset) for offset in letter.offsets]


class Board:
    """The parameters of the present job, in the driver's region: written by the driver, read by the workers."""

    START = ALIGNMENT  # before it: the number of the job that the parameters are of

    def __init__(self, region: Region) -> None:
        self._region = region

    def _number(self) -> np.ndarray:
        return self._region.array(1, np.dtype(np.int64))

    def post(self, number: int, array: np.ndarray) -> Letter:
        """Writes the parameters [P] of job `number` over those of the one before, whose calls nobody waits for.

        Raises:
            OSError: the system has no room for them.
        """
        letter = Letter((self.START,), array.size, array.dtype.name)
        target = self._region.array(array.size, array.dtype, self.START)
        self._number()[0] = number
        np.copyto(target, array)
        return letter

    def look(self, number: int, letter: Letter) -> np.ndarray | None:
        """[P] the parameters of job `number`, a view; None when those of a later one are there already."""
        (array,) = read(self._region, letter)
        return array if self._number()[0] == number else None
