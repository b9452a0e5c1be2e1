"""embedding: word, position and token type rows, their sum and its norm."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

SHAPES = [(1, 1, 1), (3, 7, 33), (2, 5, 1023), (8, 128, 768)]


def check(**given):
    out = ops.embedding(**given)
    assert_as_accurate_as_torch(out, reference.embedding, **given)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding(device, dtype, shape):
    check(**inputs.embedding_inputs(shape, dtype, device))


@pytest.mark.sanitize
@pytest.mark.parametrize("norm", ["norm", "no norm bias", "no norm"])
@pytest.mark.parametrize("types", ["types", "types of one row", "type 0", "no types"])
@pytest.mark.parametrize("positions", ["positions of one row", "positions", "no positions"])
def test_embedding_options(device, dtype, positions, types, norm):
    given = inputs.embedding_inputs((3, 5, 24), dtype, device)
    if positions == "positions":
        given["position_ids"] = torch.randint(600, (3, 5)).to(device)
    elif positions == "no positions":
        given["position_ids"] = given["position_weight"] = None
    if types == "types of one row":
        given["token_type_ids"] = given["token_type_ids"][:1]
    elif types == "type 0":
        given["token_type_ids"] = None
    elif types == "no types":
        given["token_type_ids"] = given["token_type_weight"] = None
    if norm != "norm":
        given["norm_bias"] = None
    if norm == "no norm":
        given["norm_weight"] = None
    check(**given, word_scale=24**0.5, eps=1e-5)


@pytest.mark.parametrize("hidden_size", [1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 1023, 1024, 4097])
def test_embedding_hidden_sizes(device, dtype, hidden_size):
    check(**inputs.embedding_inputs((2, 3, hidden_size), dtype, device), eps=0.1)


def test_embedding_alone_copies_rows(device, dtype):
    given = inputs.embedding_inputs((3, 7, 65), dtype, device)
    ids, table = given["input_ids"], given["word_weight"]
    assert torch.equal(ops.embedding(ids, table), table[ids])


def test_embedding_reads_the_first_and_the_last_row(device, dtype):
    given = inputs.embedding_inputs((2, 2, 16), dtype, device)
    given["input_ids"] = torch.tensor([[0, 49], [49, 0]], device=device)
    given["position_ids"] = torch.tensor([[599, 0]], device=device)
    given["token_type_ids"] = torch.tensor([[1, 0], [0, 1]], device=device)
    check(**given)


def test_embedding_misaligned(device, dtype):
    check(**inputs.all_misaligned(inputs.embedding_inputs((3, 5, 64), dtype, device)))


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_embedding_of_nothing(device, dtype, shape):
    out = ops.embedding(**inputs.embedding_inputs(shape, dtype, device))
    assert out.shape == shape and out.dtype == dtype


@pytest.mark.slow
def test_embedding_of_a_large_table(device, dtype):
    check(**inputs.embedding_inputs((16, 512, 1024), dtype, device, vocab_size=30522))


@pytest.mark.parametrize("index", [-1, 50, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("at", [0, -1])
def test_embedding_index_out_of_range(name, index, at):
    """On CPU alone: on CUDA the kernel traps, as torch's does, and the process can't go on."""
    given = inputs.embedding_inputs((3, 5, 8), torch.float32, "cpu", num_positions=50)
    before = given[name].clone()
    given[name].view(-1)[at] = index
    with pytest.raises(IndexError, match="embedding: index out of range"):
        ops.embedding(**given)
    given[name] = before
    check(**given)


@pytest.mark.parametrize("table", ["word_weight", "position_weight", "token_type_weight"])
def test_embedding_in_an_empty_table(table):
    given = inputs.embedding_inputs((3, 5, 8), torch.float32, "cpu")
    given[table] = given[table][:0]
    with pytest.raises(IndexError, match="embedding: index out of range"):
        ops.embedding(**given)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "word_weight",
            lambda t: t.tolist(),
            TypeError,
            r"word_weight must be a torch.Tensor, got list",
        ),
        (
            "word_weight",
            torch.Tensor.double,
            TypeError,
            "word_weight must be float32, float16 or bfloat16",
        ),
        (
            "word_weight",
            lambda t: t.to("meta"),
            ValueError,
            "word_weight must be on a CPU or CUDA device",
        ),
        ("word_weight", lambda t: t[0], ValueError, "word_weight must have 2 dimensions"),
        ("word_weight", lambda t: t[:, ::2], ValueError, "word_weight must be contiguous"),
        ("input_ids", lambda t: t.tolist(), TypeError, "input_ids must be a torch.Tensor"),
        ("input_ids", torch.Tensor.int, TypeError, "input_ids must be int64, got torch.int32"),
        ("input_ids", lambda t: t.to("meta"), ValueError, "input_ids must be on cpu"),
        ("input_ids", lambda t: t[0], ValueError, "input_ids must have 2 dimensions"),
        ("input_ids", lambda t: t.t().contiguous().t(), ValueError, "input_ids must be contiguous"),
        (
            "position_ids",
            lambda t: None,
            ValueError,
            "position_ids must be given with position_weight",
        ),
        ("position_ids", torch.Tensor.float, TypeError, "position_ids must be int64"),
        ("position_ids", lambda t: t[0], ValueError, "position_ids must have 2 dimensions"),
        (
            "position_ids",
            lambda t: t[:, :4].clone(),
            ValueError,
            r"position_ids must have shape \(1, 5\)",
        ),
        (
            "position_ids",
            lambda t: t.repeat(2, 1),
            ValueError,
            r"position_ids must have shape \(3, 5\)",
        ),
        (
            "position_weight",
            torch.Tensor.half,
            TypeError,
            "position_weight must have dtype torch.float32",
        ),
        ("position_weight", lambda t: t.to("meta"), ValueError, "position_weight must be on cpu"),
        ("position_weight", lambda t: t[0], ValueError, "position_weight must have 2 dimensions"),
        (
            "position_weight",
            lambda t: t[:, :7].clone(),
            ValueError,
            r"position_weight must have shape \(600, 8\)",
        ),
        (
            "position_weight",
            lambda t: t.t().contiguous().t(),
            ValueError,
            "position_weight must be contiguous",
        ),
        ("token_type_ids", torch.Tensor.int, TypeError, "token_type_ids must be int64"),
        ("token_type_ids", lambda t: t[:2], ValueError, r"token_type_ids must have shape \(3, 5\)"),
        ("token_type_weight", torch.Tensor.half, TypeError, "token_type_weight must have dtype"),
        (
            "token_type_weight",
            lambda t: t[:, 1:].clone(),
            ValueError,
            r"token_type_weight must have shape \(2, 8\)",
        ),
        ("norm_weight", torch.Tensor.half, TypeError, "norm_weight must have dtype"),
        (
            "norm_weight",
            lambda t: t[1:],
            ValueError,
            r"norm_weight must have shape \(8,\), got \(7,\)",
        ),
        ("norm_weight", lambda t: t.repeat(2)[::2], ValueError, "norm_weight must be contiguous"),
        ("norm_bias", lambda t: 1.0, TypeError, "norm_bias must be a torch.Tensor, got float"),
        ("norm_bias", lambda t: t.to("meta"), ValueError, "norm_bias must be on cpu"),
    ],
)
def test_embedding_refuses(name, change, error, message):
    given = inputs.embedding_inputs((3, 5, 8), torch.float32, "cpu")
    given[name] = change(given[name])
    with pytest.raises(error, match=message):
        ops.embedding(**given)
