"""Parts by name: the task source, model or learner that a section of the configuration names, and its arguments.

A part is a dataclass, a module class or a function. Its fields, or its signature, say which arguments there are, of
which types, and with which defaults; nothing is made here.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from pydantic_core import ErrorDetails, PydanticSerializationError, to_jsonable_python

from raymeta.errors import InputError, nearest, shown
from raymeta.own_code import own_object

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One argument of a part: its type (Any where none is stated) and its default, or `REQUIRED`."""

    annotation: Any
    default: Any


def find_part(section: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The part that `<section>.name` names: an entry of `table`, or the user's own `package.module:Name`.

    Importing the user's module runs its code. The current directory is searched too, after all else.

    Raises:
        InputError: no such name; or a module that is missing or fails, or has no such class or function.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise InputError(
            f"{section}.name={name!r}: unknown; {nearest(name, table)} Or package.module:Name of your own."
        )
    part = own_object(f"{section}.name", name)
    if not callable(part) or inspect.isabstract(part):
        kind = "an abstract class" if inspect.isclass(part) else f"a {type(part).__name__}"
        raise InputError(f"{section}.name={name!r} is {kind}; expected a class that can be made, or a function.")
    return part


def arguments_of(part: Callable[..., Any]) -> dict[str, Argument] | None:
    """The arguments of a part by name; None when it takes any (`**arguments`)."""
    hinted = part.__init__ if inspect.isclass(part) and not dataclasses.is_dataclass(part) else part
    try:
        hints = typing.get_type_hints(hinted)
    except (NameError, TypeError, AttributeError):
        hints = {}  # a type known to type checkers only: the argument is taken as it is
    found = {}
    for name, parameter in inspect.signature(part).parameters.items():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            return None
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            found[name] = Argument(hints.get(name, Any), parameter.default)
    if dataclasses.is_dataclass(part):
        # The signature shows a factory as an object of its own; its value is the default.
        for field in dataclasses.fields(part):
            if field.name in found and field.default_factory is not dataclasses.MISSING:
                found[field.name] = Argument(found[field.name].annotation, field.default_factory())
    return found


def resolve_arguments(
    section: str,
    name: str,
    arguments: Mapping[str, Any],
    table: Mapping[str, Callable[..., Any]],
    excluded: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """All arguments of a part that a configuration can state: those given, checked, and the defaults of the others.

    Args:
        section: of the configuration ("tasks", "model", "algorithm"), for messages.
        name: the part's, as in `find_part`.
        arguments: what is given, as JSON values.
        table: the parts that ship.
        excluded: arguments that raymeta fills itself.

    Returns:
        Values of the stated types (a list becomes a tuple where that is the type). Defaults that cannot be written
        as JSON are left to the part.

    Raises:
        InputError: one line for each argument that is unknown, missing or of the wrong type.
    """
    part = find_part(section, name, table)
    known = arguments_of(part)
    problems = [
        f"{section}.{key} is filled in by raymeta and cannot be set; remove it." for key in arguments if key in excluded
    ]
    if known is None:
        if problems:
            raise InputError("\n".join(problems))
        return dict(arguments)
    settable = {key: argument for key, argument in known.items() if key not in excluded}
    for key in arguments:
        if key not in known and key not in excluded:
            hint = nearest(key, settable) if settable else f"{name!r} takes no arguments."
            if not hint.startswith("did you mean"):  # no slip of the pen
                hint += f" If it is of a recipe's other {section}, replace that whole: '{section}={{name: {name}}}'."
            problems.append(f"{section}.{key}: unknown to {name!r}; {hint}")
    resolved = {}
    for key, argument in settable.items():
        if key in arguments:
            try:
                resolved[key] = _checked(f"{section}.{key}", arguments[key], argument)
            except InputError as error:
                problems.append(str(error))
        elif argument.default is REQUIRED:
            problems.append(f"{section}.{key}: missing; {name!r} needs it ({_type_name(argument.annotation)}).")
        elif is_plain(argument.default):
            resolved[key] = argument.default
    if problems:
        raise InputError("\n".join(problems))
    return resolved


def is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON or YAML."""
    try:
        to_jsonable_python(value)
    except PydanticSerializationError:
        return False
    return True


def sentences(
    errors: Iterable[ErrorDetails], path: str, allowed: Callable[[tuple[int | str, ...]], list[str]]
) -> list[str]:
    """pydantic's errors as sentences: the dotted path, what was got, what is expected.

    Args:
        errors: of one validation.
        path: in front of each error's own place; "" for none.
        allowed: the keys that there are beside the (unknown) one at a place.
    """
    made: dict[str, None] = {}
    for error in errors:
        place = dotted(path, error["loc"])
        if error["type"] == "extra_forbidden":
            sentence = f"{place}: unknown; {nearest(str(error['loc'][-1]), allowed(error['loc']))}"
        elif error["type"] == "missing":
            sentence = f"{place}: missing; it is required."
        elif error["type"] == "value_error":
            sentence = f"{error['msg'].removeprefix('Value error, ')}"
        else:
            expected = _in_words(error["msg"])
            if error["type"] == "literal_error" and isinstance(error["input"], str):
                choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
                sentence = f"{place}={shown(error['input'])}: unknown; {nearest(error['input'], choices)}"
            else:
                sentence = f"{place}={shown(error['input'])}; expected {expected}."
        made[sentence] = None
    return list(made)


# pydantic speaks of Python and JSON; a configuration is YAML.
_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a mapping",
}


def _in_words(message: str) -> str:
    expected = message.removeprefix("Input should be ")
    for theirs, ours in _WORDS.items():
        expected = expected.replace(theirs, ours)
    return f"a number {expected}" if expected.startswith(("greater", "less")) else expected


def dotted(path: str, place: Iterable[int | str]) -> str:
    """`outer.betas[1]` for the path "outer" and the place ("betas", 1)."""
    for part in place:
        path = f"{path}[{part}]" if isinstance(part, int) else f"{path}.{part}" if path else str(part)
    return path


def _checked(path: str, value: Any, argument: Argument) -> Any:
    """`value` as the argument's type. Raises InputError with what is expected."""
    default = argument.default
    if default is not REQUIRED and is_plain(default):
        plain = to_jsonable_python(default)
        if type(plain) is type(value) and plain == value:
            return default  # also where the stated type does not hold it, as in `width: int = None`
    try:
        adapter = pydantic.TypeAdapter(argument.annotation, config=pydantic.ConfigDict(allow_inf_nan=False))
    except pydantic.PydanticUserError:
        return value  # a type of the user's own that nothing is known of
    try:
        # As JSON: strict (a text is no number, true is no 1), yet a list may be a tuple and a text a path.
        return adapter.validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        errors = error.errors()
        if len({detail["type"] for detail in errors}) > 1 and len({detail["loc"][:1] for detail in errors}) > 1:
            # One error for each member of a union says less than the union's name.
            raise InputError(f"{path}={shown(value)}; expected {_type_name(argument.annotation)}.") from error
        raise InputError("\n".join(sentences(errors, path, lambda place: []))) from error


def _type_name(annotation: Any) -> str:
    if annotation is Any:
        return "any value"
    return annotation.__name__ if inspect.isclass(annotation) and not typing.get_args(annotation) else str(annotation)
