"""GPT2LMHeadModel of transformers 4.56 to 5.23: its head, over the model's own forward.

The head reads the largest matrix of a small GPT-2 for every token, and torch's product of a few
rows with it reaches a third of the memory bandwidth on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eet_patch.adapters.host import linear_reason
from eet_patch.gates import submodule_reason
from eet_patch.ops import launch
from eet_patch.patching import Adapter

# What the head consumes itself; everything else goes to the model beneath it.
OWN = frozenset({"labels", "logits_to_keep", "return_dict"})


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    module = sys.modules[cls.__module__]
    model_cls, output_cls = module.GPT2Model, module.CausalLMOutputWithCrossAttentions  # type: ignore[attr-defined]

    def weight_of(model: Any, arguments: dict[str, Any]) -> Any:
        head = model._modules.get("lm_head")
        return head._parameters.get("weight") if isinstance(head, nn.Linear) else None

    def plan(model: Any, arguments: dict[str, Any]) -> Any:
        if arguments.get("labels") is not None:
            return "labels are given, and the loss is the original's"
        if getattr(model, "model_parallel", False):
            return "model.parallelize() is in force"
        head, beneath = model._modules["lm_head"], model._modules["transformer"]
        weight = head._parameters["weight"]
        vocab_size, hidden_size = weight.shape
        keep = arguments.get("logits_to_keep", 0)
        if type(keep) is not int and type(keep) is not Tensor:
            return f"logits_to_keep is a {type(keep).__name__}"
        if type(beneath) is not model_cls:
            return f"the model is a {type(beneath).__name__}"
        reason = submodule_reason(head, nn.Linear)
        return reason or linear_reason(head, weight, hidden_size, vocab_size) or (keep,)

    def forward(plan: tuple[Any], model: Any, arguments: dict[str, Any]) -> Any:
        head = model._modules["lm_head"]
        inner = {name: value for name, value in arguments.items() if name not in OWN}
        outputs = model.transformer(**inner, return_dict=True)
        hidden_states = outputs.last_hidden_state
        (keep,) = plan
        kept = hidden_states[:, slice(-keep, None) if type(keep) is int else keep, :]
        logits = head_product(head, kept)
        result = output_cls(
            loss=None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        wanted = arguments.get("return_dict")
        if wanted is None:
            wanted = getattr(model.config, "return_dict", True)
        return result if wanted else result.to_tuple()

    return Adapter(plan, forward, weight_of)


def head_product(head: nn.Linear, kept: Tensor) -> Tensor:
    """The head over (batch, tokens, hidden_size), by the product that is faster for its rows."""
    weight, bias = head.weight, head.bias
    rows = kept.numel() // kept.shape[-1]
    if (
        type(kept) is not Tensor
        or kept.dtype != weight.dtype
        or kept.device != weight.device
        or rows == 0
        or not launch.uses_our_products(kept, rows)
    ):
        return head(kept)
    flat = kept.reshape(rows, kept.shape[-1])
    if not flat.is_contiguous():
        flat = flat.contiguous()
    logits = launch.linear(flat, (weight,), (bias,), False)
    return torch.unflatten(logits, 0, kept.shape[:-1])
