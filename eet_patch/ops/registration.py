"""Registers the public ops with `torch.library`, as `torch.ops.eet_patch.<name>`.

So `torch.compile(fullgraph=True)`, `torch.export` and fake tensors see an op with a shape and with
declared mutations, and not the addresses beneath it. torch's dispatcher takes 13 us for an op
written in Python, more than a small op itself: a plain call goes past it.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

NAMESPACE = "eet_patch"

P = ParamSpec("P")
R = TypeVar("R")

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    str | None: "str?",
    type(None): "()",
    tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: "(Tensor, Tensor, Tensor, Tensor, Tensor)",
}
# Nothing of what follows may record, fake or transform a plain call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def registered(
    fake: Callable[..., Any], mutates: tuple[str, ...] = (), name: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: register a function over tensors and numbers as an op of the same signature.

    Args:
        fake: takes the same arguments, without those left at their defaults, and returns empty
            tensors of the shapes, dtypes and strides that the op returns.
        mutates: names of the arguments that the op writes to. It returns none of them.
        name: of the op; by default the function's.
    Returns:
        A function that runs the op: directly where nobody watches, else through the dispatcher.
        There no gradient is known: a backward pass through it raises.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        op_name = f"{NAMESPACE}::{name or function.__name__}"
        op = torch.library.custom_op(
            op_name,
            _positional(function, function),
            mutates_args=mutates,
            schema=schema_of(function, mutates),
        )
        op.register_fake(_positional(fake, function))
        overload: Callable[..., R] = op._opoverload
        parameters = inspect.signature(function).parameters.values()
        names = tuple(p.name for p in parameters)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return overload(*_all_arguments(names, defaults, args, kwargs))
            if _dispatch_modes() or _functorch_level() is not None or _tracing_state() is not None:
                return overload(*_all_arguments(names, defaults, args, kwargs))
            gradients = torch.is_grad_enabled()
            if not (_plain(args, gradients) and _plain(kwargs.values(), gradients)):
                return overload(*_all_arguments(names, defaults, args, kwargs))
            return function(*args, **kwargs)

        return call

    return decorate


def _plain(values: Iterable[object], gradients: bool) -> bool:
    """Whether no value is a tensor of a subclass, or one that a gradient is wanted of."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            if gradients and value.requires_grad:  # type: ignore[attr-defined]
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def _all_arguments(
    names: tuple[str, ...],
    defaults: dict[str, Any],
    args: tuple[object, ...],
    kwargs: dict[str, Any],
) -> list[object]:
    """Every argument by position, those left out as their defaults. torch.compile traces this."""
    values, rest = list(args), names[len(args) :]
    for name in rest:
        if name in kwargs:
            values.append(kwargs[name])
        elif name in defaults:
            values.append(defaults[name])
        else:
            raise TypeError(f"missing a required argument: {name!r}")
    if len(values) > len(names):
        raise TypeError(f"got {len(args)} arguments, and there are {len(names)}")
    for name in kwargs:
        if name not in rest:
            raise TypeError(f"got an unexpected or repeated argument {name!r}")
    return values


def _positional(implementation: Callable[..., R], function: Callable[..., Any]) -> Callable[..., R]:
    """`implementation` with all arguments positional, as the dispatcher passes them: it takes no
    tensors that are keywords only, which `function` may have.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    before = len(parameters) - len(names)

    def call(*args: object, **kwargs: object) -> R:
        keywords = dict(zip(names, args[before:], strict=False))
        return implementation(*args[:before], **keywords, **kwargs)

    return call


def schema_of(function: Callable[..., Any], mutates: tuple[str, ...]) -> str:
    """The op's schema without its name, from the annotations. An op that writes to arguments has no
    defaults: until 2.7 torch looks for such an argument where it has left out a default.
    """
    types, parts, aliases = typing.get_type_hints(function), [], 0
    for parameter in inspect.signature(function).parameters.values():
        kind = _SCHEMA_TYPES[types[parameter.name]]
        if parameter.name in mutates:
            kind = kind.replace("Tensor", f"Tensor(a{aliases}!)")
            aliases += 1
        default = ""
        if parameter.default is not parameter.empty and not mutates:
            value = parameter.default
            default = f"={value!r}" if not isinstance(value, str) else f'="{value}"'
        parts.append(f"{kind} {parameter.name}{default}")
    return f"({', '.join(parts)}) -> {_SCHEMA_TYPES[types['return']]}"


def like_first(first: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The fake of an op whose output is like its first argument, and contiguous."""
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def returns_nothing(*args: object, **kwargs: object) -> None:
    """The fake of an op that only writes to its arguments."""
