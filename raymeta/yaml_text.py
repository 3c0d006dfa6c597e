"""YAML in and out, by the rules of YAML 1.2: `1e-3` is a number, `yes` and `12:30` are texts, a key stands once.

(PyYAML follows YAML 1.1, where `1e-3` is a text, `no` is false, `010` is eight and of two equal keys the first is
lost without a word.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from raymeta.errors import InputError

_PLAIN = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    "merge": re.compile(r"^<<$"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own table, replaced)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


class _Dumper(yaml.SafeDumper):
    # PyYAML's own rules stay beside ours: what either would misread is written in quotes.
    yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


for _name, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse(text: str, where: str) -> Any:
    """The value that a YAML text holds.

    Args:
        text: the YAML.
        where: what messages call it (a file's name, an override).

    Raises:
        InputError: it is no YAML, or a key stands twice in one mapping.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{where} is no YAML: {problem}{place}.") from error


def dump(value: Mapping[str, Any]) -> str:
    """A mapping as YAML, keys in their order; `parse` gives it back."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, width=10**6)
