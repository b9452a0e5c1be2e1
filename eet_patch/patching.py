"""The engine: swaps methods of host classes for calls into the extension, and puts the very objects
back.

It names no model: `targets.py` lists what is replaced. A target's module is watched by a
    post-import hook, so that
`enable()` may come before or after the host's import. The swapped-in method is a plain function
that ends in the original whenever the call is not one that the kernels support; every such end is
counted with its reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
import wrapt
from packaging.requirements import Requirement

from eet_patch.gates import call_reason, forget_all, hidden_states_of
from eet_patch.ops._extension import EXTENSION, EXTENSION_ERROR


class FallbackError(RuntimeError):
    """Raised under `enable(strict=True)` where a call would have run the original code."""


class PatchWarning(UserWarning):
    """Something that a user of the patch should know: a version left alone, a remedy for a slow
    call.
    """


class Withdrawn(Exception):
    """Raised by an adapter's `forward`, before it has changed anything that lasts: the call runs
    the original, for the reason given.
    """


@dataclass(frozen=True)
class PatchTarget:
    """One method of a host class and what stands in for it.

    Attributes:
        name: what `enable(only=..., exclude=...)` and the report call it.
        module: where the method is defined, as "transformers.models.bert.modeling_bert".
        attribute: "Class.method".
        requires: host versions that the adapter was tested with, as "transformers>=4.56,<5.24".
        adapter: makes the pair (plan, forward) for the class when the patch is installed; see
            `Adapter`.
        level: "layer", or "step" or "loop" for what stands above layers that are replaced
            themselves: its original still runs them, so that `strict` has nothing to raise.
    """

    name: str
    module: str
    attribute: str
    requires: str
    adapter: Callable[[type, Callable[..., Any]], Adapter]
    level: str = "layer"

    @property
    def host(self) -> str:
        return Requirement(self.requires).name


@dataclass(frozen=True)
class Adapter:
    """Two functions over a layer and its call, the call's arguments bound to the names of the
    original's parameters.

    Attributes:
        plan: (layer, arguments) -> the reason, as text, why this call runs the original; or
            whatever `forward` needs.
        forward: (plan, layer, arguments) -> what the original would return.
        operand: (layer, arguments) -> the tensor whose dtype and device the kernels get.
        known: the classes of layers that inherit the method and may run our code too.
        ahead: (layer, arguments) -> what was launched of the call before anything else of it was
            looked at, or None; `forward` gets it as a fourth argument. It is `release()`d at the
            end, and asked to `forget()` what led to it where the call runs the original.
    """

    plan: Callable[[Any, dict[str, Any]], Any]
    forward: Callable[..., Any]
    operand: Callable[[Any, dict[str, Any]], Any] = hidden_states_of
    known: frozenset[type] = frozenset()
    ahead: Callable[[Any, dict[str, Any]], Any] | None = None


@dataclass(frozen=True)
class Options:
    strict: bool = False
    only: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()
    keep_padding: bool = False

    def selects(self, target: PatchTarget) -> bool:
        return target.name not in self.exclude and (self.only is None or target.name in self.only)


@dataclass
class Patch:
    """The state of one target. `active` is read by the installed function on every call."""

    target: PatchTarget
    status: str = "waiting for the import of its module"
    active: bool = False
    strict: bool = False
    cls: type | None = None
    original: Any = None  # the very object that stood in the class, or None where it was inherited
    inherited: bool = False
    installed: Any = None
    host_version: str | None = None
    replaced: Iterator[int] = field(default_factory=itertools.count)
    fallbacks: dict[str, int] = field(default_factory=dict)

    def calls_replaced(self) -> int:
        # itertools.count is the one counter whose increment other threads can't split; its value
        # shows in its repr.
        return int(repr(self.replaced)[6:-1])


_lock = threading.RLock()
_patches: dict[str, Patch] = {}
_order: list[Patch] = []  # as installed; undone in reverse
_hooked_modules: set[str] = set()
_explicit: Options | None = None
_scopes: list[tuple[object, Options]] = []
_warned: set[str] = set()
_at_disable: list[Callable[[], None]] = [forget_all]


def at_disable(callback: Callable[[], None]) -> None:
    """Has `callback` called whenever the patch is no longer in force, to free what it holds."""
    _at_disable.append(callback)


def warn_once(key: str, message: str) -> None:
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(message, PatchWarning, stacklevel=3)


def register_targets(targets: tuple[PatchTarget, ...]) -> None:
    for target in targets:
        _patches[target.name] = Patch(target)


def patches() -> list[Patch]:
    return list(_patches.values())


def reset_counters() -> None:
    with _lock:
        for patch in _patches.values():
            patch.replaced = itertools.count()
            patch.fallbacks = {}


def _options(strict: bool, only: Any, exclude: Any, keep_padding: bool) -> Options:
    def names(value: Any, argument: str) -> frozenset[str]:
        chosen = frozenset((value,) if isinstance(value, str) else value)
        unknown = sorted(map(str, chosen - set(_patches)))
        if unknown:
            raise ValueError(
                f"{argument} must name targets out of {', '.join(_patches)}; "
                f"got {', '.join(unknown)}"
            )
        return chosen

    return Options(
        bool(strict),
        None if only is None else names(only, "only"),
        names(exclude, "exclude"),
        bool(keep_padding),
    )


def enable(strict: bool, only: Any, exclude: Any, keep_padding: bool) -> None:
    global _explicit
    options = _options(strict, only, exclude, keep_padding)
    with _lock:
        _explicit = options
        _refresh()


def disable() -> None:
    global _explicit
    with _lock:
        _explicit = None
        _scopes.clear()
        _refresh()


@contextmanager
def enabled(strict: bool, only: Any, exclude: Any, keep_padding: bool) -> Iterator[None]:
    entry = (object(), _options(strict, only, exclude, keep_padding))
    with _lock:
        _scopes.append(entry)
        _refresh()
    try:
        yield
    finally:
        with _lock:
            if entry in _scopes:  # not if disable() was called inside
                _scopes.remove(entry)
            _refresh()


def keeps_padding() -> bool:
    """Whether `enable(keep_padding=True)` is in force."""
    scopes = _scopes
    options = scopes[-1][1] if scopes else _explicit
    return options is not None and options.keep_padding


def is_enabled() -> bool:
    return _explicit is not None or bool(_scopes)


def _refresh() -> None:
    """Brings every patch in line with the options in force."""
    options = _scopes[-1][1] if _scopes else _explicit
    for patch in reversed(_order.copy()):
        if options is None or not options.selects(patch.target):
            _uninstall(patch)
    if options is None:
        for callback in _at_disable:
            callback()
        return
    if EXTENSION is None:
        for patch in _patches.values():
            patch.status = f"not applied: the extension could not be loaded ({EXTENSION_ERROR})"
        warn_once(
            "extension",
            f"the compiled part of eet_patch could not be loaded ({EXTENSION_ERROR}); "
            "models run unpatched",
        )
        return
    for patch in _patches.values():
        if not options.selects(patch.target):
            if patch.cls is None:
                patch.status = "not selected by enable(only=..., exclude=...)"
            continue
        patch.strict = options.strict
        if not patch.active and patch.cls is None:
            patch.status = "waiting for the import of its module"
        module = patch.target.module
        if module not in _hooked_modules:
            _hooked_modules.add(module)
            # Can't be unregistered; fires at once if the module is there already.
            wrapt.register_post_import_hook(_module_imported, module)
        elif module in sys.modules:
            _module_imported(sys.modules[module])


def _module_imported(module: ModuleType) -> None:
    with _lock:
        options = _scopes[-1][1] if _scopes else _explicit
        if options is None:
            return
        for patch in _patches.values():
            if patch.target.module != module.__name__ or not options.selects(patch.target):
                continue
            # An exception in here would break the user's import.
            try:
                _install(patch, module)
            except Exception as error:
                patch.status = f"not applied: {type(error).__name__}: {error}"
                warn_once(
                    f"install {patch.target.name}",
                    f"eet_patch could not patch {module.__name__} "
                    f"({type(error).__name__}: {error}); it runs unpatched",
                )


def retry_half_imported() -> None:
    """Installs what could not be installed because its module was still being imported."""
    with _lock:
        if is_enabled() and EXTENSION is not None:
            for patch in _patches.values():
                module = sys.modules.get(patch.target.module)
                if module is not None and not patch.active and patch.status.startswith("waiting"):
                    _module_imported(module)


def _install(patch: Patch, module: ModuleType) -> None:
    if patch.active and _stands(patch):
        return
    target = patch.target
    requirement = Requirement(target.requires)
    patch.host_version = _version(requirement.name, module)
    if patch.host_version is None or not requirement.specifier.contains(
        patch.host_version, prereleases=True
    ):
        patch.status = (
            f"not applied: {requirement.name} {patch.host_version} "
            f"is not in {requirement.specifier}"
        )
        warn_once(
            f"version {requirement.name}",
            f"eet_patch supports {target.requires}, and leaves "
            f"{requirement.name} {patch.host_version} alone",
        )
        return
    class_name, _, method = target.attribute.partition(".")
    cls = getattr(module, class_name, None)
    current = inspect.getattr_static(cls, method, None) if cls is not None else None
    if cls is None or current is None:
        initializing = getattr(getattr(module, "__spec__", None), "_initializing", False)
        patch.status = (
            "waiting: its module is only half imported"
            if initializing
            else f"not applied: {target.module} has no {target.attribute}"
        )
        return
    if patch.cls is cls and _stands(patch):
        # Disabled while somebody else's wrapper stood over ours: ours is still beneath it.
        _activate(patch)
        return
    own = vars(cls).get(method)
    patch.cls, patch.original, patch.inherited = cls, own, own is None
    inner = _beneath_init_subclass(current)
    adapter = target.adapter(cls, inner)
    replacement = _make_forward(patch, cls, inner, adapter)
    setattr(cls, method, replacement)
    if inner is not current:
        super(cls, cls).__init_subclass__()  # type: ignore[misc]
    patch.installed = vars(cls)[method]
    _activate(patch)
    if patch not in _order:
        _order.append(patch)


def _activate(patch: Patch) -> None:
    patch.active = True
    patch.status = "applied"


def _uninstall(patch: Patch) -> None:
    patch.active = False
    patch.status = "removed"
    method = patch.target.attribute.partition(".")[2]
    assert patch.cls is not None
    if vars(patch.cls).get(method) is not patch.installed:
        if _stands(patch):
            # Somebody wrapped ours since: it stays, and hands every call to the original.
            patch.status = "inactive beneath another patch of the same method"
            return
    elif patch.inherited:
        delattr(patch.cls, method)
    else:
        setattr(patch.cls, method, patch.original)
    patch.cls = patch.original = patch.installed = None
    _order.remove(patch)


def _stands(patch: Patch) -> bool:
    """Whether calls of the class still reach the installed function, by itself or beneath wrappers.

    Somebody who puts a method back that he found before us, or assigns his own, throws ours out.
    """
    if patch.cls is None:
        return False
    method = patch.target.attribute.partition(".")[2]
    found = [inspect.getattr_static(patch.cls, method, None)]
    seen: set[int] = set()
    while found and len(seen) < 100:
        candidate = found.pop()
        if candidate is patch.installed:
            return True
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        for name in ("__wrapped__", "__func__", "func"):
            found.append(getattr(candidate, name, None))
        for cell in getattr(candidate, "__closure__", None) or ():
            try:
                found.append(cell.cell_contents if callable(cell.cell_contents) else None)
            except ValueError:  # an empty cell
                pass
    return False


def _beneath_init_subclass(method: Any) -> Any:
    """The method as its class wrote it, where the parent's __init_subclass__ has wrapped it.

    transformers >= 5.23 wraps `forward` of its checkpointed layers so, and compares identity: a
    function set over the wrapper would turn gradient checkpointing off. The replacement goes
    beneath, and the parent wraps again.
    """
    code = getattr(method, "__code__", None)
    if code is not None and ".__init_subclass__.<locals>." in code.co_qualname:
        return getattr(method, "__wrapped__", method)
    return method


def _version(host: str, module: ModuleType) -> str | None:
    root = sys.modules.get(module.__name__.partition(".")[0])
    version = getattr(root, "__version__", None)
    if isinstance(version, str):
        return version
    try:
        return importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:
        return None


def _make_forward(
    patch: Patch, cls: type, original: Callable[..., Any], adapter: Adapter
) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)[1:]
    plan_call, run_call, operand_of = adapter.plan, adapter.forward, adapter.operand
    known, launch_ahead = adapter.known, adapter.ahead
    is_compiling = torch.compiler.is_compiling

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # no globals: see _with_globals_of
        # First, and without touching a counter: a graph that is being compiled must see the
        # original alone.
        if is_compiling() or not patch.active:
            return original(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False), **kwargs)
        if launch_ahead is not None:
            ahead = launch_ahead(self, arguments)
            if ahead is not None:
                try:
                    return dispatched(self, args, kwargs, arguments, ahead)
                finally:
                    ahead.release()
        return dispatched(self, args, kwargs, arguments)

    def dispatched(
        self: Any, args: Any, kwargs: Any, arguments: dict[str, Any], ahead: Any = None
    ) -> Any:
        operand = operand_of(self, arguments)
        expected = type(self) if type(self) in known else cls
        plan = call_reason(self, expected, operand, arguments) or plan_call(self, arguments)
        if type(plan) is str:
            if ahead is not None:
                ahead.forget()
            _fell_back(patch, plan)
            return original(self, *args, **kwargs)
        try:
            if ahead is None:
                result = run_call(plan, self, arguments)
            else:
                result = run_call(plan, self, arguments, ahead)
        except torch.OutOfMemoryError as error:
            if getattr(error, "eet_patch_committed", False):
                raise
            reason = None
        except Withdrawn as withdrawn:
            reason = str(withdrawn)
        else:
            next(patch.replaced)
            return result
        # Out of the handlers, whose exception holds what was allocated.
        if ahead is not None:
            ahead.forget()
            ahead.release()
        if reason is None:
            _out_of_memory(patch)
        else:
            _fell_back(patch, reason)
        return original(self, *args, **kwargs)

    return functools.wraps(original)(_with_globals_of(original, forward))


def _with_globals_of(original: Callable[..., Any], wrapper: Any) -> FunctionType:
    """The wrapper among the globals of the original's module: TorchScript reads the source of the
    original, and looks its names up among the globals of the function that it was given.
    """
    found = getattr(inspect.unwrap(original), "__globals__", None)
    if not isinstance(found, dict) or "__builtins__" not in found:
        return wrapper
    return FunctionType(
        wrapper.__code__, found, wrapper.__name__, wrapper.__defaults__, wrapper.__closure__
    )


GRADIENTS_NEEDED = "gradients are needed"
_REMEDY = (
    "this call of {name} needs gradients and ran the original code; for inference wrap it in "
    "`with torch.no_grad():` or `with torch.inference_mode():` (said once)"
)


def _fell_back(patch: Patch, reason: str) -> None:
    with _lock:
        patch.fallbacks[reason] = patch.fallbacks.get(reason, 0) + 1
    if patch.strict and patch.target.level == "layer":
        raise FallbackError(f"{patch.target.name} would run the original code: {reason}")
    if reason == GRADIENTS_NEEDED and not patch.strict:  # else a layer raises
        name = patch.target.attribute
        with _lock:
            first = "gradients" not in _warned
            _warned.add("gradients")
        if first:
            warnings.warn(_REMEDY.format(name=name), PatchWarning, stacklevel=4)


def _out_of_memory(patch: Patch) -> None:
    for callback in _at_disable:
        callback()
    torch.cuda.empty_cache()
    warn_once(
        "out of memory",
        f"{patch.target.attribute} ran out of memory in the kernels; what they held was freed, and "
        "the original code runs this call (said once)",
    )
    _fell_back(patch, "out of memory")
