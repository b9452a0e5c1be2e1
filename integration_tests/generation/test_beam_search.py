"""The loop level's beam search: sequences, beam indices and caches against the unpatched model."""

import pytest
import torch
from helpers import assert_fell_back, batch_of, patched, tiny_gpt2, token_ids

import eet_patch
from eet_patch.generation import step
from eet_patch.ops.decode import Graph

NAME = "gpt2_beam_search"
LENGTHS = (9, 5, 7)
PROMPT = max(LENGTHS)


def inputs_of(side, device, batch=3):
    return batch_of(side, device, LENGTHS[:batch], vocab_size=500)


def generated(model, inputs, **settings):
    wanted = {"max_new_tokens": 20, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **wanted | settings)


def assert_equal_sequences(model, inputs, **settings):
    own = generated(model, inputs, **settings)
    with patched(NAME):
        out = generated(model, inputs, **settings)
    assert torch.equal(out, own), f"{out[:, PROMPT:]} is not {own[:, PROMPT:]}"
    return out


def ends_of(model, inputs, steps):
    """Tokens that end beams at about these steps."""
    plain = generated(model, inputs, max_new_tokens=40)
    return sorted({int(plain[row, PROMPT + step]) for row, step in enumerate(steps)})


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_beams", [2, 4, 7])
def test_beam_search(device, side, implementation, num_beams):
    model = tiny_gpt2(device, attn_implementation=implementation)
    out = assert_equal_sequences(model, inputs_of(side, device), num_beams=num_beams)
    assert out.shape == (3, PROMPT + 20) and len(out[:, PROMPT:].unique()) > 4


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("steps", [(2, 5, 30), (12, 3, 8)])
def test_beams_that_end(device, early_stopping, length_penalty, steps):
    """Steps queued behind the search's end change nothing."""
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    assert_equal_sequences(
        model,
        inputs,
        eos_token_id=ends_of(model, inputs, steps),
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        max_new_tokens=40,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 3},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "num_return_sequences": 2},
        {"suppress_tokens": [4, 7, 9]},
        {"min_new_tokens": 9},
        {"min_length": PROMPT + 11},
        {"pad_token_id": 13},
    ],
    ids=str,
)
def test_options(device, settings):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    ends = ends_of(model, inputs, (2, 5, 9))
    assert_equal_sequences(model, inputs, eos_token_id=ends, **settings)


@pytest.mark.parametrize("length, new", [(1, 60), (63, 66), (150, 100)])
def test_lengths(device, length, new):
    model = tiny_gpt2(device)
    ids = token_ids(2, length, device, vocab_size=500)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = generated(model, inputs, max_new_tokens=new)
    with patched(NAME):
        assert torch.equal(generated(model, inputs, max_new_tokens=new), own)


@pytest.mark.parametrize("graph_steps", [1, 4])
def test_one_graph_serves_prompts_of_any_length(monkeypatch, graph_steps):
    """And any number of new tokens; another number of beams has one of its own. What is left of
    the steps of one graph runs by a second one, of a single step.
    """
    monkeypatch.setattr(step, "GRAPH_STEPS", graph_steps)
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    model, device = tiny_gpt2("cuda"), torch.device("cuda", 0)
    calls = []
    for length, beams, new in ((9, 4, 20), (7, 4, 24), (20, 4, 9), (9, 2, 20)):
        ids = token_ids(12 // beams, length, device, vocab_size=500)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calls.append((inputs, {"num_beams": beams, "max_new_tokens": new, "min_new_tokens": 3}))
    settings = {"eos_token_id": [3, 200], "repetition_penalty": 1.2}
    owns = [generated(model, inputs, **settings, **call) for inputs, call in calls]
    captured, enter = [], Graph.__enter__
    monkeypatch.setattr(Graph, "__enter__", lambda graph: captured.append(0) or enter(graph))
    counts = []
    with patched(NAME):
        for (inputs, call), own in zip(calls, owns, strict=True):
            assert torch.equal(generated(model, inputs, **settings, **call), own)
            counts.append(len(captured))
    if graph_steps == 1:
        assert counts == [1, 1, 1, 2]
    else:
        assert 2 <= counts[-1] <= 4


def test_a_capture_that_fails_runs_without_a_graph(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    model, inputs = tiny_gpt2("cuda"), inputs_of("left", torch.device("cuda", 0))
    own = generated(model, inputs)

    def fail(self):
        raise RuntimeError("no graph today")

    monkeypatch.setattr(Graph, "__enter__", fail)
    with patched(NAME), pytest.warns(UserWarning, match="no graph today"):
        assert torch.equal(generated(model, inputs), own)


def test_many_prompts(device):
    model = tiny_gpt2(device)
    for batch in range(10):
        generator = torch.Generator().manual_seed(batch)
        lengths = torch.randint(1, 30, (10,), generator=generator).tolist()
        inputs = batch_of("left", device, lengths, vocab_size=500)
        own = generated(model, inputs, max_new_tokens=12, eos_token_id=[3, 200])
        with patched(NAME):
            out = generated(model, inputs, max_new_tokens=12, eos_token_id=[3, 200])
        assert torch.equal(out, own), f"batch {batch}"


def test_what_is_returned(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    ends = ends_of(model, inputs, (2, 5, 9))
    own = generated(model, inputs, eos_token_id=ends, return_dict_in_generate=True)
    with patched(NAME):
        out = generated(model, inputs, eos_token_id=ends, return_dict_in_generate=True)
    assert type(out) is type(own) and out.keys() == own.keys()
    assert torch.equal(out.sequences, own.sequences)
    assert torch.equal(out.beam_indices, own.beam_indices)
    assert out.beam_indices.dtype == own.beam_indices.dtype
    for mine, theirs in zip(out.past_key_values.layers, own.past_key_values.layers, strict=True):
        for row in range(12):
            real = slice(PROMPT - LENGTHS[row // 4], None)  # what stands at padding, nobody reads
            for ours, hosts in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert ours.shape == hosts.shape
                torch.testing.assert_close(
                    ours[row, :, real], hosts[row, :, real], rtol=1e-4, atol=1e-4
                )


def test_two_runs_give_the_same_bits(device, dtype):
    model, inputs = tiny_gpt2(device, dtype), inputs_of("left", device)
    with patched(NAME):
        first = generated(model, inputs, return_dict_in_generate=True)
        again = generated(model, inputs, return_dict_in_generate=True)
    assert torch.equal(first.sequences, again.sequences)
    for mine, theirs in zip(
        first.past_key_values.layers, again.past_key_values.layers, strict=True
    ):
        assert torch.equal(mine.keys, theirs.keys)


def test_a_length_penalty_that_overflows():
    """The host's own error, in the step in which it comes."""
    model, inputs = tiny_gpt2(), inputs_of("left", torch.device("cpu"))
    with pytest.raises(OverflowError):
        generated(model, inputs, length_penalty=1e5)
    with eet_patch.enabled():
        with pytest.raises(OverflowError):
            generated(model, inputs, length_penalty=1e5)
        assert_fell_back(NAME, "the length penalty is beyond what a float holds")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True}, "beam search draws samples"),
        ({"no_repeat_ngram_size": 2}, "the logits processor NoRepeatNGramLogitsProcessor"),
        (
            {"return_dict_in_generate": True, "output_scores": True},
            "scores or logits of each step of a beam search were asked for",
        ),
        ({"num_beams": 33}, "66 continuations are kept in each step"),
        ({"max_time": 60.0}, "the stopping criterion MaxTimeCriteria"),
    ],
)
def test_runs_the_original(settings, reason):
    model, inputs = tiny_gpt2(), inputs_of("left", torch.device("cpu"))

    def run():
        torch.manual_seed(3)
        result = generated(model, inputs, max_new_tokens=6, **settings)
        return result if isinstance(result, torch.Tensor) else result.sequences

    own = run()
    with eet_patch.enabled():
        assert torch.equal(run(), own)
        assert_fell_back(NAME, reason)
