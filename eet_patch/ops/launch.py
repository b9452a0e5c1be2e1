"""Unchecked calls into the extension, and the choice between our products and torch's.

The public ops check their arguments and come here; adapters, which have checked a layer's
parameters as a whole, come here directly. Weights are tuples of one matrix, or of three that stand
side by side in the output (query, key, value). `in_out` says that a weight is (in_features,
out_features), as transformers' Conv1D keeps it, and not (out, in).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eet_patch.ops._extension import (
    ACTIVATION_CODES,
    CPU_PRODUCTS_ARE_OURS,
    EXTENSION,
    NO_MASK,
    extension,
    place,
)

MAX_SKINNY_ROWS = EXTENSION.MAX_SKINNY_ROWS if EXTENSION is not None else 0
# torch's CPU products use bf16 instructions; ours read each weight once and win only where memory
# bandwidth is the limit. Its float16 products are several times slower than ours at any size.
MAX_BFLOAT16_ROWS_ON_CPU = 8

Mask = tuple[int, int, int, int, int, int]
Weights = tuple[Tensor, ...]
Biases = tuple[Tensor | None, ...]


class Norm(NamedTuple):
    """Where a block normalises, "pre", "post" or None, and with what."""

    placement: str | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


NO_NORM = Norm(None, None, None, 0.0)


class KVCache(NamedTuple):
    """Buffers (batch, num_heads, capacity, head_dim) of equal strides that hold past_len tokens so
    far.
    """

    key: Tensor
    value: Tensor
    past_len: int


# Appends (key, value), each (batch, num_heads, q_len, head_dim), or packed, to a cache and returns
# all that is attended to.
UpdateKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def three_addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int, int, int]:
    if len(tensors) == 1:
        return (address(tensors[0]), 0, 0)
    a, b, c = tensors
    return (address(a), address(b), address(c))


def uses_our_products(tensor: Tensor, rows: int) -> bool:
    """Whether products of `rows` rows run in the extension; if not, they go to torch (cuBLASLt,
    MKL, oneDNN).
    """
    if tensor.device.type == "cuda":
        return rows <= MAX_SKINNY_ROWS
    if tensor.dtype == torch.float32:
        return CPU_PRODUCTS_ARE_OURS or rows <= MAX_SKINNY_ROWS
    return tensor.dtype == torch.float16 or rows <= MAX_BFLOAT16_ROWS_ON_CPU


@functools.cache
def is_flash_attention_available() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


@functools.cache
def has_cudnn_attention(device: int) -> bool:
    """Whether torch's cuDNN attention serves sequences of one length: 10 us where flash attention
    takes 14, and 21 where it takes 36 (H100, fp16, 12 heads of 64, 32 sequences of 128 and 8 of
    512). It plans for about 80 ms when a shape comes first.
    """
    if torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cudnn.enabled:
        return False
    sizes = (1, 1, 64, 64)
    probe = torch.zeros(sizes, dtype=torch.float16, device=torch.device("cuda", device))
    try:
        _cudnn_attention(*(probe[0].transpose(0, 1),) * 3, 1, False, 1.0)
    except (RuntimeError, AttributeError):
        return False
    return True


def _cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, batch: int, causal: bool, softmax_scale: float
) -> Tensor:
    """(batch * seq_len, num_heads, head_dim) in and out. The op itself, since which one
    scaled_dot_product_attention takes is a setting of the whole process.
    """
    query, key, value = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (query, key, value))
    context = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, False, 0.0, causal, False, scale=softmax_scale
    )[0]
    return context.transpose(1, 2).flatten(0, 1)


@functools.cache
def has_tensor_cores(device: int) -> bool:
    """Of the kind that torch's flash attention is written for."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def linear(
    hidden_states: Tensor,
    weights: Weights,
    biases: Biases,
    in_out: bool,
    activation: str | None = None,
    residual: Tensor | None = None,
    norm: Norm = NO_NORM,
    out: Tensor | None = None,
) -> Tensor:
    """(rows, in_features), contiguous, to (rows, len(weights) * out_features) by the extension's
    own products.
    """
    rows, in_features = hidden_states.shape
    out_features = weights[0].shape[1 if in_out else 0]
    width = len(weights) * out_features
    out = hidden_states.new_empty(rows, width) if out is None else out
    extension().linear(
        out.data_ptr(),
        hidden_states.data_ptr(),
        three_addresses(weights),
        three_addresses(biases),
        address(residual),
        address(norm.weight),
        address(norm.bias),
        rows,
        in_features,
        out_features,
        in_features,
        width,
        len(weights),
        in_out,
        ACTIVATION_CODES[activation],
        norm.eps,
        *place(hidden_states),
    )
    return out


def torch_linear(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, in_out: bool
) -> Tensor:
    """One product by torch's BLAS; hidden_states is (rows, in_features)."""
    if not in_out:
        return F.linear(hidden_states, weight, bias)
    if bias is None:
        return hidden_states @ weight
    return torch.addmm(bias, hidden_states, weight)


# From here on torch's flash and memory-efficient attention were measured faster than our
# tensor-core kernel (H200, fp16: 69 us against 148 at batch 32, 12 heads, 512 tokens of 64).
MIN_TORCH_ATTENTION_LEN = 256


def _torch_attends(
    query: Tensor,
    key: Tensor,
    mask: Mask,
    causal: bool,
    kv_start: Tensor | None,
    cu_seqlens: Tensor | None,
    mask_tensor: Tensor | None,
) -> bool:
    """Whether torch's attention is faster here and means the same."""
    if query.device.type != "cuda" or query.dtype == torch.float32 or cu_seqlens is not None:
        return False
    if query.shape[2] < MIN_TORCH_ATTENTION_LEN or kv_start is not None:
        return False
    if key.shape[2] == 0 or (mask is not NO_MASK and mask_tensor is None):
        return False
    if mask_tensor is not None and mask_tensor.dtype not in (torch.bool, query.dtype):
        return False
    # torch's causality starts at the first key, and it takes no mask beside it.
    return not causal or (mask_tensor is None and query.shape[2] == key.shape[2])


def _torch_attends_packed(query: Tensor) -> bool:
    """Whether torch's flash attention over packed sequences is there. It was measured faster than
    the extension's kernel for any GPU (H100, fp16, 12 heads of 64: 36 us against 40 for 8 sequences
    of 512, 65 against 83 for 32 of 31 to 512), and slower than its kernel for Hopper.
    """
    if query.device.type != "cuda" or query.dtype == torch.float32 or query.shape[2] % 8:
        return False
    allowed = torch.backends.cuda.flash_sdp_enabled() and is_flash_attention_available()
    return allowed and has_tensor_cores(query.device.index)


PACKED_HEAD_DIMS = (32, 64, 128)
CHOSEN = -1  # the size of the kernel's tiles, by the extension


@functools.cache
def has_packed_attention(device: int) -> bool:
    """Whether the extension was built for this GPU's warpgroup instructions."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return "90a" in extension().build_info()["cuda_archs"].split(";")


def takes_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float
) -> bool:
    """Whether packed tokens (rows, num_heads, head_dim) go to the extension's Hopper kernel."""
    if query.device.type != "cuda" or query.dtype == torch.float32 or causal:
        return False
    if query.shape[2] not in PACKED_HEAD_DIMS or not softmax_scale > 0.0:
        return False
    for tensor in (query, key, value):
        if tensor.data_ptr() % 16 or tensor.stride(0) % 8 or tensor.stride(1) % 8:
            return False
    return has_packed_attention(query.device.index)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    causal: bool,
    softmax_scale: float,
    kv_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    mask_tensor: Tensor | None = None,
    short_cu_seqlens: Tensor | None = None,
    num_alike: int = 0,
    tile: int = CHOSEN,
) -> Tensor:
    """query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, kv_len,
    head_dim), any strides but a contiguous last dimension; returns (batch, q_len, num_heads,
    head_dim), contiguous. Packed (cu_seqlens given): (total_tokens, num_heads, head_dim) in and
    out; with `short_cu_seqlens`, the same as int32, torch's attention may have it, and `num_alike`
    says that the tokens are those of so many sequences of one length.
    """
    if _torch_attends(query, key, mask, causal, kv_start, cu_seqlens, mask_tensor):
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_tensor,
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.transpose(1, 2).contiguous()
    torch_attends = short_cu_seqlens is not None and _torch_attends_packed(query)
    # Ours took less at every shape timed (see packed_attention.cu), those of one length included.
    torch_attends = torch_attends and not takes_packed_attention(
        query, key, value, causal, softmax_scale
    )
    alike = torch_attends and num_alike and torch.backends.cuda.cudnn_sdp_enabled()
    if alike and has_cudnn_attention(query.device.index):
        return _cudnn_attention(query, key, value, num_alike, causal, softmax_scale)
    if torch_attends:
        return torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            short_cu_seqlens,
            short_cu_seqlens,
            max_seqlen,
            max_seqlen,
            0.0,
            causal,
            False,
            scale=softmax_scale,
        )[0]
    if cu_seqlens is None:
        batch, num_heads, q_len, head_dim = query.shape
        num_kv_heads, kv_len = key.shape[1], key.shape[2]
        out = query.new_empty(batch, q_len, num_heads, head_dim)
        out_strides = (q_len * num_heads * head_dim, head_dim, num_heads * head_dim)
        total = 0
        q_strides, k_strides, v_strides = (t.stride()[:3] for t in (query, key, value))
    else:
        total, num_heads, head_dim = query.shape
        num_kv_heads = key.shape[1]
        batch, q_len, kv_len = cu_seqlens.numel() - 1, max_seqlen, max_seqlen
        out = query.new_empty(total, num_heads, head_dim)
        out_strides = (0, head_dim, num_heads * head_dim)
        q_strides, k_strides, v_strides = (
            (0, t.stride(1), t.stride(0)) for t in (query, key, value)
        )
    if out.numel() == 0:
        return out
    module, where = extension(), place(query)
    workspace = None
    nbytes = module.attention_workspace_bytes(
        batch, num_heads, head_dim, q_len, kv_len, where[0], where[1]
    )
    if nbytes:
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=query.device)
    module.attention(
        out.data_ptr(),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out_strides,
        q_strides,
        k_strides,
        v_strides,
        mask,
        address(cu_seqlens),
        address(kv_start),
        batch,
        num_heads,
        num_kv_heads,
        head_dim,
        q_len,
        kv_len,
        causal,
        softmax_scale,
        address(workspace),
        nbytes,
        total,
        tile,
        *where,
    )
    return out


def layernorm(flat: Tensor, norm: Norm, out: Tensor | None = None, chained: bool = False) -> Tensor:
    """`chained`: the kernel ahead on the stream is one of the same call, so that it wrote no
    parameter, and this one may start before it has ended.
    """
    rows, hidden_size = flat.shape
    out = torch.empty_like(flat) if out is None else out
    extension().layernorm(
        out.data_ptr(),
        flat.data_ptr(),
        address(norm.weight),
        address(norm.bias),
        rows,
        hidden_size,
        norm.eps,
        *place(flat),
        chained,
    )
    return out


def bias_residual_layernorm(
    flat: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm,
    out: Tensor,
    chained: bool = False,
) -> Tensor:
    """`chained` as in `layernorm`."""
    rows, hidden_size = flat.shape
    extension().bias_residual_layernorm(
        out.data_ptr(),
        0,
        flat.data_ptr(),
        address(bias),
        address(residual),
        address(norm.weight),
        address(norm.bias),
        rows,
        hidden_size,
        norm.eps,
        *place(flat),
        chained,
    )
    return out
