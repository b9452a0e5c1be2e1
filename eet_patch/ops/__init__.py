"""The op-level API: functions over tensors and the caller's own weights."""

from eet_patch.ops.attention import (
    attention,
    cross_multi_head_attention,
    masked_multi_head_attention,
    multi_head_attention,
)
from eet_patch.ops.beam_selection import top_candidates
from eet_patch.ops.decode import (
    DecodeLayer,
    decode_layers,
    decode_layers_workspace,
    pack_layers,
)
from eet_patch.ops.elementwise import (
    bias_activation,
    bias_residual_layernorm,
    embedding,
    layernorm,
)
from eet_patch.ops.feed_forward import ffn
from eet_patch.ops.products import linear
from eet_patch.ops.selection import (
    seen_tokens,
    select_token,
    select_token_workspace,
)

__all__ = [
    "DecodeLayer",
    "attention",
    "bias_activation",
    "bias_residual_layernorm",
    "cross_multi_head_attention",
    "decode_layers",
    "decode_layers_workspace",
    "embedding",
    "ffn",
    "layernorm",
    "linear",
    "masked_multi_head_attention",
    "multi_head_attention",
    "pack_layers",
    "seen_tokens",
    "select_token",
    "select_token_workspace",
    "top_candidates",
]
