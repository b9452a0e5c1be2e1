"""Every op of `eet_patch.ops` in plain PyTorch: the same argument names, any dtype and device.

In float64 these are the truth that tests compare with; in the dtype under test they are the
standard of accuracy. Buffers to write to (`out`, `sum_out`) are left out; caches are written in
place, as by the ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    raise ValueError(f"unknown activation {activation!r}")


def embedding(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    word_scale: float = 1.0,
) -> Tensor:
    x = word_scale * F.embedding(input_ids, word_weight)
    if token_type_weight is not None:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = x + F.embedding(token_type_ids, token_type_weight)
    if position_weight is not None:
        assert position_ids is not None
        x = x + F.embedding(position_ids, position_weight)
    return x if norm_weight is None else layernorm(x, norm_weight, norm_bias, eps)


def layernorm(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], weight, bias, eps)


def residual_sum(hidden_states: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """What `bias_residual_layernorm` normalises and writes to its sum_out."""
    x = hidden_states if bias is None else hidden_states + bias
    return x if residual is None else x + residual


def bias_residual_layernorm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    return layernorm(residual_sum(hidden_states, bias, residual), weight, norm_bias, eps)


def bias_activation(
    hidden_states: Tensor, bias: Tensor | None, activation: str | None = "gelu"
) -> Tensor:
    return activate(hidden_states if bias is None else hidden_states + bias, activation)


def linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_layout: str = "out_in",
    activation: str | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    x = hidden_states
    if norm_weight is not None:
        x = layernorm(x, norm_weight, norm_bias, norm_eps)
    x = F.linear(x, weight if weight_layout == "out_in" else weight.t(), bias)
    x = activate(x, activation)
    return x if residual is None else x + residual


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    kv_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    if cu_seqlens is not None:
        out = query.new_zeros(query.shape)
        starts = cu_seqlens.tolist()
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            one_sequence = (t[None, start:end].transpose(1, 2) for t in (query, key, value))
            out[start:end] = attention(
                *one_sequence, is_causal=is_causal, softmax_scale=softmax_scale
            )[0]
        return out

    (_, num_heads, q_len, head_dim), (_, num_kv_heads, kv_len, _) = query.shape, key.shape
    if num_kv_heads != num_heads:
        key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)
        value = value.repeat_interleave(num_heads // num_kv_heads, dim=1)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = query @ key.transpose(-1, -2) * scale

    visible = torch.ones(scores.shape, dtype=torch.bool, device=query.device)
    keys = torch.arange(kv_len, device=query.device)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        visible &= attention_mask
    elif attention_mask is not None:
        visible &= attention_mask > torch.finfo(attention_mask.dtype).min
        scores = scores + attention_mask
    if key_padding_mask is not None:
        visible &= ~key_padding_mask[:, None, None, :]
    if is_causal:
        queries = torch.arange(q_len, device=query.device)
        visible &= keys <= queries[:, None] + (kv_len - q_len)
    if kv_start is not None:
        visible &= keys >= kv_start[:, None, None, None]

    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~visible, 0.0)  # softmax over no key is NaN
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


def multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
    add_residual: bool = True,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    x = _before(hidden_states, norm, norm_weight, norm_bias, norm_eps)
    query = linear(x, query_weight, query_bias, weight_layout=weight_layout)
    key = linear(x, key_weight, key_bias, weight_layout=weight_layout)
    value = linear(x, value_weight, value_bias, weight_layout=weight_layout)
    if cu_seqlens is None:
        query, key, value = (_split_heads(t, num_heads) for t in (query, key, value))
    else:
        query, key, value = (t.unflatten(-1, (num_heads, -1)) for t in (query, key, value))
    context = attention(
        query,
        key,
        value,
        attention_mask=attention_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        softmax_scale=softmax_scale,
    )
    x = linear(context.flatten(-2), out_weight, out_bias, weight_layout=weight_layout)
    return _after(x, hidden_states, add_residual, norm, norm_weight, norm_bias, norm_eps)


def masked_multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    past_len: int = 0,
    kv_start: Tensor | None = None,
    attention_mask: Tensor | None = None,
    norm: str | None = "pre",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    add_residual: bool = True,
    softmax_scale: float | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    x = _before(hidden_states, norm, norm_weight, norm_bias, norm_eps)
    query = linear(x, query_weight, query_bias, weight_layout=weight_layout)
    key = linear(x, key_weight, key_bias, weight_layout=weight_layout)
    value = linear(x, value_weight, value_bias, weight_layout=weight_layout)
    query, key, value = (_split_heads(t, num_heads) for t in (query, key, value))
    if key_cache is not None and value_cache is not None:
        end = past_len + query.shape[2]
        key_cache[:, :, past_len:end] = key
        value_cache[:, :, past_len:end] = value
        key, value = key_cache[:, :, :end], value_cache[:, :, :end]
    context = attention(
        query,
        key,
        value,
        attention_mask=attention_mask,
        is_causal=True,
        kv_start=kv_start,
        softmax_scale=softmax_scale,
    )
    x = linear(context.flatten(-2), out_weight, out_bias, weight_layout=weight_layout)
    return _after(x, hidden_states, add_residual, norm, norm_weight, norm_bias, norm_eps)


def cross_multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    add_residual: bool = True,
    softmax_scale: float | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    x = _before(hidden_states, norm, norm_weight, norm_bias, norm_eps)
    query = _split_heads(
        linear(x, query_weight, query_bias, weight_layout=weight_layout), num_heads
    )
    context = attention(
        query,
        key,
        value,
        attention_mask=attention_mask,
        key_padding_mask=key_padding_mask,
        softmax_scale=softmax_scale,
    )
    x = linear(context.flatten(-2), out_weight, out_bias, weight_layout=weight_layout)
    return _after(x, hidden_states, add_residual, norm, norm_weight, norm_bias, norm_eps)


def ffn(
    hidden_states: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str | None = "gelu",
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    add_residual: bool = True,
    weight_layout: str = "out_in",
) -> Tensor:
    x = _before(hidden_states, norm, norm_weight, norm_bias, norm_eps)
    x = linear(x, fc1_weight, fc1_bias, activation=activation, weight_layout=weight_layout)
    x = linear(x, fc2_weight, fc2_bias, weight_layout=weight_layout)
    return _after(x, hidden_states, add_residual, norm, norm_weight, norm_bias, norm_eps)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(batch_size, seq_len, hidden_size) to (batch_size, num_heads, seq_len, head_dim)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _before(x: Tensor, norm, norm_weight, norm_bias, norm_eps) -> Tensor:
    return layernorm(x, norm_weight, norm_bias, norm_eps) if norm == "pre" else x


def _after(x: Tensor, residual, add_residual, norm, norm_weight, norm_bias, norm_eps) -> Tensor:
    if add_residual:
        x = x + residual
    return layernorm(x, norm_weight, norm_bias, norm_eps) if norm == "post" else x


def decode_layers(
    hidden_states: Tensor,
    layers: list[dict[str, Tensor]],
    caches: list[tuple[Tensor, Tensor]],
    lengths: Tensor,
    num_heads: int,
    activation: str | None,
    norm_eps: float,
    softmax_scale: float,
    weight_layout: str,
    kv_start: Tensor | None = None,
    cache_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
    post_norm: bool = False,
    cross_caches: list[tuple[Tensor, Tensor]] | None = None,
    cross_rows: Tensor | None = None,
    cross_start: Tensor | None = None,
    cross_lengths: Tensor | None = None,
    cross_weights: Tensor | None = None,
) -> Tensor:
    """The layers one after the other, each row attended by itself; caches and cross_weights are
    written in place.
    """
    rows, hidden_size = hidden_states.shape
    head_dim = hidden_size // num_heads

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if weight_layout == "in_out" else weight, bias)

    def before(x: Tensor, layer: dict[str, Tensor], norm: str) -> Tensor:
        if post_norm:
            return x
        return layernorm(x, layer[f"{norm}_weight"], layer[f"{norm}_bias"], norm_eps)

    def after(x: Tensor, layer: dict[str, Tensor], norm: str) -> Tensor:
        if not post_norm:
            return x
        return layernorm(x, layer[f"{norm}_weight"], layer[f"{norm}_bias"], norm_eps)

    x = hidden_states
    for index, (layer, (key_cache, value_cache)) in enumerate(zip(layers, caches, strict=True)):
        qkv = product(before(x, layer, "norm1"), layer["qkv_weight"], layer["qkv_bias"])
        query, key, value = qkv.view(rows, 3, num_heads, head_dim).unbind(1)
        context = torch.empty_like(x)
        for row in range(rows):
            own = row if cache_rows is None else int(cache_rows[row])
            length = int(lengths[row])
            start = 0 if kv_start is None else int(kv_start[row])
            key_cache[own, :, length] = key[row]
            value_cache[own, :, length] = value[row]
            sources = torch.full((length + 1,), own, device=x.device)
            if key_rows is not None:
                sources[:length] = key_rows[row, :length]
            at = torch.arange(length + 1, device=x.device)
            keys = key_cache[sources, :, at][start:].transpose(0, 1)
            values = value_cache[sources, :, at][start:].transpose(0, 1)
            scores = (query[row][:, None] @ keys.transpose(1, 2)) * softmax_scale
            context[row] = (scores.softmax(-1) @ values).reshape(hidden_size)
        x = after(x + product(context, layer["out_weight"], layer["out_bias"]), layer, "norm1")
        if cross_caches is not None:
            assert cross_rows is not None and cross_lengths is not None
            normed = before(x, layer, "cross_norm")
            query = product(normed, layer["cross_query_weight"], layer["cross_query_bias"])
            query = query.view(rows, num_heads, 1, head_dim)
            context = torch.empty_like(x)
            for row in range(rows):
                start = 0 if cross_start is None else int(cross_start[row])
                seen = slice(start, int(cross_lengths[row]))
                keys, values = (t[int(cross_rows[row]), :, seen] for t in cross_caches[index])
                scores = (query[row] @ keys.transpose(1, 2)) * softmax_scale
                context[row] = (scores.softmax(-1) @ values).reshape(hidden_size)
                if cross_weights is not None and index == len(layers) - 1:
                    own = row if cache_rows is None else int(cache_rows[row])
                    target = cross_weights[own, int(lengths[row])].zero_()
                    target[seen] = scores.softmax(-1).mean(0)[0].to(target.dtype)
            out = product(context, layer["cross_out_weight"], layer["cross_out_bias"])
            x = after(x + out, layer, "cross_norm")
        inner = product(before(x, layer, "norm2"), layer["fc1_weight"], layer["fc1_bias"])
        inner = activate(inner, activation)
        x = after(x + product(inner, layer["fc2_weight"], layer["fc2_bias"]), layer, "norm2")
    return x
