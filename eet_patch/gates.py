"""What every replaced call must satisfy, whatever the layer: the reasons that no adapter has to
think of.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from eet_patch.ops._extension import DTYPE_CODES, HAS_CUDA, LAYOUTS_ARE_QUICK, extension

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack


def hidden_states_of(layer: Any, arguments: dict[str, Any]) -> Any:
    return arguments.get("hidden_states")


def call_reason(layer: nn.Module, cls: type, operand: Any, arguments: dict[str, Any]) -> str | None:
    """Why this call of `layer` can't be replaced, or None.

    `operand` is what the kernels read: the layer's input, or the weight of a layer that gets token
    ids.
    """
    if type(layer) is not cls:
        return f"{type(layer).__name__} is a subclass of {cls.__name__}"
    if type(operand) is not Tensor and type(operand) is not nn.Parameter:
        return f"the input is a {type(operand).__name__}, not a torch.Tensor"
    if operand.dtype not in DTYPE_CODES:
        return f"there is no kernel for {operand.dtype}"
    device = operand.device.type
    if device != "cpu" and not (device == "cuda" and HAS_CUDA):
        return f"there is no kernel for the device {device}"
    if not operand.is_contiguous():
        return "the input is not contiguous"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if torch.jit.is_tracing():
        return "the call is being traced"
    if is_transformed():
        return "a torch dispatch mode or function transform is active"
    if torch.is_grad_enabled() and needs_gradients(layer, arguments):
        return "gradients are needed"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "hooks on all modules are registered"
    return None


def is_transformed() -> bool:
    """Whether tensors may be other than what they seem to be."""
    return bool(_dispatch_modes()) or _functorch_level() is not None


def needs_gradients(layer: nn.Module, arguments: dict[str, Any]) -> bool:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return any(parameter.requires_grad for parameter in layer.parameters())


# The forward of each submodule class that fusion skips, as its own module wrote it.
_own_forwards: dict[type, Any] = {}


def submodule_reason(module: Any, cls: type, ignorable_hook: Any = None) -> str | None:
    """Why a submodule may not be skipped by fusion: another type, hooks, or a replaced forward.

    `ignorable_hook(hook)` tells a forward hook that does nothing in this call.
    """
    if type(module) is not cls:
        return f"a submodule is a {type(module).__name__}, not a {cls.__name__}"
    state, forward = module.__dict__, cls.forward  # type: ignore[attr-defined]
    if _own_forwards.get(cls) is not forward:
        if not _is_own(forward, cls):
            return f"the forward of {cls.__name__}, which fusion would skip, was replaced"
        _own_forwards[cls] = forward
    bound = state.get("forward")
    if bound is not None and getattr(bound, "__func__", None) is not forward:
        return f"the forward of a submodule ({cls.__name__}) was replaced"
    for name in _HOOK_DICTS:
        hooks = state[name]
        if hooks:
            if ignorable_hook is not None and name == "_forward_hooks":
                if all(map(ignorable_hook, hooks.values())):
                    continue
            return f"a submodule ({cls.__name__}) has hooks, which fusion would skip"
    return None


def _is_own(forward: Any, cls: type) -> bool:
    """Whether a class's forward, beneath its decorators, was written where the class was."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    function = inspect.unwrap(forward)
    module = getattr(function, "__globals__", {}).get("__name__")
    return module == owner.__module__ and function.__qualname__ == f"{owner.__qualname__}.forward"


class Watch:
    """What a verdict about a layer's modules rested on: it holds for as long as nothing of it
    changed.

    Checking some 40 modules and parameters one by one takes 20 us a call, comparing what was noted
    5.
    """

    __slots__ = (
        "__weakref__",
        "_classes",
        "_like",
        "_noted",
        "_parameters",
        "_parts",
        "layer",
        "notes",
    )

    def __init__(
        self, layer: nn.Module, like: Tensor, forget: Any, notes: Any = None, more: Any = ()
    ) -> None:
        self.layer = weakref.ref(layer, forget)
        self.notes = notes  # what its owner made of the modules; must not lead back to the layer
        self._like = _kind(like)
        noted, classes, parameters = [(d, tuple(d), tuple(d.values())) for d in more], {}, []
        for module in layer.modules():
            state = module.__dict__
            dicts = [state, state["_modules"], state["_parameters"]]
            dicts += [state[name] for name in _HOOK_DICTS]
            noted += [(d, tuple(d), tuple(d.values())) for d in dicts]
            if module is not layer:
                classes[type(module)] = type(module).forward
            parameters += [p for p in state["_parameters"].values() if p is not None]
        self._noted = tuple(noted)
        self._classes = tuple(classes.items())
        self._parameters = tuple((p, *_storage(p)) for p in parameters)
        self._parts: tuple[Any, Any] = (self._parameters, ())

    def first_need(self, tensors: list[Tensor]) -> None:
        """Has `parameters_stay` tell of these apart from the others."""
        ids = {id(tensor) for tensor in tensors}
        self._parts = (
            tuple(noted for noted in self._parameters if id(noted[0]) in ids),
            tuple(noted for noted in self._parameters if id(noted[0]) not in ids),
        )

    def parameters_stay(self, part: int) -> bool:
        """Whether the parameters of a part, 0 or 1, lie where they lay: what a launch on noted
        addresses needs.
        """
        return extension().same_places(self._parts[part], LAYOUTS_ARE_QUICK)

    def holds(self, like: Tensor, parameters_stay: bool = False) -> bool:
        """`parameters_stay`: what its name says was just found to be so."""
        if _kind(like) != self._like:
            return False
        for cls, forward in self._classes:
            if cls.forward is not forward:
                return False
        module = extension()
        if not (parameters_stay and LAYOUTS_ARE_QUICK):
            if not module.same_places(self._parameters, True):
                return False
        return module.same_contents(self._noted)


def _kind(like: Tensor) -> tuple[Any, ...]:
    return like.dtype, like.device, like.shape[-1]


def _storage(parameter: Tensor) -> tuple[Any, ...]:
    layout = extension().layout_of(parameter)
    return parameter.data_ptr(), parameter.dtype, parameter.is_contiguous(), layout


_watches: dict[int, Watch] = {}
# What a watch may keep alive: nothing in which the watched layer could be found again.
_DATA = (bool, int, float, str, tuple, list, set, dict, type(None), torch.dtype, torch.device)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial, type)
_HOLDABLE: tuple[Any, ...] = (*_DATA, *_FUNCTIONS)


def _holdable(layer: nn.Module) -> bool:
    return all(
        isinstance(value, _HOLDABLE) or type(value).__name__.endswith("Config")
        for module in layer.modules()
        for value in module.__dict__.values()
    )


def still_sound(layer: nn.Module, like: Tensor) -> bool:
    """Whether `note_sound` was called for this layer and such an input, and nothing changed."""
    watch = _watches.get(id(layer))
    return watch is not None and watch.layer() is layer and watch.holds(like)


def watch_of(layer: nn.Module, like: Tensor) -> Watch | None:
    """What `note_sound` noted of this layer for such an input; it may no longer hold."""
    watch = _watches.get(id(layer))
    if watch is None or watch.layer() is not layer or watch._like != _kind(like):
        return None
    return watch


def note_sound(layer: nn.Module, like: Tensor, notes: Any = None, more: Any = ()) -> Watch | None:
    """Notes that the modules and parameters of a layer passed all checks for such an input, and
    what its adapter made of them; `more` are dictionaries on which the verdict rests too.
    """
    if not _holdable(layer):
        return None
    number = id(layer)

    def forget(reference: Any) -> None:
        watch = _watches.get(number)
        if watch is not None and watch.layer is reference:
            del _watches[number]

    watch = _watches[number] = Watch(layer, like, forget, notes, more)
    return watch


def forget(layer: nn.Module) -> None:
    """Takes back what `note_sound` noted of a layer."""
    _watches.pop(id(layer), None)


def forget_all() -> None:
    _watches.clear()


def parameter_reason(parameter: Any, like: Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a parameter can't be read in place, or None."""
    if not isinstance(parameter, Tensor):
        return "a parameter is missing"
    if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
        return f"a parameter is a {type(parameter).__name__}"
    if parameter.dtype != like.dtype:
        return f"a parameter is {parameter.dtype} and the input {like.dtype}"
    if parameter.device != like.device:
        return f"a parameter is on {parameter.device} and the input on {like.device}"
    if parameter.shape != shape:
        return f"a parameter has shape {tuple(parameter.shape)}, not {shape}"
    if not parameter.is_contiguous():
        return "a parameter is not contiguous"
    return None
