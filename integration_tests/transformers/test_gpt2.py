"""GPT2Block patched against unpatched: caches continued in every way, masks, scales, sizes, cross-
attention.
"""

import copy
import pickle

import pytest
import torch
from helpers import BEFORE_5, batch_of, compare, patched, tiny_gpt2, token_ids
from transformers import DynamicCache

import eet_patch

NAME = "gpt2_block"
implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@implementations
@pytest.mark.parametrize("side", ["none", "right", "left", "interior"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_forward(device, implementation, side, use_cache):
    model = tiny_gpt2(device, attn_implementation=implementation)
    inputs = batch_of(side, device)
    compare(
        model,
        lambda m: m(**inputs, use_cache=use_cache).logits,
        NAME,
        keep=inputs["attention_mask"],
    )


def stepwise(m, inputs, cuts, cache=None):
    """Logits of all positions, the tokens fed in chunks that end at `cuts`."""
    ids, mask, logits, start = inputs["input_ids"], inputs["attention_mask"], [], 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for end in cuts:
        out = m(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, 1)


@implementations
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (7, 8, 9, 11), (4, 8, 11), (1, 10, 11)], ids=str)
def test_continuing_a_cache(device, dtype, implementation, side, cuts):
    """Token by token, in chunks (chunked prefill), and both."""
    model = tiny_gpt2(device, dtype, attn_implementation=implementation)
    inputs = batch_of(side, device)
    keep = inputs["attention_mask"][:, : cuts[-1]]
    compare(model, lambda m: stepwise(m, inputs, cuts), NAME, keep=keep)


@pytest.mark.parametrize("length", [60, 64, 130])
def test_growth_of_the_cache(device, length):
    """Across the blocks by which buffers grow."""
    model = tiny_gpt2(device)
    ids = token_ids(2, length + 8, device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compare(model, lambda m: stepwise(m, inputs, (length, *range(length + 1, length + 9))), NAME)


def test_chunks_without_a_mask(device):
    """No mask and a filled cache: whatever alignment the host gives causality then, ours is the
    same.
    """
    model = tiny_gpt2(device)
    ids = token_ids(2, 12, device)

    def run(m):
        cache = m(ids[:, :5], use_cache=True).past_key_values
        return m(ids[:, 5:], past_key_values=cache).logits

    compare(model, run, NAME)


def test_cached_equals_uncached(device):
    model = tiny_gpt2(device)
    inputs = batch_of("none", device)
    with torch.no_grad(), patched(NAME):
        whole = model(**inputs).logits
        steps = stepwise(model, inputs, range(1, 12))
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


# --- caches that are copied, shared, cut and reordered -------------------------------------------


def prefilled(m, device, length=6, batch=2):
    return m(token_ids(batch, length, device), use_cache=True).past_key_values


def tokens_of(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def shallow(cache):
    """A second cache whose layers share the first one's tensors."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def rebuilt(cache):
    twin = DynamicCache()
    for index, layer in enumerate(cache.layers):
        twin.update(layer.keys, layer.values, index)
    return twin


COPIES = {
    "shared": shallow,
    "rebuilt": rebuilt,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["original", "copy"])
def test_two_continuations_of_one_cache(device, how, first):
    """Neither may overwrite the other, whichever goes first; and the third step sees its own
    second.
    """
    model = tiny_gpt2(device)

    def run(m):
        cache = prefilled(m, device)
        m(token_ids(2, 1, device, seed=11), past_key_values=cache)  # room behind it is in use
        twin = COPIES[how](cache)
        branches = [(cache, 21), (twin, 31)]
        if first == "copy":
            branches.reverse()
        logits = {21: [], 31: []}
        for step in range(3):
            for branch, seed in branches:
                ids = token_ids(2, 1, device, seed=seed + step)
                logits[seed].append(m(ids, past_key_values=branch).logits)
        keys = [
            layer.keys
            for branch, _ in sorted(branches, key=lambda b: b[1])
            for layer in branch.layers
        ]
        return tuple(torch.cat(logits[seed], 1) for seed in (21, 31)) + tuple(keys)

    outs = compare(model, run, NAME)
    assert not torch.allclose(outs[0], outs[1])


def test_a_pickled_cache_knows_nothing_of_us(device):
    model = tiny_gpt2(device)
    with torch.no_grad():
        own = len(pickle.dumps(prefilled(model, device)))
        with patched(NAME):
            cache = prefilled(model, device)
            blob = pickle.dumps(cache)
    assert b"eet_patch" not in blob  # loads where we are not installed
    for (key, value), layer in zip(tokens_of(cache), pickle.loads(blob).layers, strict=True):
        assert torch.equal(layer.keys, key) and torch.equal(layer.values, value)
    assert len(blob) < 20 * own


def test_crop(device):
    model = tiny_gpt2(device)

    def run(m):
        cache = prefilled(m, device, 9)
        m(token_ids(2, 3, device, seed=4), past_key_values=cache)
        cache.crop(-7)
        assert cache.get_seq_length() == 5
        first = m(token_ids(2, 1, device, seed=5), past_key_values=cache).logits
        cache.crop(-1)
        return first, m(token_ids(2, 2, device, seed=6), past_key_values=cache).logits

    compare(model, run, NAME)


def test_crop_of_a_shared_cache_leaves_the_other_alone(device):
    model = tiny_gpt2(device)

    def run(m):
        cache = prefilled(m, device, 9)
        twin = shallow(cache)
        cache.crop(-4)
        first = m(token_ids(2, 4, device, seed=5), past_key_values=cache).logits
        return first, m(token_ids(2, 1, device, seed=6), past_key_values=twin).logits

    compare(model, run, NAME)


@pytest.mark.parametrize("beams", [[1, 0, 2], [2, 2, 2], [0, 0, 1]], ids=str)
def test_reorder(device, beams):
    model = tiny_gpt2(device)

    def run(m):
        cache = prefilled(m, device, batch=3)
        logits = []
        for step in range(3):
            logits.append(m(token_ids(3, 1, device, seed=step), past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor(beams, device=device))
        return torch.cat(logits, 1)

    compare(model, run, NAME)


def test_repeat_and_select(device):
    model = tiny_gpt2(device)

    def run(m):
        cache = prefilled(m, device)
        cache.batch_repeat_interleave(2)
        first = m(token_ids(4, 1, device), past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([0, 3], device=device))
        return first, m(token_ids(2, 1, device, seed=9), past_key_values=cache).logits

    compare(model, run, NAME)


def test_written_by_hand(device):
    """A user who changes the cache's tensors in place, or sets new ones, gets what they wrote."""
    model = tiny_gpt2(device)

    def run(m):
        cache = prefilled(m, device)
        cache.layers[0].keys.mul_(0.5)
        cache.layers[1].values = cache.layers[1].values.flip(2)
        return m(token_ids(2, 1, device, seed=9), past_key_values=cache).logits

    compare(model, run, NAME)


def test_cache_begun_unpatched_and_continued_patched_and_back(device):
    model = tiny_gpt2(device)
    inputs = batch_of("none", device)
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = model(**inputs).logits
        cache, start, logits = None, 0, []
        for end in (3, 4, 5, 6, 7):
            eet_patch.enable() if end % 2 else eet_patch.disable()
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            logits.append(out.logits)
    assert eet_patch.report()[NAME].replaced == 6
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, :7], rtol=1e-4, atol=1e-4)


def test_the_cache_holds_what_the_unpatched_holds(device):
    model = tiny_gpt2(device)
    with torch.no_grad():
        own = tokens_of(prefilled(model, device))
        with patched(NAME):
            out = tokens_of(prefilled(model, device))
    for mine, theirs in zip(out, own, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_failing_step_leaves_the_cache_as_long_as_before(device):
    """An exception in the second layer, then the same step again."""
    model = tiny_gpt2(device)
    ids = token_ids(2, 1, device, seed=9)
    with torch.no_grad():
        eet_patch.enable()
        cache = prefilled(model, device)
        expected = model(ids, past_key_values=shallow(cache)).logits
        handle = model.transformer.h[0].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        handle.remove()
        assert cache.get_seq_length() == 6
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)


def fail(module, args):
    raise ZeroDivisionError


# --- masks, scales and sizes ---------------------------------------------------------------------


@implementations
def test_users_own_four_dimensional_masks(device, implementation):
    model = tiny_gpt2(device, attn_implementation=implementation)
    ids = token_ids(2, 9, device)
    keep = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    keep[5:, :3] = False

    def run(m):
        low = torch.finfo(m.dtype).min
        mask = torch.zeros(2, 1, 9, 9, dtype=m.dtype, device=device).masked_fill(~keep, low)
        return m(ids, attention_mask=mask, use_cache=False).logits

    plain = model(ids).logits
    assert (compare(model, run, NAME) - plain).abs().max() > 1e-2


SETTINGS = [
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    {"n_inner": 40},
    {"n_inner": 333},
    {"n_embd": 160, "n_head": 2},  # head_dim 80
    {"n_embd": 256, "n_head": 1},  # head_dim 256
    {"n_embd": 24, "n_head": 3},  # head_dim 8
    {"activation_function": "relu"},
    {"activation_function": "gelu"},
    {"activation_function": "silu"},
    {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False},
]


@implementations
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings(device, dtype, implementation, settings):
    model = tiny_gpt2(device, dtype, n_layer=3, attn_implementation=implementation, **settings)
    inputs = batch_of("left", device)
    compare(
        model,
        lambda m: stepwise(m, inputs, (8, 9, 11)),
        NAME,
        keep=inputs["attention_mask"],
        calls=9,
    )


@implementations
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(device, implementation, masked):
    if BEFORE_5 and implementation == "eager":
        pytest.skip("falls back before 5.0: a case of test_never_silent.py")
    model = tiny_gpt2(device, add_cross_attention=True, attn_implementation=implementation)
    ids = token_ids(3, 6, device)
    encoder = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2)).to(device)
    inputs = {}
    if masked:
        inputs["encoder_attention_mask"] = batch_of("right", device, (7, 2, 5))["attention_mask"]

    def run(m):
        states = encoder.to(m.dtype)
        return m(ids, encoder_hidden_states=states, use_cache=False, **inputs).logits

    plain = model(ids).logits
    assert (compare(model, run, NAME) - plain).abs().max() > 1e-2


# --- the head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(device, dtype, keep):
    model, inputs = tiny_gpt2(device, dtype), batch_of("none", device)
    keep = keep.to(device) if isinstance(keep, torch.Tensor) else keep
    compare(model, lambda m: m(**inputs, logits_to_keep=keep).logits, (NAME, "gpt2_lm_head"))


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("wanted", [{}, {"return_dict": True}, {"return_dict": False}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"output_hidden_states": True}, {"use_cache": False}], ids=str
)
def test_outputs_of_the_head_are_the_hosts(device, config, wanted, options):
    """Class, keys and tuples; asked for hidden states, in either form, and by the config."""
    model, inputs = tiny_gpt2(device), batch_of("none", device)
    model.config.return_dict = config
    with torch.no_grad():
        try:
            own = model(**inputs, **options, **wanted)
        except AttributeError:
            pytest.skip("this host can't itself run with config.return_dict=False")
        with patched(NAME, "gpt2_lm_head"):
            out = model(**inputs, **options, **wanted)
    assert type(out) is type(own) and len(out) == len(own)
    if not isinstance(own, tuple):
        assert list(out) == list(own)
    torch.testing.assert_close(out[0], own[0], rtol=1e-4, atol=1e-4)


def test_positional_arguments(device):
    model, ids = tiny_gpt2(device), token_ids(2, 6, device)
    compare(model, lambda m: m(ids, None).logits, (NAME, "gpt2_lm_head"))


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_other_heads(device, head):
    model, inputs = tiny_gpt2(device, head=head), batch_of("none", device)
    compare(model, lambda m: m(**inputs)[0], NAME)
