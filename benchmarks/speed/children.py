"""Processes that the main process starts: a call of one function, and a peer that takes turns.

Every process is spawned anew, so that what one library leaves behind (threads, memory, settings) touches no other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from benchmarks.speed.process import Order, Ready, serve

Result = TypeVar("Result")
SPAWN = multiprocessing.get_context("spawn")
# Beyond this a process counts as hung. Compiling the JAX forms takes about a minute on a quiet machine.
ANSWER_SECONDS = 600.0


class Failed(Exception):
    """The process said so, died or did not answer."""


class Child:
    """One process and the pipe to it."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=target, args=(theirs, *arguments))
        self.process.start()
        theirs.close()

    def ask(self, question: Any = None) -> Any:
        """What it answers; without a question, what it says of itself."""
        try:
            if question is not None:
                self.connection.send(question)
            if not self.connection.poll(ANSWER_SECONDS):
                raise Failed(f"no answer within {ANSWER_SECONDS:.0f} s")
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise Failed(f"the process ended with exit code {self.process.exitcode}") from error
        if isinstance(answer, str):
            raise Failed(answer.strip())
        return answer

    def end(self) -> None:
        """Ask it to end, and see that it does."""
        with contextlib.suppress(OSError):
            self.connection.send("end")
        self.process.join(30.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


class PeerProcess(Child):
    """A peer in its process, ready to take turns.

    Raises:
        Failed: it could not be made, or its first steps failed.
    """

    def __init__(self, order: Order) -> None:
        super().__init__(serve, order)
        self.order = order
        self.seconds: list[float] = []
        try:
            self.ready: Ready = self.ask()
        except Failed:
            self.end()
            raise

    def turn(self, steps: int) -> None:
        """So many timed steps."""
        self.seconds += self.ask(steps)

    def peak_bytes(self) -> int | None:
        """Peak memory of its steps so far; None: it is not known."""
        peak: int | None = self.ask("memory")
        return peak


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function` in a process of its own. Raises Failed where it raises."""
    child = Child(_answer, function, arguments)
    try:
        result: tuple[Result] = child.ask()
        return result[0]
    finally:
        child.end()


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send((function(*arguments),))
    except Exception:
        connection.send(traceback.format_exc())
