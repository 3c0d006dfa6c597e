"""A TensorBoard event file, written line by line as a log is.

The writers that exist write in a thread of their own, which a full disk ends without a word to who waits for it; here
a write that fails is an OSError of the call.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class EventFile:
    """A new file of scalars in `folder`.

    Args:
        purge_step: TensorBoard is to hide what earlier files of the folder say of this step and later ones; None:
            nothing.

    Raises:
        OSError: it cannot be written (from the methods too).
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 (open while the run writes)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event with a value for each name."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        check = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        record = length + check[0] + content + check[1]
        while record:  # a write that is cut short, as on a full disk, raises when it goes on
            record = record[self._file.write(record) :]
