"""Almost no inner loop (Raghu, Raghu, Bengio, Vinyals 2019, arXiv 1909.09157): a task changes the head alone."""

from __future__ import annotations

from dataclasses import dataclass

from raymeta.algorithms.maml import MAML
from raymeta.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class ANIL(MAML):
    """MAML in which only the parameters of `head` take inner steps; all others are learned by the outer loop alone.

    Attributes:
        head: the name of the module (or of several, by their common prefix, dot by dot) that a task changes; None:
            the module of the last parameter. "" is the whole model: then this is MAML.
    """

    head: str | None = None

    all_are_fast = False

    def fast_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if self.head == "":
            return names
        head = names[-1].rpartition(".")[0] if self.head is None else self.head
        chosen = tuple(name for name in names if name == head or name.startswith(head + "."))
        if not chosen:
            modules = {name.rpartition(".")[0] for name in names}
            raise InputError(
                f"algorithm.head={self.head!r} names no part of the model with parameters; {nearest(head, modules)}"
            )
        return chosen
