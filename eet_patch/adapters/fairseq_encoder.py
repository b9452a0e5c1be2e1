"""TransformerEncoderLayerBase of fairseq 0.12: the encoder layer of its translation models, BART
and RoBERTa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from eet_patch.adapters.fairseq_host import (
    Activation,
    Classes,
    activation_of,
    attention_reason,
    batch_first,
    classes_of,
    feed_forward,
    feed_forward_reason,
    norm_of,
    operand,
    padding_mask,
    qkv_of,
)
from eet_patch.adapters.host import HostMask
from eet_patch.gates import note_sound, still_sound
from eet_patch.ops import blocks
from eet_patch.patching import Adapter


class Plan(NamedTuple):
    mask: HostMask
    activation: Activation


def modules_reason(layer: Any, classes: Classes, like: Tensor) -> str | None:
    """Why the modules of a layer can't be fused, or None."""
    size = like.shape[-1]
    return attention_reason(
        layer._modules["self_attn"], classes, like, (size, size)
    ) or feed_forward_reason(layer, classes, like)


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    classes = classes_of(cls)

    def plan(layer: Any, arguments: dict[str, Any]) -> Plan | str:
        x = arguments["x"]
        if x.dim() != 3 or x.numel() == 0:
            return f"the input has shape {tuple(x.shape)}"
        if arguments.get("attn_mask") is not None:
            return "an attention mask is given, which the encoder's kernels don't take"
        if layer.return_fc:
            return "return_fc is set, and the fused kernel doesn't keep that result"
        if not still_sound(layer, x):
            reason = modules_reason(layer, classes, x)
            if reason is not None:
                return reason
            note_sound(layer, x)
        activation = activation_of(layer.activation_fn)
        if isinstance(activation, str):
            return activation
        mask = padding_mask(arguments.get("encoder_padding_mask"), x, (x.shape[1], x.shape[0]))
        return mask if isinstance(mask, str) else Plan(mask, activation)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        attn = layer._modules["self_attn"]
        weights, biases = qkv_of(attn)
        out = attn._modules["out_proj"]._parameters
        hidden_states = blocks.attention_block(
            batch_first(arguments["x"]),
            weights,
            biases,
            out["weight"],
            out["bias"],
            False,
            attn.num_heads,
            attn.scaling,
            norm_of(layer, "self_attn_layer_norm"),
            mask=plan.mask.form,
        )
        return feed_forward(layer, hidden_states, plan.activation).transpose(0, 1)

    return Adapter(plan, forward, operand)
