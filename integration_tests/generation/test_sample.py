"""The loop level: generate()'s greedy search and sampling over fixed buffers, token for token and
bit for bit of the generator against the unpatched model.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from helpers import (
    assert_fell_back,
    assert_same_cache,
    assert_same_tokens,
    batch_of,
    patched,
    tiny_decoder,
    tiny_gpt2,
    token_ids,
)
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import eet_patch
from eet_patch.generation import by_products, loop, pool, step

NAME = "gpt2_sample"
PROMPT = 9
LENGTHS = (9, 5, 7)


def inputs_of(side, device, batch=3):
    return batch_of(side, device, LENGTHS[:batch], vocab_size=500)


def generator_state(device):
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def generated(model, inputs, seed=7, **settings):
    torch.manual_seed(seed)
    return model.generate(
        **inputs, **{"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | settings
    )


def both(model, inputs, **settings):
    """The unpatched and the patched output, after the same generator; the loop must have run."""
    own = generated(model, inputs, **settings)
    state = generator_state(model.device)
    with patched(NAME):
        out = generated(model, inputs, **settings)
    assert torch.equal(generator_state(model.device), state), "the generator is elsewhere"
    return own, out


def assert_equal_tokens(model, inputs, **settings):
    own, out = both(model, inputs, **settings)
    assert torch.equal(out, own), f"{out[:, PROMPT:]} is not {own[:, PROMPT:]}"
    return out


SIDES = pytest.mark.parametrize("side", ["none", "left"])
SAMPLING = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    {"repetition_penalty": 1.4, "top_k": 12, "top_p": 0.9},
    {"suppress_tokens": [5, 17, 99], "temperature": 1.3},
]
GREEDY = [
    {},
    {"repetition_penalty": 1.4},
    {"suppress_tokens": [5, 17, 99]},
    {"repetition_penalty": 0.8, "suppress_tokens": [3]},
]


# --- the same tokens -----------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy(device, dtype, side, implementation):
    model = tiny_gpt2(device, dtype, attn_implementation=implementation)
    inputs = inputs_of(side, device)
    own, out = both(model, inputs)
    assert len(own[:, PROMPT:].unique()) > 4
    assert_same_tokens(model, PROMPT, own, out, attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("settings", GREEDY, ids=str)
def test_greedy_processors(device, settings):
    assert_equal_tokens(tiny_gpt2(device), inputs_of("left", device), **settings)


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_sampling(device, settings):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    tokens = [
        assert_equal_tokens(model, inputs, do_sample=True, seed=seed, **settings)
        for seed in range(3)
    ]
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("length, new", [(1, 90), (60, 10), (63, 66), (120, 20), (200, 56)])
def test_lengths(device, length, new):
    model = tiny_gpt2(device)
    ids = token_ids(2, length, device, vocab_size=500)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = assert_equal_tokens(model, inputs, max_new_tokens=new)
    assert out.shape == (2, length + new)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 128])
def test_head_dims(device, head_dim):
    model = tiny_gpt2(device, n_embd=2 * head_dim, n_head=2)
    assert_equal_tokens(model, inputs_of("left", device), max_new_tokens=12)


@pytest.mark.parametrize("lengths", [(38, 39, 37, 40), (40, 39, 40, 40), (37, 40)])
def test_little_padding(device, dtype, lengths):
    """Too little to gather the real tokens for: the context runs over it, and must not see it."""
    model = tiny_gpt2(device, dtype)
    inputs = batch_of("left", device, lengths, vocab_size=500)
    own, out = both(model, inputs)
    assert_same_tokens(model, 40, own, out, attention_mask=inputs["attention_mask"])


def test_ids_of_another_dtype(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    inputs["input_ids"] = inputs["input_ids"].int()
    own = generated(model, inputs)
    with eet_patch.enabled():
        out = generated(model, inputs)
    assert torch.equal(out, own) and out.dtype == own.dtype
    assert_fell_back(NAME, "input_ids is torch.int32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "top_k": 7}, {"num_beams": 3}], ids=str
)
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neo_within_window"])
def test_layers_by_products(device, dtype, settings, model_type, monkeypatch):
    """As wide models have them: every step, and as rows end."""
    model = (
        tiny_gpt2(device, dtype)
        if model_type == "gpt2"
        else tiny_decoder(model_type, device, dtype)
    )
    inputs = inputs_of("left", device)
    own = generated(model, inputs, **settings)
    eos = int(own[1, PROMPT + 4])
    launched = []
    launch = by_products.launch_layers
    monkeypatch.setattr(step, "MIN_SIZE_BY_PRODUCTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(by_products, "launch_layers", lambda *a: launched.append(0) or launch(*a))
    for more in ({}, {"eos_token_id": eos}):
        own = generated(model, inputs, **settings, **more)
        launched.clear()
        with eet_patch.enabled():
            for _ in range(2):
                out = generated(model, inputs, **settings, **more)
        assert launched
        if "num_beams" not in settings and "do_sample" not in settings and not more:
            assert_same_tokens(model, PROMPT, own, out, attention_mask=inputs["attention_mask"])
        else:  # rounding may part them, and then all that follows
            width = min(own.shape[1], out.shape[1])
            same = (own[:, :width] == out[:, :width]).float().mean()
            assert same > 0.5 and out.shape[0] == own.shape[0]


def test_many_prompts(device, dtype):
    """200 prompts of mixed length, in batches that are padded on the left."""
    model = tiny_gpt2(device, dtype)
    for batch in range(8):
        generator = torch.Generator().manual_seed(batch)
        lengths = torch.randint(1, 40, (25,), generator=generator).tolist()
        inputs = batch_of("left", device, lengths, vocab_size=500)
        own, out = both(model, inputs, max_new_tokens=12)
        width = inputs["input_ids"].shape[1]
        assert_same_tokens(model, width, own, out, attention_mask=inputs["attention_mask"])


def test_a_scale_per_layer(device):
    model = tiny_gpt2(
        device, scale_attn_by_inverse_layer_idx=True, attn_implementation="eager", n_layer=3
    )
    assert_equal_tokens(model, inputs_of("left", device))


def test_two_runs_give_the_same_bits(device, dtype):
    model, inputs = tiny_gpt2(device, dtype), inputs_of("left", device)
    with patched(NAME):
        first = generated(model, inputs, return_dict_in_generate=True)
        again = generated(model, inputs, return_dict_in_generate=True)
    assert torch.equal(first.sequences, again.sequences)
    for a, b in zip(first.past_key_values.layers, again.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_prompts_given_as_embeddings(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    embedded = {
        "inputs_embeds": model.transformer.wte(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    out = assert_equal_tokens(model, embedded, min_new_tokens=3)
    assert out.shape == (3, 24)


# --- rows that end -------------------------------------------------------------------------------


def ends_of(model, inputs, steps, **settings):
    """Tokens that end the rows of the unpatched model at about these steps."""
    width = inputs["input_ids"].shape[1]
    plain = generated(model, inputs, max_new_tokens=60, **settings)
    return sorted({int(plain[row, width + step]) for row, step in enumerate(steps)})


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("steps", [(0, 0, 0), (0, 3, 40), (11, 2, 7), (17, 59, 59)])
def test_finished_rows(device, steps, sample):
    """Steps queued behind the last row's end are taken back, with the generator."""
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    ends = ends_of(model, inputs, steps, do_sample=sample)
    out = assert_equal_tokens(model, inputs, eos_token_id=ends, max_new_tokens=60, do_sample=sample)
    assert torch.isin(out[:, PROMPT:], torch.tensor(ends, device=device)).any()


@pytest.mark.parametrize("sample", [False, True])
def test_a_batch_that_shrinks(device, sample, monkeypatch):
    model = tiny_gpt2(device, n_positions=512)
    inputs = batch_of("left", device, [3 + row % 7 for row in range(16)], vocab_size=500)
    ends = ends_of(model, inputs, range(0, 48, 3), do_sample=sample)[:2]
    called = {"keep_rows": [], "hide_past": []}
    for name, rows_of in called.items():
        original = getattr(loop.DecodeStep, name)

        def spy(step, rows, original=original, rows_of=rows_of):
            rows_of.append(rows)
            original(step, rows)

        monkeypatch.setattr(loop.DecodeStep, name, spy)
    assert_equal_tokens(model, inputs, eos_token_id=ends, max_new_tokens=150, do_sample=sample)
    assert called["keep_rows"], "no row was dropped"
    if device.type == "cpu":  # on CUDA several rows may end between two looks
        assert called["hide_past"], "no row that ended stayed for the size of the batch"


def test_min_length(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    ends = ends_of(model, inputs, (1, 2, 3))
    for settings in ({"min_new_tokens": 9}, {"min_length": PROMPT + 14}, {"min_new_tokens": 2}):
        assert_equal_tokens(model, inputs, eos_token_id=ends, **settings)


# --- what the host is asked for ------------------------------------------------------------------


class Favour(LogitsProcessor):
    """A user's own processor: a token that depends on the sequence so far gets a bonus."""

    def __call__(self, input_ids, scores):
        return scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], 2.0))


class EndsAtMultiple(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 7 == 0) & (input_ids.shape[1] > PROMPT + 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"logits_processor": LogitsProcessorList([Favour()])},
        {"stopping_criteria": StoppingCriteriaList([EndsAtMultiple()])},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"renormalize_logits": True, "do_sample": True},
        {"typical_p": 0.8, "do_sample": True},
        {"max_time": 60.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_hosts_own_processors_and_criteria(device, settings):
    assert_equal_tokens(tiny_gpt2(device), inputs_of("left", device), **settings)


@pytest.mark.parametrize("sample", [False, True])
def test_scores_and_logits(device, sample):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    own, out = both(
        model,
        inputs,
        do_sample=sample,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    assert type(out) is type(own) and torch.equal(out.sequences, own.sequences)
    assert len(out.logits) == len(own.logits) == len(out.scores) == 24
    for mine, theirs in zip(out.logits + out.scores, own.logits + own.scores, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert out.attentions is None and out.hidden_states is None


def test_only_what_was_asked_for_is_returned(device):
    model, inputs = tiny_gpt2(device), inputs_of("none", device)
    own, out = both(model, inputs, return_dict_in_generate=True)
    assert type(out) is type(own) and out.scores is None and out.logits is None
    assert torch.equal(out.sequences, own.sequences)


class Recorder(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        assert value.device.type == "cpu" and not self.ended
        self.got.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 2}, {"do_sample": True}], ids=str)
def test_streamer(device, more):
    model, inputs = tiny_gpt2(device), inputs_of("none", device, 1)
    ends = ends_of(model, inputs, (13,), **more)
    for settings in ({}, {"eos_token_id": ends, "max_new_tokens": 50}):
        own, ours = Recorder(), Recorder()
        expected = generated(model, inputs, streamer=own, **settings, **more)
        with patched(NAME):
            out = generated(model, inputs, streamer=ours, **settings, **more)
        assert torch.equal(out, expected)
        assert ours.got == own.got and ours.ended == own.ended == 1


# --- caches --------------------------------------------------------------------------------------


def test_continuing_from_the_cache(device):
    """A second generate(), and a plain forward, go on from the cache that the first one returns."""
    model, inputs = tiny_gpt2(device), inputs_of("left", device)

    def run():
        first = generated(model, inputs, max_new_tokens=10, return_dict_in_generate=True)
        cache, sequences = first.past_key_values, first.sequences
        assert cache.get_seq_length() == sequences.shape[1] - 1
        extra = torch.ones(3, 10, dtype=torch.int64, device=device)
        mask = torch.cat([inputs["attention_mask"], extra], dim=1)
        longer = model.generate(
            input_ids=sequences,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        mask = torch.cat([mask, extra[:, :8]], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        with torch.no_grad():
            logits = model(
                input_ids=longer[:, -1:],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            ).logits
        return longer, logits, cache.get_seq_length()

    own, own_logits, own_length = run()
    with eet_patch.enabled():
        out, logits, length = run()
        assert eet_patch.report()[NAME].replaced == 2
    assert torch.equal(out, own) and length == own_length
    torch.testing.assert_close(logits, own_logits, rtol=1e-4, atol=1e-4)


def test_a_returned_cache_is_left_alone(device):
    model, inputs = tiny_gpt2(device), inputs_of("none", device)
    with patched(NAME):
        kept = generated(model, inputs, return_dict_in_generate=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in kept.layers]
        for seed in range(3):
            generated(model, inputs, do_sample=True, seed=seed)
        for layer, (keys, values) in zip(kept.layers, before, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_single_tensor_of_a_returned_cache_is_left_alone(device):
    model, inputs = tiny_gpt2(device), inputs_of("none", device)
    with patched(NAME):
        cache = generated(model, inputs, return_dict_in_generate=True).past_key_values
        keys = cache.layers[1].keys[:, :, 3:5]
        before = keys.clone()
        del cache
        generated(model, inputs, do_sample=True)
        assert torch.equal(keys, before)


def test_a_cache_of_ones_own(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)

    def run():
        cache = DynamicCache()
        tokens = generated(model, inputs, past_key_values=cache)
        return tokens, cache

    own, own_cache = run()
    with patched(NAME):
        out, cache = run()
    assert torch.equal(out, own) and cache.get_seq_length() == own_cache.get_seq_length()
    for mine, theirs in zip(cache.layers, own_cache.layers, strict=True):
        assert_same_cache(mine.keys, theirs.keys, inputs["attention_mask"])


# --- weights, memory, threads --------------------------------------------------------------------


def test_weights_are_read_where_they_are(device):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    with patched(NAME):
        generated(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert_equal_tokens(model, inputs)
    model.load_state_dict(tiny_gpt2(device, seed=5).state_dict())
    assert_equal_tokens(model, inputs)
    model.to(torch.float64).to(torch.float32)  # the same numbers at other addresses
    assert_equal_tokens(model, inputs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "repetition_penalty": 1.3, "top_k": 9},
        {"num_beams": 3, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_in_and_out_of_inference_mode(device, settings):
    """Buffers that a call in inference mode leaves behind serve one out of it."""
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    own = generated(model, inputs, **settings)
    with patched():
        with torch.inference_mode():
            assert torch.equal(generated(model, inputs, **settings), own)
        assert torch.equal(generated(model, inputs, **settings), own)
        with torch.inference_mode():
            assert torch.equal(generated(model, inputs, **settings), own)


def test_a_model_that_has_generated_is_as_before(device):
    """Nothing is left on the model: it copies and pickles, and its copy generates."""
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with patched(NAME):
        own = generated(model, inputs)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(generated(twin, inputs), own)


def test_idle_memory_is_reported_and_freed(device):
    model, inputs = tiny_gpt2(device), inputs_of("none", device)
    name = "decode steps (KV buffers, logits, scratch)"
    assert eet_patch.report().memory[name] == 0
    with eet_patch.enabled():
        generated(model, inputs)
        held = eet_patch.report().memory[name]
        generated(model, inputs)
        assert held > 0 and eet_patch.report().memory[name] == held
    assert eet_patch.report().memory[name] == 0
    with eet_patch.enabled():
        generated(model, inputs)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None and eet_patch.report().memory[name] == 0


def test_what_idles_is_bounded(device, monkeypatch):
    model = tiny_gpt2(device)
    with eet_patch.enabled():
        for length in (5, 70, 140, 200):
            ids = token_ids(2, length, device, vocab_size=500)
            model.generate(ids, max_new_tokens=3, do_sample=False)
        assert len(pool._idle[model]) <= pool.MAX_IDLE
        monkeypatch.setattr(pool, "IDLE_BYTES", 1000)
        monkeypatch.setattr(pool, "IDLE_SHARE", 0.0)
        generated(model, inputs_of("none", device))
        assert not pool._idle[model]


def test_threads(device):
    model = tiny_gpt2(device)
    batches = [inputs_of("left", device, 1 + row % 3) for row in range(4)]
    for row, inputs in enumerate(batches):
        inputs["input_ids"] = inputs["input_ids"].roll(row, 1) * inputs["attention_mask"]
    expected = [model.generate(**inputs, max_new_tokens=20, do_sample=False) for inputs in batches]
    wrong = []

    def work(index):
        for _ in range(5):
            out = model.generate(**batches[index], max_new_tokens=20, do_sample=False)
            if not torch.equal(out, expected[index]):
                wrong.append(index)

    with patched(NAME):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_random_calls(device):
    """Calls of random batch, length, processors and ends, one after the other on one model."""
    model = tiny_gpt2(device)
    generator = torch.Generator().manual_seed(11)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for call in range(40):
        lengths = [pick(1, 3, 8, 17, 30) for _ in range(pick(1, 2, 4, 7))]
        inputs = batch_of(pick("none", "left"), device, lengths, vocab_size=500)
        settings = {
            "max_new_tokens": pick(2, 3, 9, 20, 33),
            "do_sample": pick(True, False),
            "repetition_penalty": pick(1.0, 1.2),
            "eos_token_id": pick(None, [3, 50, 77], list(range(10, 60))),
            "min_new_tokens": pick(None, 4),
        }
        if settings["do_sample"]:
            settings |= {"top_k": pick(0, 5, 50), "top_p": pick(1.0, 0.9)}
        own = generated(model, inputs, seed=call, **settings)
        state = generator_state(device)
        with patched(NAME):
            out = generated(model, inputs, seed=call, **settings)
        assert torch.equal(out, own), f"call {call}: {settings}"
        assert torch.equal(generator_state(device), state), f"call {call}: {settings}"


# --- what runs the original ----------------------------------------------------------------------


def hooked(model):
    model.transformer.h[1].register_forward_hook(lambda *_: None)
    return model


def in_training(model):
    return model.train()


def with_dropped_head(model):
    model.lm_head = torch.nn.Linear(48, 500, bias=True)
    return model


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (hooked, {}, "a submodule (GPT2Block) has hooks, which fusion would skip"),
        (with_dropped_head, {}, "the output embedding has a bias"),
        (None, {"use_cache": False}, "generate() runs without a cache"),
        (None, {"max_new_tokens": 1}, "a single token is asked for"),
        (
            None,
            {"return_dict_in_generate": True, "output_hidden_states": True},
            "attentions or hidden states of each step were asked for",
        ),
        (None, {"token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}, "token_type_ids"),
    ],
)
def test_runs_the_original(change, settings, reason):
    model, inputs = tiny_gpt2(), inputs_of("none", torch.device("cpu"))
    if change is not None:
        model = change(model)
    own = generated(model, inputs, **settings)
    with eet_patch.enabled():
        out = generated(model, inputs, **settings)
        (told,) = eet_patch.report()[NAME].fallbacks
        assert reason in told
    if not isinstance(own, torch.Tensor):
        own, out = own.sequences, out.sequences
    assert torch.equal(out, own)


@pytest.mark.parametrize("on", ["instance", "class"])
def test_a_replaced_method_runs_the_original(on, monkeypatch):
    """The user's own preparation of inputs must be asked for every token."""
    model, inputs = tiny_gpt2(), inputs_of("none", torch.device("cpu"))
    original, calls = type(model).prepare_inputs_for_generation, []

    def prepare(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    if on == "class":
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
    else:
        model.prepare_inputs_for_generation = prepare.__get__(model)
    with eet_patch.enabled():
        generated(model, inputs)
        assert_fell_back(NAME, "prepare_inputs_for_generation was replaced")
    assert len(calls) == 24


def test_a_static_cache_runs_the_original():
    model, inputs = tiny_gpt2(), inputs_of("none", torch.device("cpu"))

    def cache():
        return StaticCache(config=model.config, max_cache_len=64)

    own = generated(model, inputs, past_key_values=cache())
    with eet_patch.enabled():
        assert torch.equal(generated(model, inputs, past_key_values=cache()), own)
        assert_fell_back(NAME, "the cache is a StaticCache")


def test_strict_lets_the_layers_run():
    """The loop's original runs replaced layers: nothing runs unpatched, and nothing is raised."""
    model, inputs = tiny_gpt2(), inputs_of("none", torch.device("cpu"))
    own = generated(model, inputs, max_new_tokens=1)
    with patched("gpt2_block", strict=True):
        assert torch.equal(generated(model, inputs, max_new_tokens=1), own)
        assert_fell_back(NAME, "a single token is asked for")


def test_a_mask_with_holes_runs_the_original(device):
    model, inputs = tiny_gpt2(device), inputs_of("none", device)
    inputs["attention_mask"][1, 4] = 0
    own = generated(model, inputs)
    with eet_patch.enabled():
        assert torch.equal(generated(model, inputs), own)
        assert_fell_back(NAME, "the attention mask has zeros behind ones")


def test_more_tokens_than_positions():
    """The host's own error, or its own answer where it gives one."""
    model = tiny_gpt2(n_positions=32)
    inputs = inputs_of("none", torch.device("cpu"))
    with pytest.raises(Exception) as own:
        generated(model, inputs, max_new_tokens=40)
    with eet_patch.enabled(), pytest.raises(type(own.value)):
        generated(model, inputs, max_new_tokens=40)
    with eet_patch.enabled():
        generated(model, inputs, max_new_tokens=23)
        assert eet_patch.report()[NAME].replaced == 1


def test_a_subclass_runs_the_original():
    class Mine(transformers.GPT2LMHeadModel):
        pass

    model = Mine(tiny_gpt2().config).eval()
    inputs = inputs_of("none", torch.device("cpu"))
    own = generated(model, inputs)
    with eet_patch.enabled():
        assert torch.equal(generated(model, inputs), own)
        assert_fell_back(NAME, "Mine is a subclass of GPT2LMHeadModel")


def test_out_of_memory_runs_the_original(device, monkeypatch):
    model, inputs = tiny_gpt2(device), inputs_of("left", device)
    own = generated(model, inputs)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(pool, "DecodeStep", fail)
    with eet_patch.enabled():
        assert torch.equal(generated(model, inputs), own)
        assert_fell_back(NAME, "out of memory")


def test_a_capture_that_fails_runs_without_a_graph(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    model, inputs = tiny_gpt2("cuda"), inputs_of("left", torch.device("cuda", 0))
    own = generated(model, inputs)

    def fail(self):
        raise RuntimeError("no graph today")

    monkeypatch.setattr("eet_patch.ops.decode.Graph.__enter__", fail)
    with patched(NAME), pytest.warns(UserWarning, match="no graph today"):
        assert torch.equal(generated(model, inputs), own)
