"""Memory that processes share: found by its random name alone, growing, gone with the last process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raymeta.workers.shared_memory import Board, Handle, Outbox, Region, read

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")

FLOAT = np.dtype(np.float32)

OTHER = """
import sys
import numpy as np
from raymeta.workers.shared_memory import Handle, Outbox, Region
region = Region.open(Handle(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
print(region is not None and Outbox(region).put(7, [np.arange(5000, dtype=np.float32), np.full(5000, 2.5, np.float32)]))
"""


@pytest.fixture
def region():
    made = Region.create()
    assert made is not None
    yield made
    made.close()


def other_process(handle: Handle) -> str:
    arguments = [str(part) for part in handle]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", OTHER, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_process_writes_and_this_one_reads(region):
    region.array(3, FLOAT)[:] = 1  # smaller than what the other puts there: the region grows
    said = other_process(region.handle())
    assert said == "Letter(offsets=(0, 20032), size=5000, dtype='float32')"
    letter = Outbox(region).put(7, [np.zeros(5000, np.float32)] * 2)
    assert str(letter) == said
    assert other_process(region.handle()) == said
    first, second = read(region, letter)
    np.testing.assert_array_equal(first, np.arange(5000, dtype=np.float32))
    np.testing.assert_array_equal(second, np.full(5000, 2.5, np.float32))


def test_a_region_is_found_by_its_name_alone(region, tmp_path):
    handle = region.handle()
    with (tmp_path / "another file").open("w+b") as file:
        for wrong in (
            handle._replace(name="raymeta-0123456789abcdef"),  # as on another machine: same numbers, another file
            handle._replace(file=file.fileno()),
            handle._replace(process=2**22 + 1),
        ):
            assert Region.open(wrong) is None
            assert other_process(wrong) == "False"
    opened = Region.open(handle)
    assert opened is not None
    opened.array(4, FLOAT)[:] = 3
    assert region.array(4, FLOAT).tolist() == [3, 3, 3, 3]
    opened.close()


def test_arrays_outlive_growth_and_end(region):
    early = region.array(10, FLOAT)
    early[:] = 5
    late = region.array((1000, 1000), FLOAT)
    assert late[0, :10].tolist() == [5] * 10
    late[0, 0] = 6
    region.close()
    region.close()
    assert (early[0], late[0, 1]) == (6, 5)


def test_nothing_is_left_of_a_region():
    files = Path("/proc/self/fd")
    maps = Path("/proc/self/maps")
    before = len(list(files.iterdir()))
    for _ in range(3):
        made = Region.create()
        assert made is not None
        made.array(1_000_000, FLOAT)[:] = 1
        opened = Region.open(made.handle())
        assert opened is not None
        opened.array(1_000_000, FLOAT)
        assert "memfd:raymeta" in maps.read_text()
        opened.close()
        made.close()
        assert "memfd:raymeta" not in maps.read_text()
    assert len(list(files.iterdir())) == before


def test_the_sums_of_one_job_do_not_lie_over_each_other(region):
    outbox = Outbox(region)
    arrays = [np.full(100, number, np.float32) for number in range(5)]
    early, late = outbox.put(1, arrays[:2]), outbox.put(1, arrays[2:4])
    assert early is not None
    assert late is not None
    held = read(region, early) + read(region, late)
    assert [array[0] for array in held] == [0, 1, 2, 3]
    again = outbox.put(2, arrays[4:])
    assert again is not None
    assert again.offsets == (0,)
    assert held[0][0] == 4  # the job before has ended: its place is taken


def test_without_room_nothing_is_put(region, monkeypatch):
    def full(file: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    assert Outbox(region).put(0, [np.zeros(10, np.float32)]) is None
    with pytest.raises(OSError, match="No space"):
        Board(region).post(0, np.zeros(10, np.float32))


def test_a_reader_that_is_too_late_is_told(region):
    board = Board(region)
    old = board.post(3, np.full(50, 3, np.float32))
    found = board.look(3, old)
    assert found is not None
    assert found.tolist() == [3] * 50
    new = board.post(4, np.full(50, 4, np.float32))
    assert board.look(3, old) is None
    found = board.look(4, new)
    assert found is not None
    assert found.tolist() == [4] * 50
