"""Encoders of transformers, whole: all layers of a call over the real tokens alone.

An `EncoderKind` says where a family keeps its layers and what its encoder takes and returns, a
`LayerKind` what one of its layers is; both are all that a family adds.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from eet_patch import patching
from eet_patch.adapters.host import (
    HostMask,
    attentions_reason,
    host_mask,
    is_recording_hook,
    other_arguments_reason,
    recorder,
    version_before,
)
from eet_patch.encoding.encode import encode
from eet_patch.encoding.on_cuda import Ahead
from eet_patch.encoding.packed import Batch, EncoderLayer, head_tensors
from eet_patch.gates import Watch, forget, note_sound, submodule_reason, watch_of
from eet_patch.ops.packing import launch_gather_rows
from eet_patch.patching import Adapter, Withdrawn

KNOWN = frozenset({"hidden_states", "attention_mask", "output_attentions", "return_dict"})
CHANGED = "a module, a parameter or a hook was changed since the last call"


class LayerKind(NamedTuple):
    """One kind of encoder layer.

    Attributes:
        cls: the host's class.
        reason: (layer, an input) -> why its modules and parameters can't be taken in place, or
            None; asked again only when something of them changed.
        implementation: (layer) -> "sdpa", "eager" or "flash", which mean the same over padding, or
            the reason; asked on every call.
        packed: (layer) -> its parameters.
    """

    cls: type
    reason: Callable[[Any, Tensor], str | None]
    implementation: Callable[[Any], str]
    packed: Callable[[Any], EncoderLayer]


class EncoderKind(NamedTuple):
    """One kind of encoder.

    Attributes:
        layer_class: name of the class of its layers, which stands in the encoder's module.
        layer_kind: (that class) -> what such a layer is.
        layers: (encoder) -> its layers, in the order in which they run.
        reason: (encoder) -> why what else it holds can't be passed over, or None.
        before: (encoder, its input) -> the first layer's input, where that is another.
        width: (encoder) -> a parameter (out, in) whose `out` is the hidden size of that.
        states_every: (encoder) -> after how many layers each its forward notes the hidden states,
            before 5.0.
        renamed: arguments of its forward that have other names in some version.
    """

    layer_class: str
    layer_kind: Callable[[type], LayerKind]
    layers: Callable[[Any], tuple[Any, ...]]
    reason: Callable[[Any], str | None] = lambda encoder: None
    before: Callable[[Any, Tensor], Tensor] | None = None
    width: Callable[[Any], Any] | None = None
    states_every: Callable[[Any], int] = lambda encoder: 1
    renamed: dict[str, str] = {}


class Encoder(NamedTuple):
    """An encoder that passed all checks: its layers, what the verdict rests on where that is still
    to be confirmed, and whether it has been noted.
    """

    module: nn.Module
    modules: tuple[Any, ...]
    layers: tuple[EncoderLayer, ...]
    unconfirmed: Watch | None
    noted: bool


class Plan(NamedTuple):
    encoder: Encoder
    like: Tensor  # of the hidden size, dtype and device of the layers
    mask: HostMask


class Encoders:
    """Encoders of one kind: whether they can be taken whole, and running them."""

    def __init__(self, kind: EncoderKind, cls: type, module: Any = None) -> None:
        """`module`: where the class of the layers stands, if not beside that of the encoder."""
        module = module or sys.modules[cls.__module__]
        self.cls = cls
        self.layer = kind.layer_kind(getattr(module, kind.layer_class))
        self._layers, self._rest = kind.layers, kind.reason

    def checked(self, encoder: Any, like: Tensor) -> Encoder | str:
        """On CUDA what was noted of the modules is compared while the device works, by `run`."""
        watch = watch_of(encoder, like)
        modules = self._layers(encoder)
        on_cuda = like.device.type == "cuda"
        if watch is not None and (on_cuda or watch.holds(like)):
            packed = watch.notes
        else:
            reason = self._reason(encoder, modules, like)
            if reason is not None:
                return reason
            packed, watch = tuple(map(self.layer.packed, modules)), None
        if watch is not None and on_cuda:
            return Encoder(encoder, modules, packed, watch, True)
        implementation = self.layer.implementation(modules[0])
        if " " in implementation:
            return implementation
        return Encoder(encoder, modules, packed, None, watch is not None)

    def _reason(self, encoder: Any, modules: tuple[Any, ...], like: Tensor) -> str | None:
        if not modules:
            return "the encoder has no layers"
        reason = self._rest(encoder)
        if reason is not None:
            return reason
        for layer in dict.fromkeys(modules):
            reason = submodule_reason(layer, self.layer.cls, is_recording_hook)
            reason = reason or self.layer.reason(layer, like)
            if reason is not None:
                return reason
        return None

    def run(
        self, encoder: Encoder, batch: Batch, visit: Any = None, ahead: Ahead | None = None
    ) -> Tensor:
        """The last layer's output as a padded batch; raises `Withdrawn` where the original must
        run.
        """
        out = self._run(encoder, batch, visit, ahead)
        if isinstance(out, str) and out == CHANGED:
            forget(encoder.module)
            again = self.checked(encoder.module, batch.like)
            out = again if isinstance(again, str) else self._run(again, batch, visit)
        if isinstance(out, str):
            raise Withdrawn(out)
        return out

    def _run(
        self, encoder: Encoder, batch: Batch, visit: Any, ahead: Ahead | None = None
    ) -> Tensor | str:
        """The output, or why not; CHANGED if what was noted of the modules no longer holds."""
        watch, ready = encoder.unconfirmed, None
        if watch is not None:
            if visit is not None:  # at once: what `visit` is shown can't be taken back
                reason = self._unconfirmed_reason(encoder, watch, batch, False)
                if reason is not None:
                    return reason
            ready = watch.parameters_stay
        keep_padding = patching.keeps_padding()
        owner = encoder.modules[0]
        out = encode(owner, encoder.layers, batch, keep_padding, visit, ready, ahead)
        if out is None:
            return CHANGED
        if watch is not None:
            reason = self._unconfirmed_reason(encoder, watch, batch, True)
            if reason is not None:
                return reason
        if not encoder.noted:
            watch = note_sound(encoder.module, batch.like, encoder.layers)
            if watch is not None:
                watch.first_need(head_tensors(encoder.layers))
        return out

    def _unconfirmed_reason(
        self, encoder: Encoder, watch: Watch, batch: Batch, parameters_stay: bool
    ) -> str | None:
        if not watch.holds(batch.like, parameters_stay):
            return CHANGED
        implementation = self.layer.implementation(encoder.modules[0])
        return implementation if " " in implementation else None


def output_class(cls: type) -> Any:
    """What the host's encoder returns."""
    found = vars(sys.modules[cls.__module__])
    return found.get("BaseModelOutputWithPastAndCrossAttentions") or found["BaseModelOutput"]


def adapter(kind: EncoderKind, cls: type, original: Callable[..., Any]) -> Adapter:
    """For the forward of an encoder that takes hidden states and a mask."""
    encoders = Encoders(kind, cls)
    before_5 = version_before("5.0")
    make_output = output_class(cls)
    known = KNOWN | ({"output_hidden_states"} if before_5 else set())
    parameter = inspect.signature(original).parameters.get("return_dict")
    dict_by_default = parameter.default if parameter is not None else True

    def named(arguments: dict[str, Any]) -> dict[str, Any]:
        if not kind.renamed:
            return arguments
        return {kind.renamed.get(name, name): value for name, value in arguments.items()}

    def operand(encoder: Any, arguments: dict[str, Any]) -> Any:
        return named(arguments).get("hidden_states")

    def plan(encoder: Any, arguments: dict[str, Any]) -> Plan | str:
        arguments = named(arguments)
        if before_5 and not any(given is not None for given in arguments.get("head_mask") or ()):
            arguments = arguments | {"head_mask": None}  # an entry a layer, mostly nothing
        reason = other_arguments_reason(arguments, known) or attentions_reason(arguments)
        if reason is not None:
            return reason
        hidden_states = arguments["hidden_states"]
        if hidden_states.dim() != 3 or not hidden_states.numel():
            return f"the input has shape {tuple(hidden_states.shape)}"
        like = hidden_states if kind.width is None else kind.width(encoder).t()[:0]
        found = encoders.checked(encoder, like)
        if isinstance(found, str):
            return found
        batch_size, seq_len, _ = hidden_states.shape
        sizes = (batch_size, found.layers[0].num_heads, seq_len, seq_len)
        mask = host_mask(arguments.get("attention_mask"), hidden_states, sizes)
        return mask if isinstance(mask, str) else Plan(found, like, mask)

    def forward(plan: Plan, encoder: Any, arguments: dict[str, Any]) -> Any:
        arguments = named(arguments)
        hidden_states = arguments["hidden_states"]
        if kind.before is not None:
            hidden_states = kind.before(encoder, hidden_states)
        padded = hidden_states.view(-1, hidden_states.shape[2])

        def embed(tokens: Tensor, out: Tensor) -> None:
            launch_gather_rows(padded, tokens, out)

        sizes = hidden_states.shape
        batch = Batch(sizes[0], sizes[1], sizes[2], plan.like, plan.mask.form, embed, padded)
        states: list[Tensor] = []
        visit = None
        if before_5 and arguments.get("output_hidden_states"):
            states.append(hidden_states)
            every = kind.states_every(encoder)

            def visit(index: int, before: Tensor, after: Tensor) -> None:
                if (index + 1) % every == 0:
                    states.append(after)

        elif not before_5 and "hidden_states" in (recorder() or ()):
            visit = partial(_record, plan.encoder.modules, hidden_states)
        out = encoders.run(plan.encoder, batch, visit)
        if before_5 and not arguments.get("return_dict", dict_by_default):
            return (out, tuple(states)) if states else (out,)
        if before_5:
            return make_output(last_hidden_state=out, hidden_states=tuple(states) or None)
        return make_output(last_hidden_state=out)

    return Adapter(plan, forward, operand)


def _record(
    modules: tuple[Any, ...], hidden_states: Tensor, index: int, before: Tensor, after: Tensor
) -> None:
    """Hands a layer's input and output to transformers' own hooks, as if the layer had run."""
    given = hidden_states if index == 0 else before
    for hook in modules[index]._forward_hooks.values():
        hook(modules[index], (given,), after)
