"""Parameters: a dict of named tensors for the mathematics, one flat vector for transport and for the optimiser.

Names are prefixed by what they are: `model.` for the module's own parameters (the rest of the name is the name in
`named_parameters()`), anything else for what a learner learns beside them (`inner_rate.`, ...).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raymeta.errors import InputError

Params = dict[str, Tensor]

MODEL = "model."


def model_params(params: Mapping[str, Tensor]) -> Params:
    """The module's own parameters of `params`, under the names that the module gives them."""
    return with_prefix(params, MODEL)


def with_prefix(params: Mapping[str, Tensor], prefix: str) -> Params:
    """The entries of `params` whose name begins with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class ParameterLayout:
    """Where each named tensor lies in the flat vector of P numbers.

    All tensors are of one floating dtype; the order is the order of the dict that the layout was made from.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> ParameterLayout:
        """The layout of `params`. Raises InputError when the dtypes differ or are not floating."""
        dtypes = {value.dtype for value in params.values()}
        if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
            kinds = sorted(map(str, dtypes))
            raise InputError(f"parameters are of dtypes {kinds}; expected one floating dtype for all of them")
        return cls(tuple(params), tuple(tuple(value.shape) for value in params.values()), dtypes.pop())

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each tensor has."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """P, how many numbers there are in all."""
        return sum(self.sizes)

    def fingerprint(self) -> str:
        """A text that two layouts share exactly when a flat vector means the same to both."""
        return hashlib.sha256(repr((self.names, self.shapes, str(self.dtype))).encode()).hexdigest()

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """One new vector [P] with the numbers of `params` in the layout's order."""
        assert tuple(params) == self.names, "the parameters are not those of the layout"
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Tensor) -> Params:
        """Named views of `flat` [P]: nothing is copied, a change of one is a change of the other."""
        assert flat.shape == (self.size,), f"expected {self.size} numbers, got shape {tuple(flat.shape)}"
        pieces = flat.split(self.sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def ordered(self, params: Mapping[str, Tensor], where: str) -> Params:
        """`params` in the layout's order and dtype; `where` names them in the message.

        Raises:
            InputError: they have other names or shapes.
        """
        wanted = dict(zip(self.names, self.shapes, strict=True))
        found = {name: tuple(value.shape) for name, value in params.items()}
        if wanted != found:
            different = [name for name in (*wanted, *found) if wanted.get(name) != found.get(name)]
            name = different[0]
            there, here = found.get(name, "missing"), wanted.get(name, "none of that name")
            raise InputError(
                f"{where} has other parameters than this model and learner: {name} is {there} there, {here} here "
                f"({len(set(different))} differ). Set model.*, algorithm.* and tasks.ways as in the run that wrote it."
            )
        return {name: params[name].to(self.dtype) for name in self.names}


def params_hash(flat: Tensor) -> str:
    """A SHA-256 of the bits of a flat vector: equal exactly when every bit is."""
    return hashlib.sha256(flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
