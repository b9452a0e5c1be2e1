"""The loop level of OPT and GPT-Neo: what the models differ in from GPT-2, whose own tests go
through everything that the loops share.
"""

import inspect
import re

import pytest
import torch
from helpers import (
    assert_as_accurate,
    assert_fell_back,
    assert_same_tokens,
    batch_of,
    in_double,
    layers_of,
    patched,
    tiny_decoder,
    tiny_gpt2,
    token_ids,
)
from torch import nn
from transformers.generation.streamers import BaseStreamer

import eet_patch
from eet_patch.adapters import gpt2, gpt_neo, opt
from eet_patch.generation import loop

KINDS = {"opt": "opt", "gpt_neo_within_window": "gpt_neo"}  # -> how its targets' names begin
PROMPT = 9
LENGTHS = (9, 5, 7)
SIDES = pytest.mark.parametrize("side", ["none", "left"])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def inputs_of(side, device, lengths=LENGTHS):
    return batch_of(side, device, lengths, vocab_size=500)


def generator_state(device):
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def generated(model, inputs, seed=7, **settings):
    torch.manual_seed(seed)
    wanted = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **wanted | settings)


def target_of(kind, settings):
    return f"{KINDS[kind]}_{'beam_search' if settings.get('num_beams') else 'sample'}"


def assert_equal_tokens(kind, model, inputs, **settings):
    own = generated(model, inputs, **settings)
    state = generator_state(model.device)
    with patched(target_of(kind, settings)):
        out = generated(model, inputs, **settings)
    assert torch.equal(generator_state(model.device), state), "the generator is elsewhere"
    assert torch.equal(out, own), f"{out[:, PROMPT:]} is not {own[:, PROMPT:]}"
    return out


# --- the same tokens -----------------------------------------------------------------------------


@SIDES
def test_greedy(device, dtype, kind, side):
    model, inputs = tiny_decoder(kind, device, dtype), inputs_of(side, device)
    own = generated(model, inputs)
    with patched(target_of(kind, {})):
        out = generated(model, inputs)
    assert len(own[:, PROMPT:].unique()) > 8
    assert_same_tokens(model, PROMPT, own, out, attention_mask=inputs["attention_mask"])


@SIDES
def test_logits_are_as_accurate_as_unpatched(device, dtype, kind, side):
    """Of every step, over the tokens of the patched run: each step's error against float64."""
    model, inputs = tiny_decoder(kind, device, dtype), inputs_of(side, device)
    with patched(target_of(kind, {})):
        out = generated(model, inputs, return_dict_in_generate=True, output_logits=True)
    logits, mask = torch.stack(out.logits, 1), inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(3, 23)], 1)
    call = {"input_ids": out.sequences[:, :-1], "attention_mask": mask}
    call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        own = model(**call).logits[:, PROMPT - 1 :].float()
        truth = in_double(model)(**call).logits[:, PROMPT - 1 :]
    assert_as_accurate(logits, own, truth)


SETTINGS = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
    {"do_sample": True, "repetition_penalty": 1.4, "min_p": 0.05, "top_k": 0},
    {"repetition_penalty": 1.4, "suppress_tokens": [5, 17, 99]},
    {"no_repeat_ngram_size": 2},  # the host's own processor chooses
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0},
]


@SIDES
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generate(device, kind, side, settings):
    model, inputs = tiny_decoder(kind, device), inputs_of(side, device)
    out = assert_equal_tokens(kind, model, inputs, **settings)
    assert len(out[:, PROMPT:].unique()) > 8


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 4}], ids=str)
@pytest.mark.parametrize("steps", [(0, 3, 20), (11, 2, 7)])
def test_rows_that_end(device, kind, settings, steps):
    model, inputs = tiny_decoder(kind, device), inputs_of("left", device)
    plain = generated(model, inputs, max_new_tokens=40, **settings)
    ends = sorted({int(plain[row, PROMPT + step]) for row, step in enumerate(steps)})
    for more in ({}, {"min_new_tokens": 9}):
        out = assert_equal_tokens(
            kind, model, inputs, eos_token_id=ends, max_new_tokens=40, **settings, **more
        )
        assert torch.isin(out[:, PROMPT:], torch.tensor(ends, device=device)).any()


def test_a_batch_that_shrinks(device, kind, monkeypatch):
    model = tiny_decoder(kind, device)
    inputs = inputs_of("left", device, [3 + row % 7 for row in range(16)])
    plain = generated(model, inputs, max_new_tokens=60)
    ends = sorted({int(plain[row, PROMPT + 3 * row]) for row in range(16)})[:6]
    kept, original = [], loop.DecodeStep.keep_rows
    monkeypatch.setattr(
        loop.DecodeStep, "keep_rows", lambda step, rows: kept.append(rows) or original(step, rows)
    )
    assert_equal_tokens(kind, model, inputs, eos_token_id=ends, max_new_tokens=120)
    assert kept, "no row was dropped"


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("length, new", [(1, 60), (63, 66), (150, 107)])
def test_lengths(device, kind, length, new, settings):
    """To the very last position: the last token is chosen, and not fed."""
    model, ids = tiny_decoder(kind, device), token_ids(2, length, device, vocab_size=500)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = assert_equal_tokens(kind, model, inputs, max_new_tokens=new, **settings)
    assert out.shape == (2, length + new)


SIZES = [
    ("opt", {"hidden_size": 160, "num_attention_heads": 2, "word_embed_proj_dim": 160}),
    ("opt", {"enable_bias": False, "ffn_dim": 333, "activation_function": "gelu"}),
    ("opt", {"tie_word_embeddings": False, "num_hidden_layers": 3}),
    ("opt", {"attn_implementation": "eager"}),
    ("gpt_neo_within_window", {"hidden_size": 24, "num_heads": 3, "intermediate_size": 40}),
    ("gpt_neo_within_window", {"layer_norm_epsilon": 0.1, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize("kind, sizes", SIZES, ids=str)
def test_sizes(device, kind, sizes):
    model, inputs = tiny_decoder(kind, device, **sizes), inputs_of("left", device)
    for settings in ({}, {"num_beams": 3}):
        assert_equal_tokens(kind, model, inputs, **settings)


def test_random_calls(device, kind):
    model = tiny_decoder(kind, device)
    generator = torch.Generator().manual_seed(11)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for call in range(20):
        lengths = [pick(1, 3, 8, 17, 30) for _ in range(pick(1, 2, 4, 7))]
        inputs = inputs_of(pick("none", "left"), device, lengths)
        settings = {
            "max_new_tokens": pick(2, 3, 9, 20, 33),
            "do_sample": pick(True, False),
            "repetition_penalty": pick(1.0, 1.2),
            "eos_token_id": pick(None, [3, 50, 77], list(range(10, 40))),
        }
        if not settings["do_sample"] and pick(True, False):
            settings["num_beams"] = 2
        own = generated(model, inputs, seed=call, **settings)
        with patched(target_of(kind, settings)):
            out = generated(model, inputs, seed=call, **settings)
        assert torch.equal(out, own), f"call {call}: {settings}"


# --- what comes in and goes out ------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.ended += 1


def test_streamer(device, kind):
    model, inputs = tiny_decoder(kind, device), inputs_of("none", device, (9,))
    own, ours = Recorder(), Recorder()
    expected = generated(model, inputs, streamer=own)
    with patched(target_of(kind, {})):
        assert torch.equal(generated(model, inputs, streamer=ours), expected)
    assert ours.got == own.got and ours.ended == own.ended == 1


def test_prompts_given_as_embeddings(device, kind):
    model, inputs = tiny_decoder(kind, device), inputs_of("left", device)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    out = assert_equal_tokens(kind, model, embedded)
    assert out.shape == (3, 24)


def test_continuing_from_the_cache(device, kind):
    model, inputs = tiny_decoder(kind, device), inputs_of("left", device)

    def run():
        first = generated(model, inputs, max_new_tokens=10, return_dict_in_generate=True)
        extra = torch.ones(3, 10, dtype=torch.int64, device=device)
        mask = torch.cat([inputs["attention_mask"], extra], 1)
        more = {"input_ids": first.sequences, "attention_mask": mask}
        return generated(model, more, past_key_values=first.past_key_values, max_new_tokens=8)

    own = run()
    with eet_patch.enabled():
        out = run()
        assert eet_patch.report()[target_of(kind, {})].replaced == 2
    assert torch.equal(out, own)


def test_changed_weights_are_seen(device, kind):
    """By a step that idled meanwhile, and its graphs; positions too, which OPT reads from row 2."""
    model, inputs = tiny_decoder(kind, device), inputs_of("left", device)
    with patched(target_of(kind, {})):
        generated(model, inputs)
    table = [p for name, p in model.named_parameters() if "wpe" in name or "positions" in name][0]
    for change in (
        lambda: table.data.neg_(),
        lambda: [p.data.mul_(0.9) for p in model.parameters()],
    ):
        change()
        assert_equal_tokens(kind, model, inputs)
    model.load_state_dict(tiny_decoder(kind, device, seed=5).state_dict())
    assert_equal_tokens(kind, model, inputs)
    model.to(torch.float64).to(torch.float32)  # the same numbers at other addresses
    assert_equal_tokens(kind, model, inputs)


def test_in_and_out_of_inference_mode(device, kind):
    model, inputs = tiny_decoder(kind, device), inputs_of("left", device)
    for settings in ({}, {"num_beams": 3}):
        own = generated(model, inputs, **settings)
        with patched():
            with torch.inference_mode():
                assert torch.equal(generated(model, inputs, **settings), own)
            assert torch.equal(generated(model, inputs, **settings), own)


def test_two_runs_give_the_same_bits(device, dtype, kind):
    model, inputs = tiny_decoder(kind, device, dtype), inputs_of("left", device)
    with patched(target_of(kind, {})):
        first, again = (generated(model, inputs, return_dict_in_generate=True) for _ in range(2))
    assert torch.equal(first.sequences, again.sequences)
    for a, b in zip(first.past_key_values.layers, again.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


# --- what runs the original ----------------------------------------------------------------------


def changed(kind, change, **settings):
    """A model whose modules `change` has worked on."""
    model = tiny_gpt2(**settings) if kind == "gpt2" else tiny_decoder(kind, **settings)
    change(model)
    return model


def subclassed(module):
    base = type(module)
    module.__class__ = type("Other", (base,), {"forward": base.forward})


def other_width(model):
    layer = model.model.decoder.layers[0]
    layer.fc1, layer.fc2 = nn.Linear(48, 64), nn.Linear(64, 48)


def other_act(model):
    model.model.decoder.layers[1].activation_fn = nn.GELU()


CASES = {
    "dropout is active (the model": ("gpt2", lambda m: m.transformer.drop.train(), {}),
    "the model has cross-attention": ("gpt2", lambda m: None, {"add_cross_attention": True}),
    "reorder_and_upcast_attn is set": (
        "gpt2",
        lambda m: None,
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    ),
    "the model is a ": ("gpt2", lambda m: subclassed(m.transformer), {}),
    "the model is a Other": ("opt", lambda m: subclassed(m.model), {}),
    "the layers differ in their": ("opt", other_act, {}),
    "the norms stand behind": (
        "opt",
        lambda m: setattr(m.model.decoder.layers[1], "do_layer_norm_before", False),
        {},
    ),
    "words are projected to the layers' width": (
        "opt",
        lambda m: None,
        {"word_embed_proj_dim": 24},
    ),
    "there is no norm behind": ("opt_post_norm", lambda m: None, {}),
    "there is no norm behind the layers": (
        "opt",
        lambda m: None,
        {"_remove_final_layer_norm": True},
    ),
    "the layers differ in their sizes": ("opt", other_width, {}),
    "the layer norms differ in eps": (
        "opt",
        lambda m: setattr(m.model.decoder.final_layer_norm, "eps", 1e-3),
        {},
    ),
    "an embedding renormalises its rows": (
        "opt",
        lambda m: setattr(m.model.decoder.embed_positions, "max_norm", 1.0),
        {},
    ),
    "the layer is in training mode": ("opt", lambda m: m.model.decoder.train(), {"dropout": 0.0}),
    "there is no kernel for the activation": (
        "opt",
        lambda m: None,
        {"activation_function": "quick_gelu"},
    ),
    "the causal buffer of an attention was changed": (
        "gpt_neo_within_window",
        lambda m: m.transformer.h[1].attn.attention.bias[:, :, 0, 1:3].fill_(True),
        {},
    ),
    "the maximum length is beyond the window": ("gpt_neo", lambda m: None, {"window_size": 31}),
    "the maximum length is beyond the model's": (
        "gpt_neo_within_window",
        lambda m: None,
        {"max_position_embeddings": 256},
    ),
}


@pytest.mark.parametrize("reason", CASES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_runs_the_original(reason, settings):
    kind, change, sizes = CASES[reason]
    model, inputs = changed(kind, change, **sizes), inputs_of("left", torch.device("cpu"))
    if "beyond the model's" in reason:
        settings = settings | {"max_new_tokens": 249}
    family = next(name for name in ("gpt2", "opt", "gpt_neo") if kind.startswith(name))
    name = f"{family}_{'beam_search' if 'num_beams' in settings else 'sample'}"
    try:
        own = generated(model, inputs, **settings)
    except (IndexError, RuntimeError) as error:
        own = error
    with eet_patch.enabled():
        if isinstance(own, Exception):
            with pytest.raises(type(own)):
                generated(model, inputs, **settings)
        else:
            assert torch.equal(generated(model, inputs, **settings), own)
        (told,) = eet_patch.report()[name].fallbacks
    assert told.startswith(reason)


def test_every_reason_of_a_model_has_a_case():
    for module in (gpt2, gpt_neo, opt):
        own = inspect.getsource(module).partition("# --- the model in the terms of the loops")[2]
        assert own
        for text in re.findall(r'return \(?\s*f?"([a-z][^"]* [^"]*)"', own):
            assert text.startswith(tuple(CASES)), f"no test has the reason {text!r}"


def test_a_window_of_all_tokens_but_the_last(device):
    """9 + 24 tokens, of which the last is chosen and not fed: 32 keys."""
    inputs = inputs_of("left", device)
    for settings in ({}, {"num_beams": 3}):
        model = tiny_decoder("gpt_neo", device, window_size=32)
        assert_equal_tokens("gpt_neo_within_window", model, inputs, **settings)


@pytest.mark.parametrize("which", ["gpt2", *KINDS])
def test_a_hook_on_any_module_runs(which):
    """On every module of the model but lists, which nothing calls."""

    def build():
        return tiny_gpt2() if which == "gpt2" else tiny_decoder(which)

    inputs = inputs_of("left", torch.device("cpu"))
    name = f"{KINDS.get(which, which)}_sample"
    for path, module in build().named_modules():
        if not path or isinstance(module, nn.ModuleList):
            continue
        model, calls = build(), []
        model.get_submodule(path).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        own = generated(model, inputs, max_new_tokens=3)
        expected = len(calls)
        calls.clear()
        eet_patch.reset_report()
        with eet_patch.enabled():
            assert torch.equal(generated(model, inputs, max_new_tokens=3), own)
            (reason,) = eet_patch.report()[name].fallbacks
        assert reason.endswith("has hooks, which fusion would skip"), path
        assert len(calls) == expected, path


def test_a_layer_of_another_class_runs(kind):
    """A subclass in a layer's place, and one in the place of the module of positions."""
    inputs = inputs_of("left", torch.device("cpu"))
    for find in (lambda m: layers_of(m)[1], position_table_of):
        model = tiny_decoder(kind)
        module = find(model)
        base = type(module)
        subclassed(module)
        own = generated(model, inputs)
        eet_patch.reset_report()
        with eet_patch.enabled():
            assert torch.equal(generated(model, inputs), own)
            assert_fell_back(target_of(kind, {}), f"a submodule is a Other, not a {base.__name__}")


def position_table_of(model):
    return next(
        module
        for name, module in model.named_modules()
        if name.endswith(("wpe", "embed_positions"))
    )


def test_strict_lets_the_layers_run(kind):
    model, inputs = tiny_decoder(kind), inputs_of("none", torch.device("cpu"))
    own = generated(model, inputs, max_new_tokens=1)
    layer = {"opt": "opt_layer", "gpt_neo": "gpt_neo_block"}[KINDS[kind]]
    with patched(layer, strict=True):
        assert torch.equal(generated(model, inputs, max_new_tokens=1), own)
        assert_fell_back(target_of(kind, {}), "a single token is asked for")


def test_gpt_bigcode_has_layers_alone(device):
    """Its loop is transformers' own, over replaced layers."""
    model, inputs = tiny_decoder("gpt_bigcode", device), inputs_of("left", device)
    own = generated(model, inputs)
    with patched("gpt_bigcode_block"):
        assert torch.equal(generated(model, inputs), own)
