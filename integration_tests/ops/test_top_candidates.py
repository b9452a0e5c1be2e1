"""top_candidates: log softmax, transformers' processors in its beam search's order, ties, and what
is not finite.
"""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from eet_patch.ops.beam_selection import top_candidates, top_candidates_workspace
from eet_patch.ops.selection import seen_tokens
from eet_patch.ops.torch_selection import torch_top_candidates

INF = float("inf")
LENGTH = 6


def logits_of(rows, vocab_size, dtype, device, seed=0):
    """Distinct in every dtype that can tell them apart, and about as large as a model's."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, vocab_size, generator=generator)).to(device, dtype)


def host_scores(logits, processors=(), history=None, row_scores=None):
    """As in transformers' beam search: log softmax, then processors, then the beam's score."""
    scores = LogitsProcessorList(processors)(history, logits.float().log_softmax(-1))
    return scores if row_scores is None else scores + row_scores[:, None]


def assert_best(scores, tokens, expected, count):
    """The largest of `expected` in order, and each with its own token.

    Equal to 2e-5: two ways to sum a softmax of up to 262144 terms differ by more than one bit. The
    tokens may differ from topk's where two scores are that close, so each is looked up.
    """
    rows = expected.shape[0]
    assert scores.shape == tokens.shape == (rows, count)
    assert scores.dtype == torch.float32 and tokens.dtype == torch.int32
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(scores, expected.topk(count).values, **close)
    torch.testing.assert_close(scores, expected.gather(1, tokens.long()), **close)
    assert all(len(set(row)) == count for row in tokens.tolist())


@pytest.mark.sanitize
@pytest.mark.parametrize("vocab_size", [1, 31, 257, 4096, 4097, 50257])
@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_top_candidates(device, dtype, vocab_size, count):
    count = min(count, vocab_size)
    logits = logits_of(3, vocab_size, dtype, device)
    assert_best(*top_candidates(logits, count), host_scores(logits), count)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_largest_vocabulary(device, dtype):
    logits = logits_of(2, 262144, dtype, device)
    assert_best(*top_candidates(logits, 64), host_scores(logits), 64)


@pytest.mark.parametrize("vocab_size", [31, 5003])
@pytest.mark.parametrize("seed", range(5))
def test_distinct_scores_are_in_order(device, vocab_size, seed):
    """Scores so far apart that rounding can't swap them: the very tokens of a sort."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(3)])
    logits = -0.01 * order.float().to(device)
    tokens = top_candidates(logits, 20)[1]
    assert tokens.tolist() == logits.argsort(descending=True)[:, :20].tolist()


def test_row_scores(device, dtype):
    logits = logits_of(4, 257, dtype, device)
    row_scores = torch.tensor([0.0, -7.5, 3.0, -INF], device=device)
    scores, tokens = top_candidates(logits, 8, row_scores)
    assert_best(scores[:3], tokens[:3], host_scores(logits, (), None, row_scores)[:3], 8)
    assert scores[3].tolist() == [-INF] * 8 and tokens[3].tolist() == list(range(8))


@pytest.mark.parametrize("vocab_size", [257, 50257])
@pytest.mark.parametrize("penalty", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("permuted", [False, True])
def test_processors(device, dtype, vocab_size, penalty, permuted):
    rows = 4
    logits = logits_of(rows, vocab_size, dtype, device)
    history = logits.topk(LENGTH + 1).indices
    suppressed, eos = logits[0].topk(20).indices[10:], logits[:2].argmax(-1)
    row_scores = torch.tensor([-1.0, -2.0, 0.0, -30.0], device=device)
    slots = None
    seen = seen_tokens(history, vocab_size)
    if permuted:
        slots = torch.tensor([2, 5, 0, 3], dtype=torch.int32, device=device)
        by_slot = torch.zeros(6, seen.shape[1], dtype=torch.int32, device=device)
        by_slot[slots.long()] = seen
        seen = by_slot
    processors = [
        RepetitionPenaltyLogitsProcessor(penalty),
        SuppressTokensLogitsProcessor(suppressed.tolist(), device=device),
        MinLengthLogitsProcessor(LENGTH + 2, eos.tolist(), device=device),
    ]
    scores, tokens = top_candidates(
        logits,
        12,
        row_scores,
        slots=slots,
        seen=seen,
        lengths=torch.full((rows,), LENGTH, dtype=torch.int32, device=device),
        eos_token_ids=eos,
        suppressed_tokens=suppressed,
        min_len=LENGTH + 2,
        repetition_penalty=penalty,
    )
    assert_best(scores, tokens, host_scores(logits, processors, history, row_scores), 12)
    assert not torch.isin(tokens.long(), torch.cat([suppressed, eos])).any()


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_min_len(device, ahead):
    logits = logits_of(2, 257, torch.float32, device)
    eos = logits.argmax(-1)
    lengths = torch.tensor([LENGTH, LENGTH + 1], dtype=torch.int32, device=device)
    tokens = top_candidates(logits, 1, lengths=lengths, eos_token_ids=eos, min_len=LENGTH + ahead)[
        1
    ]
    is_eos = [token in eos for token in tokens[:, 0]]
    assert is_eos == [ahead <= 1, True]


@pytest.mark.parametrize("vocab_size", [65, 5003, 50257])
def test_the_lowest_of_equal_tokens_come_first(device, dtype, vocab_size):
    logits = torch.zeros(2, vocab_size, dtype=dtype, device=device)
    assert top_candidates(logits, 64)[1].tolist() == [list(range(64))] * 2
    logits[1, [7, vocab_size - 1, 40]] = 1.0
    expected = [7, 40, vocab_size - 1, 0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert top_candidates(logits, 12)[1].tolist() == [list(range(12)), expected]


def test_minus_infinity(device, dtype):
    """Fewer tokens with a score than are asked for; the rest are the lowest of -inf."""
    logits = torch.full((1, 9000), -INF, dtype=dtype, device=device)
    logits[0, [8999, 5]] = torch.tensor([1.0, 0.0], dtype=dtype, device=device)
    scores, tokens = top_candidates(logits, 5)
    assert tokens.tolist() == [[8999, 5, 0, 1, 2]]
    torch.testing.assert_close(scores, host_scores(logits).topk(5).values)


@pytest.mark.sanitize
@pytest.mark.parametrize("vocab_size", [31, 257, 5003, 5008, 32768, 50257])
@pytest.mark.parametrize("count", [1, 10, 64])
def test_many_rows(device, dtype, vocab_size, count):
    """So many that other kernels serve them: as in plain torch, odd rows among them."""
    rows, count = 70, min(count, vocab_size - 4)
    logits = logits_of(rows, vocab_size, dtype, device)
    row_scores = -torch.arange(rows, device=device).float()
    row_scores[:2] = torch.tensor([-INF, 0.0], device=device)
    logits[2] = 0.0
    logits[3] = -INF
    logits[4, 5] = float("nan")
    logits[5, 7] = INF
    logits[6] = -INF
    logits[6, [vocab_size - 1, 3]] = torch.tensor([1.0, 0.5], dtype=dtype, device=device)
    logits[7] += 3e4 if dtype != torch.float16 else 1e4
    logits[8] -= 3e4 if dtype != torch.float16 else 1e4
    suppressed, eos = logits[9].topk(3).indices, logits[10:12].argmax(-1)
    options = {
        "lengths": (torch.arange(rows, device=device) % 9).int(),
        "eos_token_ids": eos,
        "suppressed_tokens": suppressed,
        "min_len": 5,
    }
    scores, tokens = top_candidates(logits, count, row_scores, **options)
    expected, places = torch_top_candidates(logits, count, row_scores, **options)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=3e-5, equal_nan=True)
    alike = tokens == places  # but for scores that rounding may swap
    assert bool((alike | (scores - expected.roll(1, 1)).abs().le(1e-4)
                 | (scores - expected.roll(-1, 1)).abs().le(1e-4)).all())  # fmt: skip
    assert bool(alike[[0, 2, 3, 4, 5, 6]].all())
    seen_once = tokens.sort(1).values
    assert not bool((seen_once[:, 1:] == seen_once[:, :-1]).any())


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_rows_without_a_distribution(device, dtype, value):
    """Their scores are NaN, as of log_softmax, and the other rows' are not."""
    logits = logits_of(3, 9000, dtype, device)
    expected = host_scores(logits)
    if value == -INF:
        logits[1] = value
    else:
        logits[1, 4500] = value
    scores, tokens = top_candidates(logits, 4)
    assert scores[1].isnan().all()
    assert tokens[1].tolist() == [0, 1, 2, 3]
    assert_best(scores[[0, 2]], tokens[[0, 2]], expected[[0, 2]], 4)


def test_logits_far_from_zero(device):
    """The softmax is taken about the largest logit."""
    logits = logits_of(2, 5003, torch.float32, device) + torch.tensor(
        [[3e4], [-3e4]], device=device
    )
    assert_best(*top_candidates(logits, 8), host_scores(logits), 8)


def test_strided_rows(device, dtype):
    buffer = torch.full((4, 1021), 50.0, dtype=dtype, device=device)
    logits = buffer[1:, 3:1000]
    logits.copy_(logits_of(3, 997, dtype, device))
    assert_best(*top_candidates(logits, 8), host_scores(logits), 8)


def test_out_and_workspace_are_used_again(device):
    """Fewer rows and another count from call to call, in one workspace."""
    workspace = top_candidates_workspace(torch.empty(5, 9000, device=device))
    for call, (rows, count) in enumerate([(5, 8), (3, 64), (5, 1), (2, 8)]):
        logits = logits_of(rows, 9000, torch.float16, device, seed=call)
        out = (
            torch.full((rows, count), 7.0, device=device),
            torch.full((rows, count), -1, dtype=torch.int32, device=device),
        )
        assert top_candidates(logits, count, out=out, workspace=workspace) is out
        assert_best(*out, host_scores(logits), count)


@pytest.mark.parametrize("rows", [0, 1024])
def test_numbers_of_rows(device, rows):
    logits = logits_of(rows, 65, torch.float16, device)
    assert_best(*top_candidates(logits, 4), host_scores(logits), 4)


def test_captured(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    logits = logits_of(3, 50257, torch.float16, device)
    workspace = top_candidates_workspace(logits)
    expected = top_candidates(logits, 8)
    out = tuple(torch.zeros_like(tensor) for tensor in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        top_candidates(logits, 8, out=out, workspace=workspace)
    for _ in range(3):
        for tensor in out:
            tensor.zero_()
        graph.replay()
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor"),
        ({"logits": torch.zeros(2, 40).int()}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(40)}, ValueError, "logits must have 2 dimensions"),
        ({"logits": torch.zeros(40, 2).t()}, ValueError, "logits must have contiguous rows"),
        ({"count": 0}, ValueError, r"count must be in \[1, 40\], got 0"),
        ({"count": 41}, ValueError, r"count must be in \[1, 40\], got 41"),
        ({"logits": torch.zeros(2, 99), "count": 65}, ValueError, r"count must be in \[1, 64\]"),
        ({"row_scores": torch.zeros(3)}, ValueError, r"row_scores must have shape \(2,\)"),
        ({"row_scores": torch.zeros(2).half()}, TypeError, "row_scores must have dtype"),
        ({"slots": torch.zeros(2).long()}, TypeError, "slots must have dtype torch.int32"),
        ({"seen": torch.zeros(2, 1).int()}, ValueError, r"seen must have shape \(2, 2\)"),
        ({"seen": torch.zeros(1, 2).int()}, ValueError, "seen must have at least 2 rows"),
        ({"repetition_penalty": 2.0}, ValueError, "seen must be given with repetition_penalty"),
        ({"min_len": 3}, ValueError, "lengths must be given with min_len"),
        ({"min_len": -3}, ValueError, "min_len must be at least 0"),
        ({"lengths": torch.zeros(2).long()}, TypeError, "lengths must have dtype torch.int32"),
        ({"eos_token_ids": torch.zeros(1)}, TypeError, "eos_token_ids must have dtype"),
        ({"suppressed_tokens": torch.zeros(1, 1).long()}, ValueError, "suppressed_tokens must h"),
        (
            {"out": (torch.zeros(2, 5), torch.zeros(2, 4).int())},
            ValueError,
            r"out\[0\] must have shape \(2, 4\)",
        ),
        (
            {"out": (torch.zeros(2, 4), torch.zeros(2, 4).long())},
            TypeError,
            r"out\[1\] must have dtype torch.int32",
        ),
        ({"workspace": torch.zeros(8)}, TypeError, "workspace must have dtype torch.uint8"),
    ],
)
def test_top_candidates_refuses(change, error, message):
    with pytest.raises(error, match=message):
        top_candidates(**({"logits": torch.zeros(2, 40), "count": 4} | change))
