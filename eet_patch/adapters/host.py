"""What the adapters of transformers' layers share: versions, activations, masks, recorded outputs,
left-over arguments.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

from eet_patch.gates import parameter_reason
from eet_patch.ops._extension import MASK_BOOL_KEEP, NO_MASK
from eet_patch.ops.launch import Mask
from eet_patch.ops.masks import attention_mask_form

# Class name in transformers.activations or torch.nn -> ours. FastGELU writes the tanh formula in
# another order.
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}

# Arguments of a layer that say nothing which its computation depends on.
HARMLESS = frozenset(
    {"use_cache", "position_ids", "cache_position", "output_hidden_states", "return_dict"}
    | {"num_items_in_batch", "output_router_logits"}
)
FLASH_PREFIX = "flash_attention"
# Checkpointing runs a layer's forward without gradients, and again with them: both must be the
# host's, dropout or none.
TRAINING = "the layer is in training mode; call model.eval() for inference"
TRAINING_DROPOUT = (
    "dropout is active (the layer is in training mode); call model.eval() for inference"
)


def version_before(version: str) -> bool:
    """Whether the imported transformers is older than `version`."""
    return Version(sys.modules["transformers"].__version__) < Version(version)


def activation_of(module: Any) -> str | None:
    """Our name of an activation module or function, or None if there is no kernel for it."""
    kind = type(module)
    if kind.__module__ in ("transformers.activations", "torch.nn.modules.activation"):
        return ACTIVATIONS.get(kind.__name__)
    return None


def other_arguments_reason(arguments: dict[str, Any], known: frozenset[str]) -> str | None:
    """Why an argument that the adapter doesn't read can't be ignored, or None."""
    for name in arguments.keys() - known - HARMLESS:
        value = arguments[name]
        if value is not None and value is not False:
            return f"the argument {name} is given, which the kernels don't know"
    return None


def recorder() -> Any:
    """The dictionary of outputs being recorded by transformers (from 5.2 on), or None."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return module._active_collector.get() if module is not None else None


def attentions_reason(arguments: dict[str, Any]) -> str | None:
    recorded = recorder()
    if arguments.get("output_attentions") or (
        recorded and ("attentions" in recorded or "cross_attentions" in recorded)
    ):
        return "attention weights were asked for, and the fused kernel doesn't form them"
    return None


def is_recording_hook(hook: Any) -> bool:
    """transformers' own hook that records outputs: it stays on the module, and does nothing unless
    asked.
    """
    code = getattr(hook, "__code__", None)
    return (
        code is not None
        and hook.__module__ == "transformers.utils.output_capturing"
        and code.co_name == "output_capturing_hook"
    )


def attention_implementation(config: Any) -> str:
    """ "sdpa", "eager" or "flash" where the configured attention is transformers' own, else the
    reason.
    """
    name = config._attn_implementation
    if name == "eager" or name is None:
        return "eager"
    if not isinstance(name, str):
        return f"the attention implementation is {name!r}"
    if name == "sdpa":
        functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS  # type: ignore[attr-defined]
        # One look-up: these interfaces are slow mappings, and this stands in every call.
        if functions[name].__module__ == "transformers.integrations.sdpa_attention":
            return "sdpa"
        return "the sdpa attention function was replaced"
    if name.startswith(FLASH_PREFIX):
        return "flash"
    return f"the attention implementation is {name}"


class HostMask(NamedTuple):
    """The kernel's form of a mask, and the tensor whose address it holds."""

    form: Mask
    tensor: Tensor | None

    @property
    def for_torch(self) -> Tensor | None:
        """The tensor, in a form that torch's attention takes."""
        return self.tensor if self.tensor is not None and self.tensor.dim() == 4 else None


NO_HOST_MASK = HostMask(NO_MASK, None)


def host_mask(mask: Any, like: Tensor, sizes: tuple[int, int, int, int]) -> HostMask | str:
    """A host's mask over (batch, heads, q_len, kv_len) in the kernel's form, or why it has none."""
    if mask is None:
        return NO_HOST_MASK
    if type(mask) is not Tensor:
        return f"the attention mask is a {type(mask).__name__}"
    if mask.device != like.device:
        return f"the attention mask is on {mask.device} and the input on {like.device}"
    if mask.dim() == 2:
        # Flash attention's form: 1 = keep, per key.
        if mask.shape != (sizes[0], sizes[3]):
            return f"the attention mask has shape {tuple(mask.shape)}"
        keep = mask if mask.dtype == torch.bool else mask != 0
        form = (keep.data_ptr(), MASK_BOOL_KEEP, keep.stride(0), 0, 0, keep.stride(1))
        return HostMask(form, keep)
    try:
        return HostMask(attention_mask_form(mask, like, sizes), mask)
    except (TypeError, ValueError) as error:
        return str(error)


def linear_reason(
    module: nn.Module, like: Tensor, in_features: int, out_features: int, in_out: bool = False
) -> str | None:
    """Why the parameters of a Linear or Conv1D can't be read in place, or None."""
    parameters = module._parameters
    shape = (in_features, out_features) if in_out else (out_features, in_features)
    reason = parameter_reason(parameters.get("weight"), like, shape)
    if reason is None and parameters.get("bias") is not None:
        reason = parameter_reason(parameters["bias"], like, (out_features,))
    return reason


def norm_reason(module: nn.LayerNorm, like: Tensor, hidden_size: int) -> str | None:
    parameters = module._parameters
    if module.normalized_shape != (hidden_size,):
        return f"a layer norm is over {module.normalized_shape}"
    reason = parameter_reason(parameters.get("weight"), like, (hidden_size,))
    if reason is None and parameters.get("bias") is not None:
        reason = parameter_reason(parameters["bias"], like, (hidden_size,))
    return reason


def dropout_reason(parent: nn.Module, *dropouts: Any) -> str | None:
    """Why a dropout can't be left out: the parent's mode rules some, their own the others."""
    for dropout in dropouts:
        if dropout.p and (parent.training or dropout.training):
            return TRAINING_DROPOUT
    return None
