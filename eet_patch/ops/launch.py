"""Unchecked calls into the extension, and the choice between our products and torch's.

The public ops check their arguments and come here; adapters, which have checked a layer's
parameters as a whole, come here directly. Weights are tuples of one matrix, or of three that stand
side by side in the output (query, key, value). `in_out` says that a weight is (in_features,
out_features), as transformers' Conv1D keeps it, and not (out, in).
"""

from __future__ import annotations

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
    NORM_CODES,
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


# Appends (key, value), each (batch, num_heads, q_len, head_dim), to a cache and returns all of its
# keys and values.
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


def linear(
    hidden_states: Tensor,
    weights: Weights,
    biases: Biases,
    in_out: bool,
    activation: str | None = None,
    residual: Tensor | None = None,
    norm: Norm = NO_NORM,
) -> Tensor:
    """(rows, in_features), contiguous, to (rows, len(weights) * out_features) by the extension's
    own products.
    """
    rows, in_features = hidden_states.shape
    out_features = weights[0].shape[1 if in_out else 0]
    width = len(weights) * out_features
    out = hidden_states.new_empty(rows, width)
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
) -> Tensor:
    """query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, kv_len,
    head_dim), any strides but a contiguous last dimension; returns (batch, q_len, num_heads,
    head_dim), contiguous. Packed (cu_seqlens given): (total_tokens, num_heads, head_dim) in and
    out.
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
    if cu_seqlens is None:
        batch, num_heads, q_len, head_dim = query.shape
        num_kv_heads, kv_len = key.shape[1], key.shape[2]
        out = query.new_empty(batch, q_len, num_heads, head_dim)
        out_strides = (q_len * num_heads * head_dim, head_dim, num_heads * head_dim)
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
        *where,
    )
    return out


def attention_block(
    hidden_states: Tensor,
    qkv_weights: Weights,
    qkv_biases: Biases,
    out_weight: Tensor,
    out_bias: Tensor | None,
    in_out: bool,
    num_heads: int,
    softmax_scale: float,
    norm: Norm,
    add_residual: bool = True,
    mask: Mask = NO_MASK,
    causal: bool = False,
    kv_start: Tensor | None = None,
    cache: KVCache | None = None,
    update_kv: UpdateKV | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    mask_tensor: Tensor | None = None,
) -> Tensor:
    """Self-attention with its norm, projections and residual; hidden_states (batch, q_len,
    hidden_size) contiguous, or (total_tokens, hidden_size) when packed. `cache` is written in
    place; `update_kv` hands the new keys and values to somebody else's cache instead. `mask_tensor`
    is the bool or additive tensor behind `mask`, where torch's own attention may have it.
    """
    if cu_seqlens is None:
        batch, q_len, hidden_size = hidden_states.shape
        rows = batch * q_len
    else:
        rows, hidden_size = hidden_states.shape
        batch, q_len = cu_seqlens.numel() - 1, max_seqlen
    if rows == 0:
        return torch.empty_like(hidden_states)
    head_dim = hidden_size // num_heads
    past_len = cache.past_len if cache is not None else 0
    if update_kv is None and uses_our_products(hidden_states, rows):
        return _fused_attention_block(
            hidden_states,
            qkv_weights,
            qkv_biases,
            out_weight,
            out_bias,
            in_out,
            norm,
            add_residual,
            mask,
            kv_start,
            cache,
            cu_seqlens,
            (batch, num_heads, head_dim, q_len, rows),
            causal,
            softmax_scale,
        )
    flat = hidden_states.view(rows, hidden_size)
    if norm.placement == "pre":
        query, key, value = project_qkv(flat, qkv_weights, qkv_biases, in_out, norm)
    else:
        query, key, value = project_qkv(flat, qkv_weights, qkv_biases, in_out, NO_NORM)
    if cu_seqlens is None:
        query, key, value = (
            t.unflatten(0, (batch, q_len)).unflatten(2, (num_heads, head_dim)).transpose(1, 2)
            for t in (query, key, value)
        )
        if cache is not None:
            end = past_len + q_len
            cache.key[:, :, past_len:end].copy_(key)
            cache.value[:, :, past_len:end].copy_(value)
            key, value = cache.key[:, :, :end], cache.value[:, :, :end]
        elif update_kv is not None:
            key, value = update_kv(key, value)
    else:
        query, key, value = (t.unflatten(1, (num_heads, head_dim)) for t in (query, key, value))
    context = attention(
        query,
        key,
        value,
        mask,
        causal,
        softmax_scale,
        kv_start,
        cu_seqlens,
        max_seqlen,
        mask_tensor,
    )
    out = project_out(
        context.view(rows, hidden_size),
        out_weight,
        out_bias,
        in_out,
        norm,
        flat if add_residual else None,
    )
    return out.view(hidden_states.shape)


def project_qkv(
    flat: Tensor, weights: Weights, biases: Biases, in_out: bool, norm: Norm, parts: int = 3
) -> tuple[Tensor, ...]:
    """(rows, in_features) to `parts` views or tensors of (rows, out_features); `norm` is applied to
    the input.
    """
    if uses_our_products(flat, flat.shape[0]):
        return linear(flat, weights, biases, in_out, norm=norm).chunk(parts, dim=1)
    if norm.placement is not None:
        flat = layernorm(flat, norm)
    if len(weights) == 1:
        return torch_linear(flat, weights[0], biases[0], in_out).chunk(parts, dim=1)
    return tuple(torch_linear(flat, w, b, in_out) for w, b in zip(weights, biases, strict=True))


def project_kv(flat: Tensor, weights: Weights, biases: Biases, in_out: bool) -> tuple[Tensor, ...]:
    """An encoder's output to keys and values, by one packed weight or two weights."""
    if len(weights) == 1:
        return project_qkv(flat, weights, biases, in_out, NO_NORM, parts=2)
    return tuple(
        project_qkv(flat, (w,), (b,), in_out, NO_NORM, parts=1)[0]
        for w, b in zip(weights, biases, strict=True)
    )


def project_out(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_out: bool,
    norm: Norm,
    residual: Tensor | None,
) -> Tensor:
    """The last product of a block with its residual, and the norm of a post-norm block."""
    if norm.placement == "post":
        if uses_our_products(flat, flat.shape[0]):
            out = linear(flat, (weight,), (bias,), in_out, residual=residual)
            return layernorm(out, norm, out)
        out = torch_linear(flat, weight, None, in_out)
        return bias_residual_layernorm(out, bias, residual, norm, out)
    if uses_our_products(flat, flat.shape[0]):
        return linear(flat, (weight,), (bias,), in_out, residual=residual)
    out = torch_linear(flat, weight, bias, in_out)
    return out if residual is None else out.add_(residual)


def layernorm(flat: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
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
    )
    return out


def bias_residual_layernorm(
    flat: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Norm, out: Tensor
) -> Tensor:
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
    )
    return out


def _fused_attention_block(
    hidden_states,
    qkv_weights,
    qkv_biases,
    out_weight,
    out_bias,
    in_out,
    norm,
    add_residual,
    mask,
    kv_start,
    cache,
    cu_seqlens,
    sizes,
    causal,
    softmax_scale,
):
    batch, num_heads, head_dim, q_len, rows = sizes
    module, where = extension(), place(hidden_states)
    if cache is not None:
        key, value, past_len = cache
        key_address, value_address, cache_strides = (
            key.data_ptr(),
            value.data_ptr(),
            key.stride()[:3],
        )
    else:
        key_address = value_address = past_len = 0
        cache_strides = (0, 0, 0)
    nbytes = module.attention_block_workspace_bytes(
        batch, num_heads, head_dim, q_len, past_len, rows, cache is not None, where[0], where[1]
    )
    out = torch.empty_like(hidden_states)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=hidden_states.device)
    module.attention_block(
        out.data_ptr(),
        hidden_states.data_ptr(),
        three_addresses(qkv_weights),
        three_addresses(qkv_biases),
        len(qkv_weights),
        out_weight.data_ptr(),
        address(out_bias),
        in_out,
        address(norm.weight),
        address(norm.bias),
        norm.eps,
        NORM_CODES[norm.placement],
        add_residual,
        key_address,
        value_address,
        cache_strides,
        past_len,
        mask,
        address(kv_start),
        address(cu_seqlens),
        batch,
        num_heads,
        head_dim,
        q_len,
        rows,
        causal,
        softmax_scale,
        workspace.data_ptr(),
        nbytes,
        *where,
    )
    return out


def ffn(
    hidden_states: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    in_out: bool,
    activation: str | None,
    norm: Norm,
    add_residual: bool = True,
) -> Tensor:
    """A feed-forward block with its norm and residual; hidden_states (..., hidden_size),
    contiguous.
    """
    hidden_size = hidden_states.shape[-1]
    rows = hidden_states.numel() // hidden_size
    if rows == 0:
        return torch.empty_like(hidden_states)
    intermediate_size = fc1_weight.shape[1 if in_out else 0]
    if intermediate_size == 0:
        flat = hidden_states.view(rows, hidden_size)
        out = flat.clone() if add_residual else torch.zeros_like(flat)
        if fc2_bias is not None:
            out += fc2_bias
        return (layernorm(out, norm) if norm.placement == "post" else out).view_as(hidden_states)
    if not uses_our_products(hidden_states, rows):
        flat = hidden_states.view(rows, hidden_size)
        normed = layernorm(flat, norm) if norm.placement == "pre" else flat
        inner = torch_linear(normed, fc1_weight, fc1_bias, in_out)
        extension().bias_activation(
            inner.data_ptr(),
            inner.data_ptr(),
            0,
            rows,
            inner.shape[1],
            ACTIVATION_CODES[activation],
            *place(inner),
        )
        residual = flat if add_residual else None
        out = project_out(inner, fc2_weight, fc2_bias, in_out, norm, residual)
        return out.view(hidden_states.shape)
    module, where = extension(), place(hidden_states)
    nbytes = module.ffn_workspace_bytes(rows, hidden_size, intermediate_size, where[0], where[1])
    out = torch.empty_like(hidden_states)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=hidden_states.device)
    module.ffn(
        out.data_ptr(),
        hidden_states.data_ptr(),
        fc1_weight.data_ptr(),
        address(fc1_bias),
        fc2_weight.data_ptr(),
        address(fc2_bias),
        in_out,
        address(norm.weight),
        address(norm.bias),
        norm.eps,
        NORM_CODES[norm.placement],
        add_residual,
        rows,
        hidden_size,
        intermediate_size,
        ACTIVATION_CODES[activation],
        workspace.data_ptr(),
        nbytes,
        *where,
    )
    return out


def cross_attention_block(
    hidden_states: Tensor,
    query_weights: Weights,
    query_biases: Biases,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    in_out: bool,
    num_heads: int,
    softmax_scale: float,
    norm: Norm,
    add_residual: bool = True,
    mask: Mask = NO_MASK,
) -> Tensor:
    """Attention of hidden_states (batch, q_len, hidden_size) over given key and value (batch,
    num_heads, kv_len, head_dim), with the query and output projections, the norm and the residual.
    """
    batch, q_len, hidden_size = hidden_states.shape
    rows, head_dim = batch * q_len, key.shape[-1]
    flat = hidden_states.view(rows, hidden_size)
    pre = norm if norm.placement == "pre" else NO_NORM
    (query,) = project_qkv(flat, query_weights, query_biases, in_out, pre, parts=1)
    query = query.view(batch, q_len, num_heads, head_dim).transpose(1, 2)
    context = attention(query, key, value, mask, False, softmax_scale)
    out = project_out(
        context.view(rows, num_heads * head_dim),
        out_weight,
        out_bias,
        in_out,
        norm,
        flat if add_residual else None,
    )
    return out.view(hidden_states.shape)
