"""The op-level API: functions over tensors and the caller's own weights."""

from eet_patch.ops.attention import attention
from eet_patch.ops.beam_selection import top_candidates
from eet_patch.ops.beam_state import (
    BeamState,
    beam_state,
    begin_beams,
    ended_sequences,
    goes_on,
)
from eet_patch.ops.beam_step import beam_step
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
from eet_patch.ops.multi_head_attention import (
    cross_multi_head_attention,
    masked_multi_head_attention,
    multi_head_attention,
)
from eet_patch.ops.packing import Packing, gather_rows, pack_tokens
from eet_patch.ops.products import linear
from eet_patch.ops.selection import (
    seen_tokens,
    select_token,
    select_token_workspace,
)

__all__ = [
    "BeamState",
    "DecodeLayer",
    "Packing",
    "attention",
    "beam_state",
    "beam_step",
    "begin_beams",
    "bias_activation",
    "bias_residual_layernorm",
    "cross_multi_head_attention",
    "decode_layers",
    "decode_layers_workspace",
    "embedding",
    "ended_sequences",
    "ffn",
    "gather_rows",
    "goes_on",
    "layernorm",
    "linear",
    "masked_multi_head_attention",
    "multi_head_attention",
    "pack_layers",
    "pack_tokens",
    "seen_tokens",
    "select_token",
    "select_token_workspace",
    "top_candidates",
]
