"""What all sections of a configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from raymeta.errors import shown


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def without_meaning(section: str, values: BaseModel, name: str, other: str, reason: str) -> str:
    """That a setting of a section says nothing beside another one there, and why."""
    got, beside = (shown(to_jsonable_python(getattr(values, key))) for key in (name, other))
    return f"{section}.{name}={got} with {section}.{other}={beside}: it {reason}."
