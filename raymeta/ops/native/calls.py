"""How a kernel in C is called, and made an operation of torch (`torch.ops.raymeta.*`), so that a recording, and
`torch.compile`, see one operation each."""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.ops.native.library import kernels

# C's names for what the kernels know.
_REAL = {torch.float32: "float", torch.float64: "double"}

# Below so many numbers it takes longer to wake a thread than to do without it.
THREADED_FROM = 1 << 15

# A recorded program calls the function itself: a tenth of the way through torch's dispatch.
DIRECT: dict[Any, Callable[..., Any]] = {}


class Kernel:
    """A function in C, of so many pointers, then of arguments of the types `between`, then of the numbers of tasks and
    of threads."""

    def __init__(self, name: str, pointers: int, *between: Any) -> None:
        self.name = name
        self.types = [*[ctypes.c_void_p] * pointers, *between, ctypes.c_int64, ctypes.c_int]
        self._functions: dict[torch.dtype, Callable[..., int]] = {}

    def __call__(self, x: Tensor, *arguments: Any) -> None:
        """For all tasks of x [T, ...], by as many threads as torch uses: no sum depends on it.

        Raises:
            InputError: there is no memory for it.
        """
        threads = torch.get_num_threads() if x.numel() >= THREADED_FROM else 1
        function = self._functions.get(x.dtype) or self._loaded(x.dtype)
        if function(*arguments, len(x), threads):
            raise InputError(f"no memory for the kernel {self.name} (lower algorithm.chunk_tasks)")

    def _loaded(self, dtype: torch.dtype) -> Callable[..., int]:
        found = getattr(kernels(_REAL[dtype]), self.name)
        found.argtypes = self.types
        self._functions[dtype] = found
        function: Callable[..., int] = found
        return function


def at(value: Tensor | None) -> int | None:
    """Where its numbers lie."""
    return None if value is None else value.data_ptr()


def dense(value: Tensor | None) -> Tensor | None:
    """The value, in the order of its dimensions in memory."""
    return None if value is None else value.contiguous()


def no_third_derivative(layer: str) -> NoReturn:
    """Raises NotImplementedError: the kernels of `layer` end with the second one."""
    raise NotImplementedError(
        f"the {layer} of raymeta.ops.native has no third derivative; set algorithm.kernels=general"
    )


_library = torch.library.Library("raymeta", "DEF")
_Function = TypeVar("_Function", bound=Callable[..., Any])
# Of x, the shapes of the other arguments by name.
_Shapes = Callable[[Tensor], Mapping[str, Sequence[int]]]


def operation(
    signature: str, empty: Callable[..., Any], shapes: _Shapes | None = None
) -> Callable[[_Function], _Function]:
    """Makes a function an operation of torch.

    Args:
        signature: in torch's words.
        empty: of the same arguments, returns empty tensors for what the function returns.
        shapes: of the argument `x` [T, ., C, ...], those of other arguments; what is not named is like x. None: the
            function looks itself.
    """

    def made(function: _Function) -> _Function:
        name = signature.split("(")[0]
        _library.define(signature, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _library.impl(name, _checked(function, shapes), "CPU")
        torch.library.register_fake(f"raymeta::{name}", empty, lib=_library)
        DIRECT[getattr(torch.ops.raymeta, name).default] = function
        return function

    return made


def _checked(function: Callable[..., Any], shapes: _Shapes | None) -> Callable[..., Any]:
    """The function, for tensors that nobody has looked at: it reads memory by their sizes.

    Raises:
        ValueError: tensors of several types, or of shapes that do not go together.
    """

    places = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*arguments: Any) -> Any:
        given = {name: v for name, v in zip(places, arguments, strict=True) if isinstance(v, Tensor)}
        x = given.get("x", next(iter(given.values())))
        others: Mapping[str, Sequence[int]] = {}
        if shapes is not None:
            if x.dim() < 3:
                raise ValueError(f"{function.__name__} of shapes: x {tuple(x.shape)}; expected 3 dimensions or more")
            others = shapes(x)
        for name, value in given.items():
            if value.dtype != x.dtype or value.dtype not in _REAL:
                raise ValueError(f"{function.__name__} of {x.dtype} and {value.dtype}; expected all float32 or float64")
            expected = tuple(others.get(name, x.shape))
            if shapes is not None and tuple(value.shape) != expected:
                raise ValueError(f"{function.__name__} of shapes: {name} {tuple(value.shape)}; expected {expected}")
            if not value.numel():
                raise ValueError(f"{function.__name__} of shapes: {name} {tuple(value.shape)}: nothing to do")
        return function(*arguments)

    return checked
