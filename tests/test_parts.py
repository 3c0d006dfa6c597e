"""Parts and their arguments, on small tables of real classes."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from torch import nn

from raymeta.errors import InputError
from raymeta.parts import arguments_of, find_part, resolve_arguments


@dataclass(frozen=True)
class Rule:
    kind: ClassVar[str] = "rule"
    rate: float
    steps: int = 1
    order: Literal["exact", "first"] = "exact"
    widths: tuple[int, ...] = (40, 40)
    batch: int | None = None
    folder: Path = Path("here")
    both: int | str = 1
    flags: dict[str, bool] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Child(Rule):
    rate: float = 0.5
    extra: bool = False


class Net(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 8, activation: Any = nn.ReLU) -> None:
        super().__init__()
        raise AssertionError("no part is made while its arguments are resolved")


class Sloppy:
    def __init__(self, width: int = None, anything=3) -> None:  # type: ignore[assignment, no-untyped-def] # noqa: RUF013
        self.width = width


def open_ended(width: int = 1, **others: int) -> None:
    raise AssertionError("never called")


TABLE = {"rule": Rule, "child": Child, "net": Net, "sloppy": Sloppy, "open": open_ended}
FILLED = frozenset({"input_shape", "outputs", "seed"})


def resolve(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return resolve_arguments("algorithm", name, arguments, TABLE, FILLED)


def test_defaults_are_filled_in_and_values_get_their_types() -> None:
    assert resolve("rule", {"rate": 1}) == {
        "rate": 1.0,
        "steps": 1,
        "order": "exact",
        "widths": (40, 40),
        "batch": None,
        "folder": Path("here"),
        "both": 1,
        "flags": {},
    }
    given = {"rate": 1, "widths": [1, 2], "batch": 3, "folder": "there", "both": "x", "flags": {"a": True}}
    resolved = resolve("rule", given)
    assert resolved["widths"] == (1, 2)
    assert resolved["folder"] == Path("there")
    assert type(resolved["rate"]) is float
    assert Rule(**resolved).both == "x"
    assert resolve("child", {})["rate"] == 0.5


def test_a_module_is_read_by_its_signature() -> None:
    # A default that no YAML can hold is left to the class.
    assert resolve("net", {}) == {"width": 8}
    assert resolve("sloppy", {}) == {"width": None, "anything": 3}
    assert resolve("sloppy", {"width": None, "anything": [1, "x"]}) == {"width": None, "anything": [1, "x"]}
    assert resolve("open", {"depth": 3}) == {"depth": 3}
    assert arguments_of(open_ended) is None
    assert set(arguments_of(Rule) or ()) == {item.name for item in dataclasses.fields(Rule)}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "rule",
            {"rat": 1.0, "rate": 1},
            r"algorithm\.rat: unknown to 'rule'; did you mean 'rate'\? Allowed: batch, both",
        ),
        ("rule", {}, r"algorithm\.rate: missing; 'rule' needs it \(float\)\."),
        ("rule", {"rate": "0.1"}, r"algorithm\.rate='0\.1'; expected a number\."),
        ("rule", {"rate": None}, r"algorithm\.rate=null; expected a number\."),
        ("rule", {"rate": float("nan")}, r"algorithm\.rate=NaN; expected a finite number\."),
        ("rule", {"rate": 1, "steps": True}, r"algorithm\.steps=true; expected a whole number\."),
        ("rule", {"rate": 1, "steps": 1.0}, r"algorithm\.steps=1\.0; expected a whole number\."),
        ("rule", {"rate": 1, "steps": "1"}, r"algorithm\.steps='1'; expected a whole number\."),
        (
            "rule",
            {"rate": 1, "order": "frist"},
            r"algorithm\.order='frist': unknown; did you mean 'first'\? .*exact, first",
        ),
        ("rule", {"rate": 1, "order": 3}, r"algorithm\.order=3; expected 'exact' or 'first'\."),
        ("rule", {"rate": 1, "widths": 3}, r"algorithm\.widths=3; expected a list\."),
        ("rule", {"rate": 1, "widths": [3, "x"]}, r"algorithm\.widths\[1\]='x'; expected a whole number\."),
        ("rule", {"rate": 1, "both": [1]}, r"algorithm\.both=\[1\]; expected int \| str\."),
        ("rule", {"rate": 1, "flags": {"a": 1}}, r"algorithm\.flags\.a=1; expected true or false\."),
        ("rule", {"rate": 1, "seed": 3}, r"algorithm\.seed is filled in by raymeta and cannot be set; remove it\."),
        ("rule", {"rate": 1, "kind": "x"}, r"algorithm\.kind: unknown"),
        ("net", {"outputs": 3}, r"algorithm\.outputs is filled in by raymeta"),
        ("open", {"seed": 3}, r"algorithm\.seed is filled in by raymeta"),
        ("rul", {}, r"algorithm\.name='rul': unknown; did you mean 'rule'\? Allowed: child, .*package\.module:Name"),
    ],
)
def test_refusals(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}"):
        resolve(name, arguments)


def test_every_problem_has_its_line() -> None:
    with pytest.raises(InputError) as caught:
        resolve("rule", {"steps": "x", "oder": 1, "seed": 1})
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "algorithm.seed",
        "algorithm.oder:",
        "algorithm.rate:",
        "algorithm.steps='x';",
    ]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    (tmp_path / "own_net_module.py").write_text(
        "from torch import nn\nfrom abc import ABC, abstractmethod\nNUMBER = 3\n"
        "class Net(nn.Module):\n    def __init__(self, outputs: int, depth: int = 2):\n        super().__init__()\n"
        "class Base(ABC):\n    @abstractmethod\n    def go(self): ...\n"
    )
    (tmp_path / "own_broken_module.py").write_text("1 / 0\n")
    return tmp_path


def test_a_class_of_the_users_own_is_imported_from_where_the_user_works(own_folder: Path) -> None:
    part = find_part("model", "own_net_module:Net", TABLE)
    assert (part.__module__, part.__name__) == ("own_net_module", "Net")
    assert resolve("own_net_module:Net", {"depth": 3}) == {"depth": 3}
    with pytest.raises(InputError, match=r"algorithm\.dept: unknown to 'own_net_module:Net'; did you mean 'depth'"):
        resolve("own_net_module:Net", {"dept": 3})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_net_module:Nett", r"has no Nett; did you mean 'Net'\? Allowed: Base, Net\."),
        ("own_net_module:NUMBER", "is a int; expected a class that can be made, or a function"),
        ("own_net_module:Base", "is an abstract class"),
        ("own_net_module:", "expected package.module:Name"),
        (":Net", "expected package.module:Name"),
        ("own_missing_module:Net", "importing own_missing_module failed with ModuleNotFoundError.* looked for in"),
        ("own_broken_module:Net", "importing own_broken_module failed with ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_imported_is_refused(name: str, message: str, own_folder: Path) -> None:
    with pytest.raises(InputError, match=f"^model.name='{name}'.*{message}"):
        find_part("model", name, TABLE)
