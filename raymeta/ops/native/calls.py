"""How a kernel in C is called, and made an operation of torch (`torch.ops.raymeta.*`), so that a recording, and
`torch.compile`, see one operation each."""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from raymeta.errors import InputError
from raymeta.ops.native.library import kernels

# C's names for what the kernels know.
_REAL = {torch.float32: "float", torch.float64: "double"}

# Below so many numbers it takes longer to wake a thread than to do without it.
THREADED_FROM = 1 << 15

# The function of an operation: a tenth of the way through torch's dispatch.
DIRECT: dict[Any, Callable[..., Any]] = {}

# The calls of kernels that are made meanwhile, where somebody notes them.
_noted: list[_Call] | None = None


class _Call(NamedTuple):
    """A call of a kernel: its function in C, what that was given before the number of threads, whether it has some."""

    kernel: Kernel
    function: Callable[..., int]
    given: list[Any]
    threaded: bool


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
        threaded = x.numel() >= THREADED_FROM
        function = self._functions.get(x.dtype) or self._loaded(x.dtype)
        if _noted is not None:
            _noted.append(_Call(self, function, [*arguments, len(x)], threaded))
        if function(*arguments, len(x), torch.get_num_threads() if threaded else 1):
            self.no_memory()

    def no_memory(self) -> NoReturn:
        """Raises InputError."""
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


def prepared(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Callable[..., Any] | None]:
    """What an operation's function gives; and the same for other tensors of the same sizes and strides, which looks at
    nothing again.

    None in place of that where the function does more than to call one kernel with the memory of what it is given and
    of what it returns: where it copies what lies otherwise than the kernel reads it, or needs memory of its own.
    """
    global _noted
    before, _noted = _noted, []
    try:
        result = function(*arguments)
        noted = _noted
    finally:
        _noted = before
    several = isinstance(result, tuple)
    results = list(result) if several else [result]
    given = {place: at(value) for place, value in enumerate(arguments) if isinstance(value, Tensor)}
    if len(noted) != 1 or len(set(given.values())) < len(given):
        return result, None
    kernel, run, values, threaded = noted[0]
    pointers = {place: v for place, v in enumerate(values) if kernel.types[place] is ctypes.c_void_p and type(v) is int}
    from_given = {pointer: place for place, pointer in given.items()}
    from_results = {at(value): place for place, value in enumerate(results)}
    read = [(place, from_given[v]) for place, v in pointers.items() if v in from_given]
    written = [(place, from_results[v]) for place, v in pointers.items() if v in from_results]
    if len(read) + len(written) < len(pointers):
        return result, None
    empty = [(value.shape, value.stride(), value.dtype) for value in results]

    @functools.wraps(function)
    def again(*arguments: Any) -> Any:
        results = [torch.empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in empty]
        here = values.copy()
        for place, which in read:
            here[place] = arguments[which].data_ptr()
        for place, which in written:
            here[place] = results[which].data_ptr()
        if run(*here, torch.get_num_threads() if threaded else 1):
            kernel.no_memory()
        return tuple(results) if several else results[0]

    return result, again


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
