"""Unchecked blocks of a layer: self-attention, cross-attention, feed-forward, each with its norm,
projections and residual. Few rows go to one call of the extension; many go through torch's
products, with the extension's kernels between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops._extension import ACTIVATION_CODES, NO_MASK, NORM_CODES, extension, place
from eet_patch.ops.launch import (
    NO_NORM,
    Biases,
    KVCache,
    Mask,
    Norm,
    UpdateKV,
    Weights,
    address,
    attention,
    bias_residual_layernorm,
    layernorm,
    linear,
    three_addresses,
    torch_linear,
    uses_our_products,
)
from eet_patch.ops.stacked import in_one_launch, stacked_linear
from eet_patch.ops.tiles import linear_tiles, tile_for


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
    short_cu_seqlens: Tensor | None = None,
    num_alike: int = 0,
    chained: bool = False,
) -> Tensor:
    """Self-attention with its norm, projections and residual; hidden_states (batch, q_len,
    hidden_size) contiguous, or (total_tokens, hidden_size) when packed. `cache` is written in
    place; `update_kv` hands the new keys and values to somebody else's cache instead, packed ones
    as (total_tokens, num_heads, head_dim). `mask_tensor` is the bool or additive tensor behind
    `mask`, where torch's own attention may have it, and `short_cu_seqlens` is `cu_seqlens` in the
    form that torch's takes, which `num_alike` tells how many sequences of one length there are, if
    they are. `chained`: the kernel ahead on the stream is one of the same call, so that it wrote no
    weights.
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
        query, key, value = project_qkv(
            flat, qkv_weights, qkv_biases, in_out, NO_NORM, chained=chained
        )
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
        if update_kv is not None:
            key, value = update_kv(key, value)
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
        short_cu_seqlens,
        num_alike,
    )
    out = project_out(
        context.reshape(rows, hidden_size),
        out_weight,
        out_bias,
        in_out,
        norm,
        flat if add_residual else None,
        chained=True,
    )
    return out.view(hidden_states.shape)


def project_qkv(
    flat: Tensor,
    weights: Weights,
    biases: Biases,
    in_out: bool,
    norm: Norm,
    parts: int = 3,
    chained: bool = False,
) -> tuple[Tensor, ...]:
    """(rows, in_features) to `parts` views or tensors of (rows, out_features); `norm` is applied to
    the input.
    """
    if uses_our_products(flat, flat.shape[0]):
        return linear(flat, weights, biases, in_out, norm=norm).chunk(parts, dim=1)
    if norm.placement is not None:
        flat = layernorm(flat, norm)
        chained = True
    joined = flat.device.type == "cpu" or len(weights) == 1 or in_one_launch(weights, biases)
    tile = tile_for(flat, weights, biases, in_out, torch_launches=1 if joined else 2)
    if tile is not None:
        product = linear_tiles(flat, weights, biases, tile, chained=chained)
        return product.chunk(parts, dim=1)
    if len(weights) == 1:
        return torch_linear(flat, weights[0], biases[0], in_out).chunk(parts, dim=1)
    stacked = None if in_out else stacked_linear(flat, weights, biases)
    if stacked is not None:
        return stacked
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
    out: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """The last product of a block with its residual, and the norm of a post-norm block, whose
    result goes to `out` if that is given.
    """
    if norm.placement == "post":
        if uses_our_products(flat, flat.shape[0]):
            product = linear(flat, (weight,), (bias,), in_out, residual=residual)
            return layernorm(product, norm, product if out is None else out)
        tile = tile_for(flat, (weight,), (bias,), in_out, residual=residual)
        if tile is not None:
            product = linear_tiles(
                flat, (weight,), (bias,), tile, residual=residual, chained=chained
            )
            return layernorm(product, norm, product if out is None else out, chained=True)
        product = torch_linear(flat, weight, None, in_out)
        out = product if out is None else out
        return bias_residual_layernorm(product, bias, residual, norm, out, chained=True)
    if uses_our_products(flat, flat.shape[0]):
        return linear(flat, (weight,), (bias,), in_out, residual=residual)
    tile = tile_for(flat, (weight,), (bias,), in_out, residual=residual)
    if tile is not None:
        return linear_tiles(flat, (weight,), (bias,), tile, residual=residual, chained=chained)
    out = torch_linear(flat, weight, bias, in_out)
    return out if residual is None else out.add_(residual)


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
    out: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """A feed-forward block with its norm and residual; hidden_states (..., hidden_size),
    contiguous. A post-norm block writes to `out` if that is given. `chained` as in attention_block.
    """
    hidden_size = hidden_states.shape[-1]
    rows = hidden_states.numel() // hidden_size
    if rows == 0:
        return torch.empty_like(hidden_states)
    intermediate_size = fc1_weight.shape[1 if in_out else 0]
    if intermediate_size == 0:
        flat = hidden_states.view(rows, hidden_size)
        inner = flat.clone() if add_residual else torch.zeros_like(flat)
        if fc2_bias is not None:
            inner += fc2_bias
        result = layernorm(inner, norm, out) if norm.placement == "post" else inner
        return result.view_as(hidden_states)
    if not uses_our_products(hidden_states, rows):
        flat = hidden_states.view(rows, hidden_size)
        normed = layernorm(flat, norm) if norm.placement == "pre" else flat
        inner = _first_product(
            normed, fc1_weight, fc1_bias, in_out, activation, chained or normed is not flat
        )
        residual = flat if add_residual else None
        result = project_out(inner, fc2_weight, fc2_bias, in_out, norm, residual, out, chained=True)
        return result.view(hidden_states.shape)
    module, where = extension(), place(hidden_states)
    nbytes = module.ffn_workspace_bytes(rows, hidden_size, intermediate_size, where[0], where[1])
    out = torch.empty_like(hidden_states) if out is None else out
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


def _first_product(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_out: bool,
    activation: str | None,
    chained: bool,
) -> Tensor:
    tile = tile_for(flat, (weight,), (bias,), in_out, activation)
    if tile is not None:
        return linear_tiles(flat, (weight,), (bias,), tile, activation, chained=chained)
    if activation == "relu" and bias is not None and flat.device.type == "cuda" and not in_out:
        return torch._addmm_activation(bias, flat, weight.t())  # cuBLASLt does it behind the sum
    inner = torch_linear(flat, weight, None, in_out)
    extension().bias_activation(
        inner.data_ptr(),
        inner.data_ptr(),
        address(bias),
        inner.shape[0],
        inner.shape[1],
        ACTIVATION_CODES[activation],
        *place(inner),
    )
    return inner


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
