"""generate() with GPT-2 at the layer level: every decoding and cache, token for token against the
unpatched model. The loop level has its tests in generation/.
"""

import functools
import importlib.util

import helpers
import pytest
import torch
import transformers
from helpers import (
    REPOSITORY,
    assert_replaced,
    assert_same_tokens,
    batch_of,
    tiny_gpt2,
    token_ids,
)
from packaging.version import Version
from transformers import DynamicCache, StaticCache

import eet_patch

NAME = "gpt2_block"
patched = functools.partial(helpers.patched, exclude=("gpt2_sample",))
PROMPT = 9


def inputs_of(side, device, batch=2):
    return batch_of(side, device, (PROMPT, 5, 7)[:batch], vocab_size=500)


def generated(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 24, "do_sample": False} | settings)


def assert_equal_tokens(model, inputs, cache=None, different=4, **settings):
    """Equal tokens, from replaced calls alone; `cache()` makes a fresh one for each run."""
    fresh = (lambda: {"past_key_values": cache()}) if cache is not None else dict
    own = generated(model, inputs, **fresh(), **settings)
    with patched(NAME):
        out = generated(model, inputs, **fresh(), **settings)
    assert own.shape[1] > inputs["input_ids"].shape[1]
    assert len(own[:, PROMPT:].unique()) > different
    assert torch.equal(out, own)
    return out


# --- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy(device, dtype, side, implementation):
    model = tiny_gpt2(device, dtype, attn_implementation=implementation)
    inputs = inputs_of(side, device)
    own = generated(model, inputs)
    with patched(NAME, "gpt2_lm_head"):
        out = generated(model, inputs)
    assert len(own[:, PROMPT:].unique()) > 4
    assert_same_tokens(model, PROMPT, own, out, attention_mask=inputs["attention_mask"])


def test_logits_of_every_step(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    settings = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    own = generated(model, inputs, **settings)
    with patched(NAME):
        out = generated(model, inputs, **settings)
    assert torch.equal(out.sequences, own.sequences) and len(out.logits) == len(own.logits) == 24
    for mine, theirs in zip(out.logits + out.scores, own.logits + own.scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert out.past_key_values.get_seq_length() == PROMPT + 24 - 1
    assert type(out.past_key_values) is type(own.past_key_values)


@pytest.mark.parametrize("length, new", [(1, 1), (1, 90), (60, 10), (63, 3), (64, 66), (120, 20)])
def test_lengths(device, length, new):
    """A prompt of one token; and tokens that cross the blocks of 64 by which buffers grow."""
    model = tiny_gpt2(device)
    ids = token_ids(2, length, device, vocab_size=500)
    own = model.generate(ids, max_new_tokens=new, do_sample=False)
    with patched(NAME):
        out = model.generate(ids, max_new_tokens=new, do_sample=False)
    assert out.shape == (2, length + new) and torch.equal(out, own)


def test_finished_rows(device):
    """A row that ends early is padded while the other goes on."""
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    plain = generated(model, inputs)
    end = int(plain[0, PROMPT + 4])
    out = assert_equal_tokens(model, inputs, eos_token_id=end, pad_token_id=0, different=2)
    assert (out == end).any() and (out[:, -1] == 0).any() | (out.shape[1] < plain.shape[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20},
        {"bad_words_ids": [[5], [6, 7]]},
        {"forced_eos_token_id": 7},
    ],
    ids=str,
)
def test_processors(device, settings):
    assert_equal_tokens(tiny_gpt2(device), inputs_of("left", device), **settings)


# --- sampling, beams, assisted -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.8}, {"num_return_sequences": 3}],
    ids=str,
)
def test_sampling_and_the_generators_state(device, settings):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)

    def run():
        torch.manual_seed(77)
        out = generated(model, inputs, do_sample=True, **settings)
        return out, torch.rand(4), torch.rand(4, device=device)

    own = run()
    with patched(NAME):
        out = run()
    assert len(own[0][:, PROMPT:].unique()) > 8
    for mine, theirs in zip(out, own, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("side", ["none", "left"])
def test_beams(device, side):
    model, inputs = tiny_gpt2(device), inputs_of(side, device)
    settings = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    own = generated(model, inputs, output_scores=True, **settings)
    with patched(NAME):
        out = generated(model, inputs, output_scores=True, **settings)
    assert torch.equal(out.sequences, own.sequences) and out.sequences.shape[0] == 4
    torch.testing.assert_close(out.sequences_scores, own.sequences_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.beam_indices, own.beam_indices)


def test_beams_that_sample(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    torch.manual_seed(5)
    own = generated(model, inputs, num_beams=3, do_sample=True)
    torch.manual_seed(5)
    with patched(NAME):
        out = generated(model, inputs, num_beams=3, do_sample=True)
    assert torch.equal(out, own)


@pytest.mark.parametrize("seed", [0, 3])
def test_assisted(device, seed):
    """The layers of both models are replaced: seed 0 is an assistant that is always right, 3 one
    that errs.
    """
    model, assistant = tiny_gpt2(device), tiny_gpt2(device, seed=seed)
    inputs = inputs_of("none", device, batch=1)
    plain = generated(model, inputs)
    own = generated(model, inputs, assistant_model=assistant)
    with patched(NAME):
        out = generated(model, inputs, assistant_model=assistant)
    assert torch.equal(out, own) and torch.equal(out, plain)


def test_prompt_lookup(device):
    model = tiny_gpt2(device)
    ids = token_ids(1, 4, device, vocab_size=500).repeat(1, 3)
    settings = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}  # some hosts need an end
    own = generated(model, {"input_ids": ids}, **settings)
    with patched(NAME):
        out = generated(model, {"input_ids": ids}, **settings)
    assert torch.equal(out, own)


# --- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left"])
def test_without_cache(device, side):
    assert_equal_tokens(tiny_gpt2(device), inputs_of(side, device), use_cache=False)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_static_cache(device, side, implementation):
    model = tiny_gpt2(device, attn_implementation=implementation)
    inputs = inputs_of(side, device)
    cached = assert_equal_tokens(
        model, inputs, cache=lambda: StaticCache(model.config, max_cache_len=50)
    )
    assert torch.equal(cached, generated(model, inputs))


def test_static_cache_by_name(device):
    """The host may compile its decode step on a GPU: compiled calls are the original's and aren't
    counted.
    """
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    settings = {"cache_implementation": "static", "disable_compile": True}
    assert_equal_tokens(model, inputs, **settings)


def test_dynamic_cache_given_and_continued(device):
    """A chat: the cache of the first turn is given to the second."""
    model, ids = tiny_gpt2(device), token_ids(2, 6, device, vocab_size=500)
    more = token_ids(2, 3, device, vocab_size=500, seed=6)

    def chat():
        cache = DynamicCache()
        first = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        turn = torch.cat([first, more], 1)
        return model.generate(turn, past_key_values=cache, max_new_tokens=8, do_sample=False)

    own = chat()
    with patched(NAME):
        assert torch.equal(chat(), own)
    assert own.shape == (2, 25)


def test_one_prefill_and_many_continuations(device):
    """The host's recipe for prompt caching: copies of one prefilled cache."""
    import copy

    model, ids = tiny_gpt2(device), token_ids(1, 8, device, vocab_size=500)

    def run():
        with torch.no_grad():
            prefix = model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        outs = []
        for seed in range(3):
            turn = torch.cat([ids, token_ids(1, 2, device, vocab_size=500, seed=seed)], 1)
            outs.append(
                model.generate(
                    turn, past_key_values=copy.deepcopy(prefix), max_new_tokens=8, do_sample=False
                )
            )
        return torch.cat(outs)

    own = run()
    with patched(NAME):
        out = run()
    assert torch.equal(out, own)


def test_offloaded_cache(device):
    if device.type != "cuda":
        pytest.skip("offloading needs CUDA streams")
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this host prefetches a layer before its copy to the CPU has ended")
    assert_equal_tokens(
        tiny_gpt2(device), inputs_of("left", device), cache_implementation="offloaded"
    )


@pytest.mark.parametrize("backend, package", [("quanto", "optimum"), ("hqq", "hqq")])
def test_quantized_cache(device, backend, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = tiny_gpt2(device, n_embd=256, n_head=4)
    settings = {"backend": backend, "nbits": 4, "q_group_size": 64, "residual_length": 4}
    assert_equal_tokens(
        model, inputs_of("left", device), cache_implementation="quantized", cache_config=settings
    )


# --- around it -----------------------------------------------------------------------------------


def test_streamer_and_stopping_criteria(device):
    model, inputs = tiny_gpt2(device), inputs_of("none", device, batch=1)

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens.append(value.tolist())

        def end(self):
            self.ended += 1

    def run():
        streamer, seen = Streamer(), []

        class Stop(transformers.StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                seen.append(input_ids.shape[1])
                done = input_ids.shape[1] >= PROMPT + 7
                return torch.full((input_ids.shape[0],), done, device=input_ids.device)

        out = generated(model, inputs, streamer=streamer, stopping_criteria=[Stop()])
        return out, streamer.tokens, streamer.ended, seen

    own = run()
    with patched(NAME):
        out = run()
    assert torch.equal(out[0], own[0]) and out[0].shape[1] == PROMPT + 7
    assert out[1:] == own[1:]


@pytest.fixture(scope="module")
def trained():
    """The small GPT-2 that the examples train on real text, and its tokenizer; a minute if nobody
    has run them.
    """
    path = REPOSITORY / "examples" / "train_tiny_gpt2.py"
    spec = importlib.util.spec_from_file_location("train_tiny_gpt2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.tiny_gpt2_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


PROMPTS = ["Return the", "This module provides", "If the argument is"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"do_sample": False, "num_beams": 4}, {"do_sample": True}],
    ids=str,
)
def test_pipeline_with_trained_weights(trained, device, settings):
    model, tokenizer = trained
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def run():
        torch.manual_seed(3)
        out = pipe(PROMPTS, batch_size=3, max_new_tokens=70, min_new_tokens=30, **settings)
        return [turn[0]["generated_text"] for turn in out]

    own = run()
    eet_patch.enable()
    out = run()
    assert_replaced("gpt2_beam_search" if "num_beams" in settings else "gpt2_sample")
    assert out == own
    assert any(len(text) > len(prompt) + 50 for text, prompt in zip(out, PROMPTS, strict=True))
    model.cpu()


@pytest.mark.slow
def test_trained_weights_in_every_dtype(trained, device, dtype):
    import copy

    model, tokenizer = copy.deepcopy(trained[0]).to(device, dtype), trained[1]
    tokenizer.padding_side = "left"
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    own = generated(model, inputs, max_new_tokens=40, eos_token_id=None)
    with patched(NAME):
        out = generated(model, inputs, max_new_tokens=40, eos_token_id=None)
    assert_same_tokens(model, length, own, out, attention_mask=inputs["attention_mask"])
