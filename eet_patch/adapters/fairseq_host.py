"""What the adapters of fairseq's layers share: activations, masks, the parts of a layer and what
may not be fused of them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eet_patch.adapters.host import NO_HOST_MASK, HostMask, linear_reason, norm_reason
from eet_patch.gates import submodule_reason
from eet_patch.ops import blocks
from eet_patch.ops._extension import MASK_BOOL_DROP
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.launch import NO_NORM, Norm
from eet_patch.ops.masks import attention_mask_form

DROPOUT_ACTIVE = (
    "dropout is active (training mode, or --retain-dropout); call model.eval() for inference"
)
# Methods of MultiheadAttention that an instance may have been given anew, and fusion would skip.
_ATTENTION_METHODS = (
    "apply_sparse_mask",
    "_get_input_buffer",
    "_set_input_buffer",
    "_append_prev_key_padding_mask",
)


class Activation(NamedTuple):
    """What stands between the two products of a feed-forward block: the name of our kernel, or the
    host's own function where we have none.
    """

    kernel: str | None
    function: Callable[[Tensor], Tensor] | None = None


class Classes(NamedTuple):
    """The host's classes by the roles that they play in a layer."""

    attention: type
    dropout: type
    residual_connection: Any  # the layer's method, as it stood when the patch was installed


def classes_of(cls: type) -> Classes:
    module = sys.modules[cls.__module__]
    attention, dropout = module.MultiheadAttention, module.FairseqDropout  # type: ignore[attr-defined]
    return Classes(attention, dropout, cls.residual_connection)  # type: ignore[attr-defined]


def operand(layer: Any, arguments: dict[str, Any]) -> Any:
    """The layer's input: (seq_len, batch_size, embed_dim), or contiguous only with the first two
    exchanged, as the host makes it from its embeddings, and as we return it.
    """
    x = arguments.get("x")
    if type(x) is Tensor and x.dim() == 3 and not x.is_contiguous():
        return x.transpose(0, 1)
    return x


def batch_first(x: Tensor) -> Tensor:
    """(batch_size, seq_len, embed_dim), contiguous: a view in all but a model's first layer."""
    return x.transpose(0, 1).contiguous()


def activation_of(function: Any) -> Activation | str:
    """How to compute the host's activation, or why it can't be told what it computes."""
    if function is F.relu:
        return Activation("relu")
    if function is torch.tanh:
        return Activation(None, function)
    name = getattr(function, "__qualname__", type(function).__name__)
    match getattr(function, "__module__", None), name:
        case "fairseq.modules.gelu", "gelu":
            return Activation("gelu")
        case "fairseq.modules.gelu", "gelu_accurate":
            return Activation("gelu_tanh")
        case "fairseq.utils", "relu_squared":
            return Activation(None, function)
        case "fairseq.utils", "get_activation_fn.<locals>.<lambda>":
            return Activation(None)  # "linear": the identity
    return f"there is no kernel for the activation {name}"


def padding_mask(mask: Any, like: Tensor, shape: tuple[int, int]) -> HostMask | str:
    """The host's padding mask, non-zero = padding, in the kernel's form, or why it has none."""
    if mask is None:
        return NO_HOST_MASK
    if type(mask) is not Tensor:
        return f"the padding mask is a {type(mask).__name__}"
    if mask.device != like.device:
        return f"the padding mask is on {mask.device} and the input on {like.device}"
    if mask.shape != shape:
        return f"the padding mask has shape {tuple(mask.shape)}, not {shape}"
    drop = mask if mask.dtype == torch.bool else mask != 0
    return HostMask((drop.data_ptr(), MASK_BOOL_DROP, drop.stride(0), 0, 0, drop.stride(1)), drop)


def additive_mask(
    mask: Any, padding: HostMask, like: Tensor, sizes: tuple[int, int, int, int]
) -> HostMask | str:
    """The host's (q_len, kv_len) additive mask together with the padding mask, as one mask."""
    if type(mask) is not Tensor or mask.dtype not in (torch.float32, like.dtype):
        return f"the attention mask is a {getattr(mask, 'dtype', type(mask).__name__)}"
    if mask.shape != sizes[2:]:
        return f"the attention mask has shape {tuple(mask.shape)}, not {sizes[2:]}"
    wide = mask[None, None]
    if padding.tensor is not None:
        wide = wide.masked_fill(padding.tensor[:, None, None], -torch.inf)
    try:
        return HostMask(attention_mask_form(wide, like, sizes), wide)
    except (TypeError, ValueError) as error:
        return str(error)


# id of a mask -> a weak reference to it, its version, and whether it is causal and nothing else.
_looked_at: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}


def is_future_mask(mask: Tensor) -> bool:
    """Whether an additive mask hides later tokens and nothing else: then it need not be read.

    The decoder passes a corner of one square mask that it keeps. That one is looked at once, which
    waits for the device; masks of which can't be told whether they have changed never are.
    """
    whole = mask if mask._base is None else mask._base
    if mask.is_inference() or not mask.is_floating_point():
        return False
    if whole.dim() != 2 or whole.shape[0] != whole.shape[1]:
        return False
    if mask.storage_offset() != whole.storage_offset() or mask.shape[0] != mask.shape[1]:
        return False
    if mask.stride() != whole.stride():
        return False
    number, version = id(whole), whole._version
    entry = _looked_at.get(number)
    if entry is not None and entry[0]() is whole and entry[1] == version:
        return entry[2]

    def forget(reference: Any) -> None:
        kept = _looked_at.get(number)
        if kept is not None and kept[0] is reference:
            del _looked_at[number]

    expected = torch.full_like(whole, -torch.inf).triu_(1)
    verdict = torch.equal(whole, expected)
    _looked_at[number] = (weakref.ref(whole, forget), version, verdict)
    return verdict


def norm_of(layer: Any, name: str) -> Norm:
    module = layer._modules[name]
    parameters = module._parameters
    placement = "pre" if layer.normalize_before else "post"
    return Norm(placement, parameters["weight"], parameters["bias"], module.eps)


def attention_reason(
    attn: Any, classes: Classes, like: Tensor, key_sizes: tuple[int, int]
) -> str | None:
    """Why a MultiheadAttention over keys and values of these sizes can't be fused, or None."""
    reason = submodule_reason(attn, classes.attention)
    if reason is not None:
        return reason
    for name in _ATTENTION_METHODS:
        if name in attn.__dict__:
            return f"{name} of an attention was replaced"
    if attn.use_xformers:
        return "the attention is one of xformers"
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        return "the attention adds a key of its own (bias_k, add_zero_attn)"
    if attn.onnx_trace:
        return "the layer is being exported (onnx_trace)"
    hidden_size, modules = like.shape[-1], attn._modules
    if attn.embed_dim != hidden_size or attn.num_heads * attn.head_dim != hidden_size:
        return f"heads were pruned, or the input's size {hidden_size} is not {attn.embed_dim}"
    if attn.head_dim > MAX_HEAD_DIM:
        return f"there is no kernel for a head size of {attn.head_dim}"
    sizes = {"q_proj": hidden_size, "k_proj": key_sizes[0], "v_proj": key_sizes[1]}
    for name, in_features in {**sizes, "out_proj": hidden_size}.items():
        reason = submodule_reason(modules[name], nn.Linear) or linear_reason(
            modules[name], like, in_features, hidden_size
        )
        if reason is not None:
            return reason
    return dropouts_reason(classes, modules["dropout_module"])


def dropouts_reason(classes: Classes, *dropouts: Any) -> str | None:
    for dropout in dropouts:
        reason = submodule_reason(dropout, classes.dropout)
        if reason is not None:
            return reason
        if dropout.p > 0 and (dropout.training or dropout.apply_during_inference):
            return DROPOUT_ACTIVE
    return None


def norms_reason(like: Tensor, *norms: Any) -> str | None:
    for norm in norms:
        reason = submodule_reason(norm, nn.LayerNorm) or norm_reason(norm, like, like.shape[-1])
        if reason is not None:
            return reason
    return None


def feed_forward_reason(layer: Any, classes: Classes, like: Tensor) -> str | None:
    """Why what follows the attentions in either kind of layer can't be fused, or None."""
    if (
        "residual_connection" in layer.__dict__
        or type(layer).residual_connection is not classes.residual_connection
    ):
        return "residual_connection was replaced"
    modules, hidden_size = layer._modules, like.shape[-1]
    fc1, fc2 = modules["fc1"], modules["fc2"]
    reason = submodule_reason(fc1, nn.Linear) or submodule_reason(fc2, nn.Linear)
    if reason is not None:
        return reason
    weight = fc1._parameters.get("weight")
    inner = weight.shape[0] if weight is not None and weight.dim() == 2 else 0
    return (
        linear_reason(fc1, like, hidden_size, inner)
        or linear_reason(fc2, like, inner, hidden_size)
        or dropouts_reason(classes, modules["dropout_module"], modules["activation_dropout_module"])
        or norms_reason(like, modules["self_attn_layer_norm"], modules["final_layer_norm"])
    )


def feed_forward(layer: Any, hidden_states: Tensor, activation: Activation) -> Tensor:
    """The feed-forward block of either kind of layer, with its norm and residual."""
    fc1, fc2 = layer._modules["fc1"]._parameters, layer._modules["fc2"]._parameters
    norm = norm_of(layer, "final_layer_norm")
    if activation.function is None:
        return blocks.ffn(
            hidden_states,
            fc1["weight"],
            fc1["bias"],
            fc2["weight"],
            fc2["bias"],
            False,
            activation.kernel,
            norm,
        )
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    pre = norm if norm.placement == "pre" else NO_NORM
    (inner,) = blocks.project_qkv(flat, (fc1["weight"],), (fc1["bias"],), False, pre, parts=1)
    inner = activation.function(inner)
    out = blocks.project_out(inner, fc2["weight"], fc2["bias"], False, norm, flat)
    return out.view(hidden_states.shape)


def qkv_of(attn: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of the three projections of a MultiheadAttention."""
    projections = [attn._modules[n]._parameters for n in ("q_proj", "k_proj", "v_proj")]
    return tuple(p["weight"] for p in projections), tuple(p["bias"] for p in projections)
