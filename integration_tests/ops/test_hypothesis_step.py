"""hypothesis_step: whole searches over made-up scores, against a search in plain Python that moves
its hypotheses about, and against torch's version bit by bit.
"""

import math

import pytest
import torch

from eet_patch.ops.hypotheses import Hypotheses, hypothesis_step

EOS, VOCAB = 2, 40


def new_state(device, batch, beams, capacity, places=None):
    rows = batch * beams

    def zeros(dtype, *shape):
        return torch.zeros(shape, dtype=dtype, device=device)

    i32, i64, f32, u8 = torch.int32, torch.int64, torch.float32, torch.uint8
    state = Hypotheses(
        running_scores=torch.full((rows,), -math.inf, device=device),
        ignored=zeros(u8, rows),
        places=torch.arange(batch, dtype=i32, device=device),
        slots=torch.arange(rows, dtype=i32, device=device),
        lengths=zeros(i32, rows),
        input_ids=zeros(i64, rows),
        position_ids=zeros(i64, rows),
        key_rows=zeros(i32, rows, capacity),
        tokens=zeros(i64, rows, capacity),
        scores=zeros(f32, rows, capacity),
        ended=zeros(i32, batch),
        is_done=zeros(u8, batch),
        ended_scores=zeros(f32, batch, beams),
        ended_lengths=zeros(i32, batch, beams),
        ended_rows=zeros(i32, batch, beams, capacity),
    )
    state.running_scores[::beams] = 0.0
    return state


def scores_of(prefix, seed, end_bias):
    """Log probabilities of what follows a hypothesis, which depend on all of it."""
    generator = torch.Generator().manual_seed(hash((seed, *prefix)) % (2**31))
    logits = torch.randn(VOCAB, generator=generator)
    logits[EOS] += end_bias
    return logits.log_softmax(0)


def plain_search(sentence, beams, steps, seed, end_bias):
    """The search of one sentence, with lists: what ended, as (score, tokens, sums), in order."""
    running = [(0.0, [], [])] + [(-math.inf, [], [])] * (beams - 1)
    ignored, ended = [False] * beams, []
    for _ in range(steps):
        found = []
        for beam, (score, tokens, sums) in enumerate(running):
            values = torch.tensor(score) + scores_of((sentence, *tokens), seed, end_bias)
            best, at = values.topk(2 * beams)
            for value, token in zip(best.tolist(), at.tolist(), strict=True):
                found.append((value, beam, token, tokens, sums))
        found = sorted(found, key=lambda f: -f[0])[: 2 * beams]
        going, ending = [], []
        for place, (value, _, token, tokens, sums) in enumerate(found):
            ends = token == EOS and value > -math.inf
            hidden = place < beams and ignored[place]
            entry = (value, [*tokens, token], [*sums, value])
            if ends and not hidden and place < beams and len(ended) < beams:
                ended.append(entry)
            (ending if hidden or ends else going).append(entry)
        if len(ended) == beams:
            break
        running = (going + ending)[:beams]
        ignored = [place >= len(going) for place in range(beams)]
    return ended


def candidates(state, sentences, beams, seed, end_bias):
    """The best continuations of every row, from what the state says of its past."""
    step = int(state.lengths[0])
    best, at = [], []
    for row in range(len(sentences) * beams):
        path = [*state.key_rows[row, :step].tolist(), int(state.slots[row])]
        tokens = [int(state.tokens[slot, p + 1]) for p, slot in enumerate(path[1:])]
        key = (sentences[row // beams], *tokens)
        values = state.running_scores[row].cpu() + scores_of(key, seed, end_bias)
        value, token = values.topk(2 * beams)
        best.append(value)
        at.append(token.int())
    device = state.tokens.device
    return torch.stack(best).to(device), torch.stack(at).to(device)


def ended_of(state, place):
    """What ended of a sentence, as of `plain_search`."""
    found = []
    for index in range(int(state.ended[place])):
        length = int(state.ended_lengths[place, index])
        path = state.ended_rows[place, index, :length].tolist()
        tokens = [int(state.tokens[path[p], p]) for p in range(1, length)] + [EOS]
        sums = [float(state.scores[path[p], p]) for p in range(1, length)]
        score = float(state.ended_scores[place, index])
        found.append((score, tokens, [*sums, score]))
    return found


@pytest.mark.sanitize
@pytest.mark.parametrize("beams", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("end_bias", [0.0, 1.5, 4.0])
def test_hypothesis_step(device, beams, end_bias):
    batch, steps, seed = 3, 12, 7
    state = new_state(device, batch, beams, steps + 2)
    for step in range(steps):
        values, tokens = candidates(state, range(batch), beams, seed, end_bias)
        before = state.is_done.clone()
        lengths = state.lengths.clone()
        hypothesis_step(state, values, tokens, EOS)
        moved = (state.lengths - lengths).view(batch, beams)
        assert (moved == (before == 0)[:, None]).all()  # sentences that are done stay
        state.lengths.fill_(step + 1)
    for place in range(batch):
        own, out = plain_search(place, beams, steps, seed, end_bias), ended_of(state, place)
        assert [tokens for _, tokens, _ in out] == [tokens for _, tokens, _ in own]
        for mine, theirs in zip(out, own, strict=True):
            assert mine[2] == pytest.approx(theirs[2], abs=1e-5)
        assert bool(state.is_done[place]) == (len(own) == beams)
    if end_bias > 1:
        assert state.ended.sum() > 0


@pytest.mark.sanitize
def test_a_batch_that_shrinks(device):
    """Rows that go on elsewhere keep their slots and places."""
    batch, beams, steps, seed, end_bias = 4, 3, 10, 3, 2.0
    state = new_state(device, batch, beams, steps + 2)
    sentences = list(range(batch))
    for step in range(steps):
        values, tokens = candidates(state, sentences, beams, seed, end_bias)
        hypothesis_step(state, values, tokens, EOS)
        state.lengths.fill_(step + 1)
        kept = [s for s, place in enumerate(sentences) if not state.is_done[place]]
        sentences = [sentences[s] for s in kept]
        if not sentences:
            break
        index = torch.tensor(kept, device=device)
        rows = (index[:, None] * beams + torch.arange(beams, device=device)).view(-1)
        names = ("running_scores", "ignored", "slots", "lengths", "input_ids", "position_ids",
                 "key_rows")  # fmt: skip
        state = state._replace(
            places=state.places[index], **{name: getattr(state, name)[rows] for name in names}
        )
    for place in range(batch):
        own, out = plain_search(place, beams, steps, seed, end_bias), ended_of(state, place)
        assert [tokens for _, tokens, _ in out] == [tokens for _, tokens, _ in own]


@pytest.mark.parametrize("beams", [1, 5, 32])
@pytest.mark.parametrize("batch", [1, 7])
def test_cuda_agrees_with_torch(beams, batch):
    """Bit by bit, also where scores are equal, NaN or -inf."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    torch.manual_seed(0)
    states = [new_state(device, batch, beams, 20) for device in ("cpu", "cuda")]
    for _ in range(15):
        values = torch.randn(batch * beams, 2 * beams)
        values[torch.rand_like(values) < 0.1] = -math.inf
        values = values.sort(1, descending=True)[0]
        if beams > 1:
            values[0] = math.nan  # as all of a row are, if one is
        tokens = torch.randint(0, 6, values.shape, dtype=torch.int32)
        for state in states:
            device = state.tokens.device
            hypothesis_step(state, values.to(device), tokens.to(device), EOS)
            state.lengths.fill_(int(state.lengths.max()))
        for name, own, out in zip(Hypotheses._fields, *states, strict=True):
            assert torch.equal(out.cpu(), own), name


def test_hypothesis_step_refuses():
    state = new_state("cpu", 2, 3, 10)
    scores, tokens = torch.zeros(6, 6), torch.zeros(6, 6, dtype=torch.int32)
    for changes, error, message in (
        ({"scores": torch.zeros(5, 6)}, ValueError, "scores must have 6 rows"),
        ({"scores": torch.zeros(6, 2)}, ValueError, "kept in"),
        ({"tokens": tokens.long()}, TypeError, "tokens must have dtype"),
        ({"state": state._replace(ignored=state.lengths)}, TypeError, "ignored must have dtype"),
        ({"state": state._replace(is_done=state.is_done[:1])}, ValueError, "is_done must have"),
    ):
        given = {"state": state, "scores": scores, "tokens": tokens, "eos": EOS} | changes
        with pytest.raises(error, match=message):
            hypothesis_step(**given)
