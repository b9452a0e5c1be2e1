"""beam_step against beam search over whole sequences (eet_patch/testing/beam_reference.py), after
every step.
"""

import pytest
import torch

from eet_patch.ops import beam_state, beam_step, begin_beams, ended_sequences, goes_on, seen_tokens
from eet_patch.testing import beam_reference

INF = float("inf")
VOCAB = 90
EOS = (3, 70, 31)
CONTEXT = 5
FILL = -7
LIMIT = 12


def random_candidates(generator, rows, per_beam, spread=2.0):
    """Log probabilities and tokens of every beam's best, the largest first."""
    scores = -spread * torch.rand(rows, per_beam, generator=generator)
    tokens = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(rows)])
    return scores.sort(dim=1, descending=True).values, tokens[:, :per_beam].int()


class Searching:
    """A search by the op and by the reference at once."""

    def __init__(
        self,
        device,
        batch=3,
        num_beams=4,
        kept=8,
        limit=LIMIT,
        length_penalty=1.0,
        early_stopping=False,
        eos=EOS[:1],
        max_steps=LIMIT + 3,
    ):
        self.batch, self.num_beams, self.kept, self.limit = batch, num_beams, kept, limit
        self.rule = (length_penalty, early_stopping)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.device, self.steps, self.over = device, 0, False
        rows = batch * num_beams

        def filled(value, dtype, *shape):
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        own = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self.state = beam_state(batch, num_beams, kept, max_steps, own)
        begin_beams(self.state, limit, length_penalty, early_stopping)
        self.buffers = {
            "tokens": filled(FILL, torch.int64, limit + 1)[:, :limit],
            "input_ids": filled(FILL, torch.int64),
            "position_ids": filled(CONTEXT - 2, torch.int64),
            "lengths": filled(CONTEXT - 1, torch.int32),
            "key_rows": own // num_beams * num_beams + filled(0, torch.int32, CONTEXT + limit),
            "seen": seen_tokens(filled(0, torch.int64, 1), VOCAB),
        }
        self.reference = beam_reference.beam_sequences(batch, num_beams, limit, FILL, device)

    def candidates(self, generator):
        rows = self.batch if self.steps == 0 else self.batch * self.num_beams
        scores, tokens = random_candidates(generator, rows, self.kept)
        scores, tokens = scores.to(self.device), tokens.to(self.device)
        if self.steps > 0:
            scores = scores + self.reference.running_scores.reshape(-1, 1)
        return scores, tokens

    def launch(self, scores, tokens):
        beam_step(
            self.state,
            scores,
            tokens,
            **self.buffers,
            eos_token_ids=self.eos if len(self.eos) else None,
            stop_when_full=self.rule[1] is True,
        )

    def step(self, scores, tokens):
        self.reference, goes = beam_reference.beam_step(
            self.reference, self.steps, scores, tokens, self.kept, self.eos, *self.rule
        )
        self.launch(scores, tokens)
        self.steps += 1
        self.over = not goes

    def compare(self):
        """The op's state is the reference's, ended scores but for the rounding of a division."""
        state, buffers, truth = self.state, self.buffers, self.reference
        steps, shape = self.steps, (self.batch, self.num_beams)
        assert goes_on(state.outlook[steps - 1].cpu()) != self.over
        assert (state.generated == steps).all()
        assert torch.equal(state.has_ended != 0, truth.has_ended)
        assert torch.equal((state.improvable != 0)[:, None], truth.improvable)
        torch.testing.assert_close(state.ended_scores, truth.ended_scores, equal_nan=True)
        ended, indices = ended_sequences(state, buffers["tokens"], steps, FILL)
        assert ended.dtype == torch.int64 and indices.dtype == torch.int32
        assert torch.equal(ended, truth.ended[:, :, :steps])
        assert torch.equal(indices.long(), truth.ended_indices[:, :, :steps])
        if steps == self.limit:
            return
        torch.testing.assert_close(
            state.running_scores, truth.running_scores, rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(buffers["input_ids"].view(shape), truth.running[:, :, steps - 1])
        assert (buffers["position_ids"] == CONTEXT - 2 + steps).all()
        assert (buffers["lengths"] == CONTEXT - 1 + steps).all()
        went = buffers["key_rows"].view(*shape, -1)[:, :, CONTEXT - 1 : CONTEXT - 1 + steps]
        assert torch.equal(went.long(), truth.running_indices[:, :, :steps])
        sequences = truth.running[:, :, :steps].flatten(0, 1)
        seen = seen_tokens(torch.cat([torch.zeros_like(sequences[:, :1]), sequences], 1), VOCAB)
        assert torch.equal(buffers["seen"], seen)

    def run(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        while not self.over:
            self.step(*self.candidates(generator))
            self.compare()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("batch", "num_beams", "kept"),
    [(1, 1, 2), (3, 4, 8), (2, 7, 14), (5, 3, 12), (1, 32, 64), (2, 16, 64), (70, 2, 4)],
)
@pytest.mark.parametrize("num_eos", [0, 1, 3])
def test_beam_step(device, batch, num_beams, kept, num_eos):
    searching = Searching(device, batch, num_beams, kept, eos=EOS[:num_eos])
    searching.run()
    assert num_eos or searching.steps == LIMIT


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0, 0.6])
def test_ends_of_a_search(device, early_stopping, length_penalty):
    ends = set()
    for seed in range(8):
        searching = Searching(
            device,
            num_beams=2,
            kept=8,
            limit=40,
            max_steps=40,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos=range(0, VOCAB, 8),
        )
        searching.run(seed)
        ends.add(searching.steps)
    assert early_stopping == "never" or min(ends) < 40


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_steps(device, limit):
    Searching(device, limit=limit).run()


def test_more_columns_than_threads(device):
    Searching(device, batch=2, num_beams=3, kept=6, limit=700, max_steps=700, eos=()).run()


@pytest.mark.parametrize("seed", range(4))
def test_equal_scores_keep_their_order(device, seed):
    """Steps of few values: most candidates tie, within a beam and between beams."""
    generator = torch.Generator().manual_seed(seed)
    searching = Searching(device, num_beams=5, kept=15, length_penalty=0.0, eos=(3, 70))
    while not searching.over:
        scores, tokens = searching.candidates(generator)
        searching.step(scores.round(), tokens)
        searching.compare()


@pytest.mark.parametrize("value", [-INF, float("nan")])
@pytest.mark.parametrize("where", ["some", "all", "a batch row"])
def test_what_is_not_finite(device, value, where):
    """As in a sort: -inf last, NaN first. Nothing is read or written out of bounds."""
    generator = torch.Generator().manual_seed(1)
    searching = Searching(device, length_penalty=0.0, early_stopping="never")
    for _ in range(5):
        scores, tokens = searching.candidates(generator)
        if where == "all":
            scores[:] = value
        elif where == "a batch row":
            scores[: len(scores) // 3] = value
        else:
            scores[:, 5:] = value
            scores = scores.sort(dim=1, descending=True).values
        searching.step(scores, tokens)
        searching.compare()
        if searching.over:
            break


@pytest.mark.parametrize("early_stopping", [False, True])
def test_steps_behind_the_end_change_nothing(device, early_stopping):
    generator = torch.Generator().manual_seed(2)
    searching = Searching(
        device, num_beams=2, kept=8, early_stopping=early_stopping, eos=range(0, VOCAB, 3)
    )
    while not searching.over:
        searching.step(*searching.candidates(generator))
    assert searching.steps < LIMIT
    everything = [*searching.state, *searching.buffers.values()]
    before = [tensor.clone() for tensor in everything]
    for _ in range(3):
        searching.launch(*searching.candidates(generator))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    assert not goes_on(searching.state.outlook[searching.steps].cpu())


def test_steps_behind_the_limit_change_nothing(device):
    generator = torch.Generator().manual_seed(3)
    searching = Searching(device, limit=4, max_steps=4, eos=())
    searching.run()
    everything = [*searching.state, *searching.buffers.values()]
    before = [tensor.clone() for tensor in everything]
    searching.launch(*searching.candidates(generator))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


def test_the_last_step_leaves_the_running_beams(device):
    """And says what could have gone on: all that transformers takes its running beams from."""
    generator = torch.Generator().manual_seed(4)
    searching = Searching(device, limit=3, eos=())
    for _ in range(2):
        searching.step(*searching.candidates(generator))
    before = {name: tensor.clone() for name, tensor in searching.buffers.items()}
    running_scores = searching.state.running_scores.clone()
    scores, tokens = searching.candidates(generator)
    searching.step(scores, tokens)
    assert all(torch.equal(before[name], now) for name, now in searching.buffers.items())
    assert torch.equal(searching.state.running_scores, running_scores)
    best = scores.reshape(3, -1).topk(8)
    assert torch.equal(searching.state.top_scores, best.values)
    assert torch.equal(searching.state.top_parents.long(), best.indices // 8)


def test_begun_again(device):
    """A search over the buffers of another one, with another limit."""
    searching = Searching(device, eos=range(0, VOCAB, 5))
    searching.run()
    again = Searching(device, limit=LIMIT - 2, eos=range(0, VOCAB, 5), length_penalty=0.5)
    again.state = searching.state
    begin_beams(again.state, LIMIT - 2, 0.5, False)
    again.run(seed=9)


def test_without_seen(device):
    with_seen, without = Searching(device), Searching(device)
    without.buffers.pop("seen")
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        scores, tokens = with_seen.candidates(generator)
        for searching in (with_seen, without):
            searching.step(scores, tokens)
    assert torch.equal(with_seen.buffers["key_rows"], without.buffers["key_rows"])
    assert torch.equal(with_seen.state.ended_scores, without.state.ended_scores)


def test_no_rows(device):
    tokens = torch.zeros(0, 8, dtype=torch.int32, device=device)
    Searching(device, batch=0).launch(tokens.float(), tokens)


def test_captured(device):
    """One captured launch serves every step but the first, and another search."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    searching = Searching(device, early_stopping=True, eos=range(0, VOCAB, 5))
    generator = torch.Generator().manual_seed(6)
    searching.step(*searching.candidates(generator))
    scores, tokens = searching.candidates(generator)
    state = [tensor.clone() for tensor in (*searching.state, *searching.buffers.values())]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        searching.launch(scores, tokens)
    everything = [*searching.state, *searching.buffers.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, everything, strict=True))
    searching.launch = lambda *_: graph.replay()
    while not searching.over:
        searching.step(scores, tokens)
        searching.compare()
        for old, new in zip((scores, tokens), searching.candidates(generator), strict=True):
            old.copy_(new)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [1.0]}, TypeError, "scores must be a torch.Tensor"),
        ({"scores": torch.zeros(12)}, ValueError, "scores must have 2 dimensions"),
        ({"scores": torch.zeros(5, 8)}, ValueError, "scores must have 3 or 12 rows"),
        ({"scores": torch.zeros(12, 8).half()}, TypeError, "scores must have dtype torch.float32"),
        ({"scores": torch.zeros(12, 65)}, ValueError, "at most 64 of a beam"),
        ({"scores": torch.zeros(3, 7)}, ValueError, "scores must hold 8 candidates"),
        ({"scores": torch.zeros(8, 12).t()}, ValueError, "scores must be contiguous"),
        ({"candidate_tokens": torch.zeros(12, 8)}, TypeError, "candidate_tokens must have dtype"),
        ({"candidate_tokens": torch.zeros(12, 7).int()}, ValueError, r"shape \(12, 8\)"),
        ({"tokens": torch.zeros(12, LIMIT)}, TypeError, "tokens must have dtype torch.int64"),
        ({"tokens": torch.zeros(11, LIMIT).long()}, ValueError, "tokens must have 12 rows"),
        ({"tokens": torch.zeros(LIMIT, 12).long().t()}, ValueError, "must have contiguous rows"),
        ({"input_ids": torch.zeros(11).long()}, ValueError, r"input_ids must have shape \(12,\)"),
        ({"position_ids": torch.zeros(12).int()}, TypeError, "position_ids must have dtype"),
        ({"lengths": torch.zeros(12).long()}, TypeError, "lengths must have dtype torch.int32"),
        ({"key_rows": torch.zeros(12).int()}, ValueError, "key_rows must have shape"),
        ({"seen": torch.zeros(4, 3).int()}, ValueError, r"seen must have shape \(12, 3\)"),
        ({"eos_token_ids": torch.zeros(2).int()}, TypeError, "eos_token_ids must have dtype"),
        ({"eos_token_ids": torch.zeros(2, 1).long()}, ValueError, "eos_token_ids must have 1 dim"),
    ],
)
def test_bad_arguments(change, error, message):
    searching = Searching(torch.device("cpu"))
    scores, tokens = torch.zeros(12, 8), torch.zeros(12, 8, dtype=torch.int32)
    given = {"scores": scores, "candidate_tokens": tokens, **searching.buffers, **change}
    with pytest.raises(error, match=message):
        beam_step(searching.state, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, r"num_beams must be in \[1, 32\], got 0"),
        ({"num_beams": 33, "kept": 64}, r"num_beams must be in \[1, 32\], got 33"),
        ({"kept": 3}, r"kept must be in \[4, 64\], got 3"),
        ({"kept": 65}, r"kept must be in \[4, 64\], got 65"),
    ],
)
def test_bad_sizes(change, message):
    given = {"batch": 2, "num_beams": 4, "kept": 8, "max_steps": 5, "like": torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        beam_state(**given | change)


def test_bad_limits():
    state = beam_state(2, 4, 8, 5, torch.zeros(1))
    for limit in (0, 6):
        with pytest.raises(ValueError, match=rf"limit must be in \[1, 5\], got {limit}"):
            begin_beams(state, limit, 1.0, False)
    with pytest.raises(OverflowError):
        begin_beams(state, 5, 1e6, False)
