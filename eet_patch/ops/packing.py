"""Padded batches without their padding: which tokens are real, and rows moved by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.ops._extension import MASK_INT_KEEP, extension, place
from eet_patch.ops.checks import check_contiguous, check_dim, check_operand, check_tensor
from eet_patch.ops.launch import Mask, address
from eet_patch.ops.masks import attention_mask_form
from eet_patch.ops.registration import registered


class Packing(NamedTuple):
    """Where the real tokens of a padded batch stand.

    Attributes:
        tokens: (capacity,) int32, the place in the padded batch of each real token, then -1.
        rows: (batch_size * seq_len,) int32, the inverse: -1 at padding.
        cu_seqlens: (max_batch + 1,) int64, where each row's tokens start; the end behind them.
        short_cu_seqlens: the same as int32.
        summary: (3,) int64: the number of real tokens, the length of the longest row, and 1 if the
            mask says more than which tokens are padding; of use is only what follows a 0 there.
    """

    tokens: Tensor
    rows: Tensor
    cu_seqlens: Tensor
    short_cu_seqlens: Tensor
    summary: Tensor


class Starts(NamedTuple):
    """The part of a `Packing` that a captured graph reads, and that may live longer than a call."""

    cu_seqlens: Tensor
    short_cu_seqlens: Tensor

    @classmethod
    def empty(cls, max_batch: int, device: torch.device) -> Starts:
        starts = torch.empty(max_batch + 1, dtype=torch.int64, device=device)
        return cls(starts, torch.empty_like(starts, dtype=torch.int32))


class Places(NamedTuple):
    """The part of a `Packing` that is of a call alone, and scratch: room for it may serve many."""

    tokens: Tensor
    rows: Tensor
    scratch: Tensor

    @classmethod
    def empty(cls, capacity: int, padded: int, batch: int, device: torch.device) -> Places:
        integers = torch.empty(capacity + padded + 2 * batch, dtype=torch.int32, device=device)
        return cls.within(integers, capacity, padded, batch)

    @classmethod
    def within(cls, integers: Tensor, capacity: int, padded: int, batch: int) -> Places:
        end = capacity + padded + 2 * batch
        return cls(*integers[:end].split((capacity, padded, 2 * batch)))


class Lookup(NamedTuple):
    """What `pack_and_embed` reads of a call and of a model.

    Attributes:
        ids: of tokens, positions and token types (or None), as `embedding` takes them; kept alive.
        position_count: how many of the positions count, a sequence's or all sequences'.
        tables: addresses and sizes, by `lookup_tables`.
    """

    ids: tuple[Tensor, Tensor, Tensor | None]
    position_count: int
    tables: tuple[int | float, ...]


def lookup_tables(
    tables: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[int | float, ...]:
    """Of words, positions and token types, as the extension takes them: good for as long as they
    lie where they lie.
    """
    return (
        *(table.data_ptr() for table in tables),
        *(table.shape[0] for table in tables),
        norm_weight.data_ptr(),
        address(norm_bias),
        tables[0].shape[1],
        eps,
    )


def padding_mask_form(mask: Tensor, sizes: tuple[int, int, int, int], like: Tensor) -> Mask:
    """A mask as `pack_tokens` takes it: (batch, seq_len) bool or int64, or 4-D as attention's."""
    if mask.dim() == 2 and tuple(mask.shape) == (sizes[0], sizes[3]):
        if mask.dtype == torch.int64:
            return (mask.data_ptr(), MASK_INT_KEEP, mask.stride(0), 0, 0, mask.stride(1))
        return attention_mask_form(mask[:, None, None], like, sizes)
    return attention_mask_form(mask, like, sizes)


def launch_pack_tokens(
    mask: Mask,
    batch: int,
    num_heads: int,
    seq_len: int,
    capacity: int,
    max_batch: int,
    like: Tensor,
    starts: Starts | None = None,
    summary: Tensor | None = None,
    ticket: int = 0,
    places: Places | None = None,
) -> Packing:
    """`pack_tokens` without its checks, for a mask over (batch, num_heads, seq_len, seq_len). A
    `summary` (4,) in pinned memory gets the `ticket` last.
    """
    device, padded = like.device, batch * seq_len
    cu_seqlens, short_cu_seqlens = starts or Starts.empty(max_batch, device)
    tokens, rows, scratch = places or Places.empty(capacity, padded, batch, device)
    if summary is None:
        summary = torch.empty(4, dtype=torch.int64, device=device)
    extension().pack_tokens(
        tokens.data_ptr(),
        rows.data_ptr(),
        cu_seqlens.data_ptr(),
        short_cu_seqlens.data_ptr(),
        summary.data_ptr(),
        ticket,
        scratch.data_ptr(),
        mask,
        num_heads if mask[3] else 1,
        seq_len if mask[4] else 1,
        batch,
        seq_len,
        capacity,
        max_batch,
        *place(like),
    )
    return Packing(tokens, rows, cu_seqlens, short_cu_seqlens, summary[:3])


def launch_pack_and_embed(
    out: Tensor,
    lookup: Lookup,
    mask: Mask,
    batch: int,
    seq_len: int,
    max_batch: int,
    starts: Starts,
    places: Places,
    summary: Tensor,
    ticket: int,
) -> None:
    """`pack_tokens` of a mask that is the same for all heads and queries, and `embedding` of the
    real tokens, in one call, without their checks: `out` (capacity, hidden_size) gets zeros behind
    them.
    """
    input_ids, position_ids, token_type_ids = lookup.ids
    extension().pack_and_embed(
        places.tokens.data_ptr(),
        places.rows.data_ptr(),
        places.scratch.data_ptr(),
        starts.cu_seqlens.data_ptr(),
        starts.short_cu_seqlens.data_ptr(),
        summary.data_ptr(),
        ticket,
        mask,
        batch,
        seq_len,
        out.shape[0],
        max_batch,
        out.data_ptr(),
        input_ids.data_ptr(),
        position_ids.data_ptr(),
        lookup.position_count,
        address(token_type_ids),
        1 if token_type_ids is None else token_type_ids.numel(),
        lookup.tables,
        *place(out),
    )


def pack_tokens(
    attention_mask: Tensor, num_heads: int = 1, dtype: torch.dtype = torch.float32
) -> Packing:
    """Find the real tokens of a padded batch: those whose key is visible to any query.

    Args:
        attention_mask: (batch_size, seq_len) bool, or int64 of 1 for real tokens and 0 for padding;
            or (batch_size, 1 or num_heads, 1 or seq_len, seq_len), bool (True = attend) or
            additive, float32 or `dtype`, as `attention` takes it.
        num_heads: of a mask that has heads.
        dtype: which additive masks there are beside float32.
    Returns:
        A `Packing` with room for all tokens.
    Raises:
        ValueError, TypeError: on a shape, dtype or layout other than these.
    Source: Zeng et al. 2022 (ByteTransformer, arXiv:2210.03052).
    """
    return Packing(*_pack_tokens(attention_mask, num_heads, torch.empty(0, dtype=dtype)))


FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake_pack_tokens(attention_mask: Tensor, num_heads: int, like: Tensor) -> FiveTensors:
    batch, padded = attention_mask.shape[0], attention_mask.shape[0] * attention_mask.shape[-1]
    return (
        attention_mask.new_empty(padded, dtype=torch.int32),
        attention_mask.new_empty(padded, dtype=torch.int32),
        attention_mask.new_empty(batch + 1, dtype=torch.int64),
        attention_mask.new_empty(batch + 1, dtype=torch.int32),
        attention_mask.new_empty(3, dtype=torch.int64),
    )


@registered(_fake_pack_tokens, name="pack_tokens")
def _pack_tokens(attention_mask: Tensor, num_heads: int, like: Tensor) -> FiveTensors:
    check_tensor(attention_mask, "attention_mask")
    if attention_mask.dim() not in (2, 4) or not attention_mask.numel():
        raise ValueError(
            "attention_mask must have 2 or 4 dimensions, none of them 0, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    batch, seq_len = attention_mask.shape[0], attention_mask.shape[-1]
    like = like.to(attention_mask.device)
    mask = padding_mask_form(attention_mask, (batch, num_heads, seq_len, seq_len), like)
    packing = launch_pack_tokens(mask, batch, num_heads, seq_len, batch * seq_len, batch, like)
    # Outputs of an op share no memory.
    return packing.tokens.clone(), packing.rows.clone(), *packing[2:4], packing.summary.clone()


def launch_gather_rows(rows: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """`gather_rows` without its checks; `index` may be longer than `out`."""
    row_bytes = out.shape[-1] * out.itemsize
    extension().gather_rows(
        out.data_ptr(),
        rows.data_ptr(),
        index.data_ptr(),
        out.numel() // out.shape[-1],
        row_bytes,
        *place(rows),
    )
    return out


def _fake_gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1])


@registered(_fake_gather_rows)
def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows by index: `out[r] = rows[index[r]]`, zeros where the index is negative.

    Args:
        rows: (num_rows, hidden_size), contiguous; float32, float16 or bfloat16.
        index: (count,) int32, below num_rows.
    Returns:
        (count, hidden_size).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    """
    check_operand(rows, "rows")
    check_dim(rows, 2, "rows")
    check_contiguous(rows, "rows")
    check_tensor(index, "index")
    check_dim(index, 1, "index")
    check_contiguous(index, "index")
    if index.dtype != torch.int32 or index.device != rows.device:
        raise TypeError(
            f"index must be int32 on {rows.device}, got {index.dtype} on {index.device}"
        )
    out = rows.new_empty(index.shape[0], rows.shape[1])
    return launch_gather_rows(rows, index, out) if out.numel() else out
