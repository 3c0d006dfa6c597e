"""What every learner says of itself: what it computes, whose it is, and where it departs from that."""

from __future__ import annotations

import inspect
import re

from raymeta.algorithms import Learner


def text_of(kind: type[Learner]) -> str:
    """Of the class itself, none that it inherits, and of its module."""
    module = inspect.getmodule(kind)
    assert module is not None
    return f"{vars(kind)['__doc__']}\n{module.__doc__}"


def test_it_names_its_source(learner: Learner) -> None:
    assert re.search(r"arXiv\s\d{4}\.\d{5}", text_of(type(learner)))


def test_it_says_where_it_departs_from_it(learner: Learner) -> None:
    assert re.search(r"^    Departs from ", vars(type(learner))["__doc__"], re.MULTILINE)


def test_it_has_an_equation(learner: Learner) -> None:
    """Or says by its number which one of the paper it is."""
    assert re.search(r" = | <- |\(equation", text_of(type(learner)))
