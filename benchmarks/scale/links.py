"""Several machines in one: network namespaces with links of a set bandwidth and latency. Linux, as root, with iproute2.

Each "machine" is a namespace whose only link goes to a bridge. Bandwidth is a token bucket on both ends of the link
(`tc ... tbf`). Latency is a process between two halves of the link that holds every frame back for the time that is
set: `tc ... netem` would do it, but not every kernel has it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import multiprocessing
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

BRIDGE = "raymeta-b"
NETWORK = "10.77.0"
FRAME_BYTES = 1500
BUFFER_BYTES = 64 << 20
ETHERTYPE_ALL = 3
# linux/ethtool.h, linux/sockios.h: checksums are made by the sender, frames are not joined to larger ones.
SIOCETHTOOL, SET_TX_CHECKSUM, SET_TSO, SET_GSO, SET_GRO = 0x8946, 0x17, 0x1F, 0x24, 0x2C


def unavailable() -> str | None:
    """Why this machine cannot have them, in one sentence; None: it can."""
    if sys.platform != "linux":
        return f"they are Linux's, this is {sys.platform}"
    missing = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 is not installed"
    return None if os.geteuid() == 0 else "this needs root"


def address(machine: int) -> str:
    """The IP address of that machine, counted from 0."""
    return f"{NETWORK}.{machine + 1}"


def inside(machine: int, command: list[str]) -> list[str]:
    """The command that runs `command` on that machine."""
    return ["ip", "netns", "exec", f"raymeta-{machine}", *command]


@contextlib.contextmanager
def machines(count: int, megabits: float | None, milliseconds: float) -> Iterator[None]:
    """So many machines on one bridge.

    Args:
        megabits: per second, of each link in each direction; None: what the kernel does.
        milliseconds: that machine 0's link holds frames back in each direction.

    Raises:
        PermissionError: the kernel refuses (see `unavailable` for what can be known before).
    """
    holder: Any = None
    try:
        _remove(count)
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "link", "set", BRIDGE, "up")
        for number in range(count):
            name, here, there = f"raymeta-{number}", f"rm-host-{number}", f"rm-in-{number}"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
            for end in (here, there):
                _plain_frames(end)
                if megabits is not None:
                    _limit(end, megabits)
            _run("ip", "link", "set", there, "netns", name)
            for command in (
                ["ip", "addr", "add", f"{address(number)}/24", "dev", there],
                ["ip", "link", "set", there, "up"],
                ["ip", "link", "set", "lo", "up"],
            ):
                _run(*inside(number, command))
            _run("ip", "link", "set", here, "up")
            if number == 0 and milliseconds:
                _run("ip", "link", "add", "rm-hold-0", "type", "veth", "peer", "name", "rm-hold-1")
                for end in ("rm-hold-0", "rm-hold-1"):
                    _plain_frames(end)
                    _run("ip", "link", "set", end, "up")
                _run("ip", "link", "set", "rm-hold-1", "master", BRIDGE)
                holder = multiprocessing.get_context("spawn").Process(
                    target=_hold, args=(here, "rm-hold-0", milliseconds / 1e3), daemon=True
                )
                holder.start()
            else:
                _run("ip", "link", "set", here, "master", BRIDGE)
        yield
    finally:
        if holder is not None:
            holder.kill()
            holder.join()
        _remove(count)


def _remove(count: int) -> None:
    """What an earlier run left is gone too; what is not there is no error."""
    links = [BRIDGE, "rm-hold-0", *(f"rm-host-{number}" for number in range(count))]
    gone = [["ip", "netns", "del", f"raymeta-{number}"] for number in range(count)]
    for command in [*gone, *(["ip", "link", "del", link] for link in links)]:
        subprocess.run(command, check=False, capture_output=True)


def _limit(link: str, megabits: float) -> None:
    _run("tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "2s")


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def _plain_frames(link: str) -> None:
    """Frames of `link` leave as they are to arrive: who holds them back sends on what it received."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for setting in (SET_TX_CHECKSUM, SET_TSO, SET_GSO, SET_GRO):
            value = array.array("B", struct.pack("II", setting, 0))
            request = struct.pack("16sP16x", link.encode(), value.buffer_info()[0])
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def _hold(first: str, second: str, seconds: float) -> None:
    """Send on what comes from either link to the other, `seconds` later."""
    ends = []
    for link in (first, second):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_ALL))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        end.bind((link, ETHERTYPE_ALL))
        end.setblocking(False)
        ends.append(end)
    held: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        readable, _, _ = select.select(ends, [], [], wait)
        for end in readable:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, sender = end.recvfrom(2 * FRAME_BYTES)
                    if sender[2] != socket.PACKET_OUTGOING:  # type: ignore[attr-defined]
                        held.append((time.monotonic() + seconds, 1 - ends.index(end), frame))
        while held and held[0][0] <= time.monotonic():
            _, target, frame = held.popleft()
            with contextlib.suppress(BlockingIOError):  # a full queue loses frames, as a real one does
                ends[target].send(frame)
