"""Almost no inner loop (Raghu, Raghu, Bengio, Vinyals 2019, arXiv 1909.09157): a task changes the head alone."""

from __future__ import annotations

from dataclasses import dataclass

from raymeta.algorithms.maml import MAML
from raymeta.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class ANIL(MAML):
    """MAML in which only the parameters w of `head` take inner steps; all others, theta, are learned by the outer loop
    alone (section 4): w_{i+1} = w_i - inner_rate * grad_w L_support(theta, w_i), and the outer loss is
    L_query(theta, w_k), for theta and w_0.

    Attributes:
        head: the name of the module (or of several, by their common prefix, dot by dot) that a task changes; None:
            the module of the last parameter. "" is the whole model: then this is MAML.

    Departs from the paper: `head` may be other layers than the last; any inner rule, any number of steps, and the
    first-order gradient, where they are set.
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
