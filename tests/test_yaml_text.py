"""YAML by the rules of 1.2, and back."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymeta.errors import InputError
from raymeta.yaml_text import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2e+2", -200.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("7", 7),
        ("-7", -7),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
        ("{name: mlp, hidden: [64, 64]}", {"name": "mlp", "hidden": [64, 64]}),
        (".inf", math.inf),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    parsed = parse(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.sampled_from(["1e-3", "yes", "no", "0o7", "12:30", "2020-01-01", "010", "1_0", "<<", "=", "~", "0x1F", ".5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=6), plain, max_size=4))
def test_what_is_dumped_is_parsed_again(value: dict) -> None:
    text = dump(value)
    assert parse(text, "here") == value
    assert list(parse(text, "here")) == list(value)


@given(value=st.dictionaries(st.text(max_size=6), plain, max_size=4))
def test_other_readers_of_yaml_read_the_same(value: dict) -> None:
    assert yaml.safe_load(dump(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"^file\.yaml is no YAML: .* at line 1"),
        ("a: b: c", r"mapping values are not allowed here at line 1, column 5"),
        ("a: 1\nb: 2\na: 3", r"the key 'a' stands twice at line 3, column 1"),
        ("!!python/object:os.system {}", r"is no YAML: could not determine a constructor"),
        ("a: \x00", r"is no YAML"),
        ("\tx: 1", r"is no YAML"),
    ],
)
def test_what_is_no_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text, "file.yaml")
