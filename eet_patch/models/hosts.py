"""What the classes over a host library's modules share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from eet_patch.adapters import host

Made = TypeVar("Made")


def from_host(build: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator of a `from_torch`: a module without the parts that are read is a TypeError that
    says so.
    """

    @functools.wraps(build)
    def call(cls: type, module: Any, *args: Any, **kwargs: Any) -> Made:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        try:
            return build(cls, module, *args, **kwargs)
        except AttributeError as error:
            raise TypeError(
                f"{cls.__name__} can't be made from a {type(module).__name__}: {error}"
            ) from error

    return call


def refuse_given(others: dict[str, Any]) -> None:
    """Raises ValueError for an argument of the host that is given and that we don't have."""
    for name, value in others.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name} is not supported here, got {value!r:.80}; the patched model takes it"
            )


class HostReference:
    """A host's module that is no submodule: its parameters are registered as ours already."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def apply_to_buffers(self, function: Callable[[Any], Any]) -> None:
        """What `.to()` and its like do, for the buffers alone: parameters are changed in place."""
        if self.module is None:
            return
        for part in self.module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = function(buffer)


def kernel_of(activation: Any) -> str:
    """Our name of transformers' activation; ValueError without a kernel."""
    name = host.activation_of(activation)
    if name is None:
        raise ValueError(f"there is no kernel for the activation {type(activation).__name__}")
    return name
