"""What a user names in a setting as package.module:Name."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from raymeta.errors import InputError, nearest


def own_object(setting: str, name: str) -> Any:
    """What `package.module:Name` names. Importing the module runs its code. The current directory is searched, too,
    after all else.

    Args:
        setting: that has the name, for messages.

    Raises:
        InputError: no such name; or a module that is missing or fails, or has no such object.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise InputError(f"{setting}={name!r}; expected package.module:Name.")
    here = os.getcwd()
    if here not in sys.path:
        # A console script has its own folder on the path, not the one that the user works in.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # The user's module may raise anything while it is imported.
        raise InputError(
            f"{setting}={name!r}: importing {module_name} failed with {type(error).__name__}: {error}. It is "
            f"looked for in the installed packages, PYTHONPATH and {here}."
        ) from error
    part = getattr(module, attribute, None)
    if part is None:
        # Not what the module itself imported.
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        hint = nearest(attribute, there) if there else "it defines no class."
        raise InputError(f"{setting}={name!r}: {module_name} has no {attribute}; {hint}")
    return part
