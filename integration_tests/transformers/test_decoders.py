"""OPT, GPT-Neo, GPTBigCode and DecisionTransformer patched against unpatched at the layer level:
forward passes, caches continued, masks, sizes, and generate() in every way. GPT-2 has tests of its
own.
"""

import functools

import helpers
import pytest
import torch
import transformers
from helpers import (
    DECODERS,
    HOST,
    assert_fell_back,
    assert_same_tokens,
    batch_of,
    compare,
    layers_of,
    padding,
    randomised,
    tiny_decoder,
    token_ids,
)
from packaging.version import Version
from transformers import DynamicCache, StaticCache
from transformers.models.decision_transformer import modeling_decision_transformer

import eet_patch
from eet_patch.adapters.kv_cache import self_attention_cache

LOOPS = tuple(target.name for target in eet_patch.TARGETS if target.level == "loop")
patched = functools.partial(helpers.patched, exclude=LOOPS)
compare = functools.partial(compare, exclude=LOOPS)
PROMPT = 11
SIDES = pytest.mark.parametrize("side", ["none", "left"])


@pytest.fixture(params=DECODERS)
def kind(request):
    return request.param


def implementations_of(kind):
    return ["eager"] if kind.startswith("gpt_neo") else ["sdpa", "eager"]


KINDS_AND_IMPLEMENTATIONS = pytest.mark.parametrize(
    "kind, implementation", [(kind, name) for kind in DECODERS for name in implementations_of(kind)]
)


def build(kind, device, dtype=torch.float32, **changes):
    return tiny_decoder(kind, device, dtype, **changes), DECODERS[kind][1]


# --- forward passes ------------------------------------------------------------------------------


@KINDS_AND_IMPLEMENTATIONS
@pytest.mark.parametrize("side", ["none", "right", "left", "interior"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_forward(device, kind, implementation, side, use_cache):
    model, name = build(kind, device, attn_implementation=implementation)
    inputs = batch_of(side, device)
    compare(
        model,
        lambda m: m(**inputs, use_cache=use_cache).logits,
        name,
        keep=inputs["attention_mask"],
        calls=2,
    )


# Least; decode-sized products; more rows than any skinny kernel takes; long enough for torch's own
# attention on CUDA.
@KINDS_AND_IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 70), (1, 256)])
def test_shapes(device, dtype, kind, implementation, shape):
    model, name = build(kind, device, dtype, attn_implementation=implementation)
    ids = token_ids(*shape, device)
    compare(model, lambda m: m(ids, use_cache=False).logits, name, calls=2)


def stepwise(m, inputs, cuts):
    """Logits of all positions, the tokens fed in chunks that end at `cuts`."""
    ids, mask, logits, start, cache = inputs["input_ids"], inputs["attention_mask"], [], 0, None
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


@KINDS_AND_IMPLEMENTATIONS
@SIDES
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (7, 8, 9, 11), (4, 8, 11), (1, 10, 11)], ids=str)
def test_continuing_a_cache(device, dtype, kind, implementation, side, cuts):
    model, name = build(kind, device, dtype, attn_implementation=implementation)
    inputs = batch_of(side, device)
    keep = inputs["attention_mask"][:, : cuts[-1]]
    compare(model, lambda m: stepwise(m, inputs, cuts), name, keep=keep)


@pytest.mark.parametrize("length", [60, 130])
def test_growth_of_the_cache(device, kind, length):
    """Across the blocks by which buffers grow."""
    model, name = build(kind, device)
    ids = token_ids(2, length + 8, device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compare(model, lambda m: stepwise(m, inputs, (length, *range(length + 1, length + 9))), name)


def test_chunks_without_a_mask(device, kind):
    model, name = build(kind, device)
    ids = token_ids(2, 12, device)

    def run(m):
        cache = m(ids[:, :5], use_cache=True).past_key_values
        return m(ids[:, 5:], past_key_values=cache).logits

    compare(model, run, name)


def test_what_the_cache_holds(device, kind):
    model, name = build(kind, device)
    inputs = batch_of("none", device)
    with torch.no_grad():
        own = self_attention_cache(model(**inputs, use_cache=True).past_key_values)
        with patched(name):
            out = self_attention_cache(model(**inputs, use_cache=True).past_key_values)
    for mine, theirs in zip(out.layers, own.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)


def test_what_a_layer_returns(device, kind):
    """The host's type; of a tuple the hidden states, and None for weights that nobody asked for."""
    model, name = build(kind, device)
    layer, x = layers_of(model)[0], torch.randn(2, 5, 48, device=device)
    with torch.no_grad():
        own = layer(x)
        with patched(name):
            out = layer(x)
    assert type(out) is type(own)
    if isinstance(own, tuple):
        assert len(out) == len(own) and all(value is None for value in out[1:])
        own, out = own[0], out[0]
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)


def test_an_empty_batch(device, kind):
    model, name = build(kind, device)
    layer, x = layers_of(model)[0], torch.randn(0, 5, 48, device=device)
    with torch.no_grad(), patched(name):
        out = layer(x)
    assert (out[0] if isinstance(out, tuple) else out).shape == (0, 5, 48)


SETTINGS = [
    ("opt", {"enable_bias": False}),
    ("opt", {"activation_function": "gelu"}),
    ("opt", {"activation_function": "silu", "ffn_dim": 333}),
    ("opt", {"word_embed_proj_dim": 24}),
    ("opt", {"hidden_size": 160, "num_attention_heads": 2, "word_embed_proj_dim": 160}),
    ("opt_post_norm", {"enable_bias": False, "ffn_dim": 40}),
    ("opt_post_norm", {"word_embed_proj_dim": 24}),
    ("gpt_neo", {"intermediate_size": 333, "layer_norm_epsilon": 0.1}),
    ("gpt_neo", {"activation_function": "gelu", "hidden_size": 256, "num_heads": 1}),
    ("gpt_bigcode", {"scale_attn_weights": False}),
    ("gpt_bigcode", {"attention_softmax_in_fp32": False, "n_inner": 333}),
    ("gpt_bigcode", {"n_embd": 160, "n_head": 2, "layer_norm_epsilon": 0.1}),
    ("gpt_bigcode_all_heads", {"activation_function": "relu", "n_embd": 24, "n_head": 3}),
]


@pytest.mark.parametrize("kind, settings", SETTINGS, ids=str)
def test_settings(device, dtype, kind, settings):
    model, name = build(kind, device, dtype, **settings)
    inputs = batch_of("left", device)
    keep = inputs["attention_mask"]
    compare(model, lambda m: stepwise(m, inputs, (8, 9, 11)), name, keep=keep, calls=6)


@pytest.mark.parametrize("kind, heads", [("opt", 12), ("gpt_neo", 12), ("gpt_bigcode", 12)])
def test_real_widths(device, dtype, kind, heads):
    sizes = {"opt": {"num_attention_heads": heads, "word_embed_proj_dim": 768, "ffn_dim": 3072}}
    sizes["gpt_neo"], sizes["gpt_bigcode"] = {"num_heads": heads}, {"n_head": heads}
    width = {"n_embd": 768} if kind == "gpt_bigcode" else {"hidden_size": 768}
    model, name = build(kind, device, dtype, **sizes[kind], **width)
    inputs = batch_of("left", device, (33, 12))
    compare(model, lambda m: m(**inputs).logits, name, keep=inputs["attention_mask"])


# --- the window of GPT-Neo's local layers --------------------------------------------------------


@SIDES
@pytest.mark.parametrize("window", [1, 2, 5, 10, 11, 12])
@pytest.mark.parametrize("cuts", [(11,), (4, 8, 11), (10, 11), (1, 2, 3, 4)], ids=str)
def test_windows(device, dtype, side, window, cuts):
    """Narrower than a chunk, as wide as the keys, wider; the last step sees the window alone."""
    model, name = build("gpt_neo", device, dtype, window_size=window)
    inputs = batch_of(side, device)
    keep = inputs["attention_mask"][:, : cuts[-1]]
    compare(model, lambda m: stepwise(m, inputs, cuts), name, keep=keep)


def test_a_window_matters(device):
    """Else the test above would prove little."""
    ids = token_ids(2, 11, device)
    narrow, wide = (build("gpt_neo", device, window_size=size)[0] for size in (3, 11))
    with torch.no_grad(), patched("gpt_neo_block"):
        assert (narrow(ids).logits - wide(ids).logits).abs().max() > 1e-2


def test_a_users_cache(device):
    """It has no layers yet when the prompt comes, which is longer than the window."""
    model, name = build("gpt_neo", device)
    ids = token_ids(2, 12, device)

    def run(m):
        cache = DynamicCache()
        first = m(ids[:, :9], past_key_values=cache).logits
        return torch.cat([first, m(ids[:, 9:], past_key_values=cache).logits], 1)

    compare(model, run, name)


@pytest.mark.parametrize("window", [4, 256])
def test_users_own_four_dimensional_masks(device, window):
    model, name = build("gpt_neo", device, window_size=window)
    ids = token_ids(2, 9, device)
    keep = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    keep[5:, 6] = False

    def run(m):
        low = torch.finfo(torch.float32).min
        mask = torch.zeros(2, 1, 9, 9, device=device).masked_fill(~keep, low)
        return m(ids, attention_mask=mask.to(m.dtype), use_cache=False).logits

    with torch.no_grad():
        plain = model(ids).logits
    real = keep.any(1).expand(2, 9) & (torch.arange(9, device=device) != 6)
    out = compare(model, run, name, keep=real)
    assert (out - plain).abs().max() > 1e-2


# --- generate() ----------------------------------------------------------------------------------


def generated(model, inputs, seed=5, **settings):
    torch.manual_seed(seed)
    wanted = {"max_new_tokens": 24, "do_sample": False}
    return model.generate(**inputs, **wanted | settings)


def assert_equal_tokens(kind, device, side="left", **settings):
    model, name = build(kind, device)
    inputs = batch_of(side, device, vocab_size=500)
    own = generated(model, inputs, **settings)
    state = torch.rand(2), torch.rand(2, device=device)
    with patched(name):
        out = generated(model, inputs, **settings)
    assert len(own[:, PROMPT:].unique()) > (1 if kind == "opt_post_norm" else 8)
    assert torch.equal(out, own)
    assert torch.equal(torch.rand(2), state[0]) or device.type == "cuda"
    assert torch.equal(torch.rand(2, device=device), state[1]) or device.type == "cpu"


@SIDES
def test_greedy(device, dtype, kind, side):
    model, name = build(kind, device, dtype)
    inputs = batch_of(side, device, vocab_size=500)
    own = generated(model, inputs)
    with patched(name):
        out = generated(model, inputs)
    assert_same_tokens(model, PROMPT, own, out, attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"repetition_penalty": 1.4},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
    ],
    ids=str,
)
def test_generate(device, kind, settings):
    assert_equal_tokens(kind, device, **settings)


@SIDES
def test_static_cache(device, kind, side):
    model, name = build(kind, device)
    inputs = batch_of(side, device, vocab_size=500)

    def run():
        cache = StaticCache(config=model.config, max_cache_len=64)
        return generated(model, inputs, past_key_values=cache, disable_compile=True)

    own = run()
    if kind != "gpt_neo":
        with patched(name):
            assert torch.equal(run(), own)
        return
    with eet_patch.enabled(exclude=LOOPS):
        assert torch.equal(run(), own)
    row = eet_patch.report()[name]  # 24 tokens: the global layer and the local one
    assert (row.replaced, row.fallbacks) == (24, {"a local layer over a static cache": 24})


# --- DecisionTransformer -------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)], ids=str)
def test_decision_transformer(device, dtype, implementation, lengths):
    config = transformers.DecisionTransformerConfig(
        state_dim=5,
        act_dim=3,
        hidden_size=48,
        n_layer=2,
        n_head=4,
        max_ep_len=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = randomised(transformers.DecisionTransformerModel(config)).to(device, dtype)
    model.encoder.config._attn_implementation = implementation
    generator = torch.Generator().manual_seed(0)
    states, actions, rewards, returns = (
        torch.randn(2, 7, width, generator=generator).to(device) for width in (5, 3, 1, 1)
    )
    mask = padding(lengths, 7, "left", device)

    def run(m):
        out = m(
            states=states.to(m.dtype),
            actions=actions.to(m.dtype),
            rewards=rewards.to(m.dtype),
            returns_to_go=returns.to(m.dtype),
            timesteps=torch.arange(7, device=device).repeat(2, 1),
            attention_mask=mask,
        )
        return out.state_preds, out.action_preds

    compare(model, run, "decision_transformer_block", keep=mask, calls=2)


@pytest.mark.parametrize("cross", [False, True])
def test_decision_transformers_decoder(device, cross):
    """Its GPT-2 by itself: a cache, cross-attention."""
    config = transformers.DecisionTransformerConfig(
        hidden_size=48,
        n_layer=2,
        n_head=4,
        vocab_size=300,
        add_cross_attention=cross,
        bos_token_id=0,
        eos_token_id=0,
    )
    host = modeling_decision_transformer.DecisionTransformerGPT2Model
    model = randomised(host(config)).to(device)
    embeds = torch.randn(2, 9, 48, device=device)
    more = {}
    if cross:
        more["encoder_hidden_states"] = torch.randn(2, 6, 48, device=device)

    def run(m):
        own = {key: value.to(m.dtype) for key, value in more.items()}
        x = embeds.to(m.dtype)
        if cross:
            return m(inputs_embeds=x, use_cache=False, **own).last_hidden_state
        first = m(inputs_embeds=x[:, :6], use_cache=True)
        cache = first.past_key_values
        second = m(inputs_embeds=x[:, 6:], past_key_values=cache, use_cache=True)
        return torch.cat([first.last_hidden_state, second.last_hidden_state], 1)

    compare(model, run, "decision_transformer_block")


# --- nothing that fusion skips is skipped silently -----------------------------------------------


def doubled(module, args, out):
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


def paths_of(kind):
    return [path for path, _ in layers_of(tiny_decoder(kind))[0].named_modules() if path]


def test_a_hook_on_any_submodule_runs(device, kind):
    """Every one: a gate that forgets a module would drop what its hook does."""
    ids = token_ids(2, 6, device)
    for path in paths_of(kind):
        model, name = build(kind, device)
        module = layers_of(model)[0].get_submodule(path)
        module.register_forward_hook(doubled)
        with torch.no_grad():
            own = model(ids).logits
            eet_patch.reset_report()
            with eet_patch.enabled():
                out = model(ids).logits
        row = eet_patch.report()[name]
        reason = f"a submodule ({type(module).__name__}) has hooks, which fusion would skip"
        assert row.fallbacks == {reason: 1} and row.replaced == 1, path
        torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)


def test_a_replaced_submodule_runs(device, kind):
    """Every one, by a subclass of its class that does something else."""
    ids = token_ids(2, 6, device)
    for path in paths_of(kind):
        model, name = build(kind, device)
        module = layers_of(model)[0].get_submodule(path)
        base = type(module)

        class Other(base):
            def forward(self, *args, _base=base, **kwargs):
                return doubled(self, args, _base.forward(self, *args, **kwargs))

        module.__class__ = Other
        with torch.no_grad():
            own = model(ids).logits
            eet_patch.reset_report()
            with eet_patch.enabled():
                out = model(ids).logits
        row = eet_patch.report()[name]
        reason = f"a submodule is a Other, not a {base.__name__}"
        if path.rpartition(".")[2] in ("act", "activation_fn"):
            reason = "there is no kernel for the activation Other"
        assert row.fallbacks == {reason: 1}, path
        torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)


def test_any_weight_that_changes_is_seen(device, kind):
    """In place, and by another parameter; of every parameter of the layer."""
    model, name = build(kind, device)
    layer, ids = layers_of(model)[0], token_ids(2, 6, device)
    with torch.no_grad(), patched(name):
        model(ids)
    for path, parameter in list(layer.named_parameters()):
        for swap in (False, True):
            owner, _, leaf = path.rpartition(".")
            with torch.no_grad():
                if swap:
                    changed = torch.nn.Parameter(parameter + 0.5)
                    setattr(layer.get_submodule(owner), leaf, changed)
                else:
                    parameter.add_(0.5)
                own = model(ids).logits
                with patched(name):
                    out = model(ids).logits
            torch.testing.assert_close(out, own, rtol=1e-3, atol=1e-3, msg=path)


def test_flash_attention_of_gpt_neo_is_another_class(monkeypatch):
    """No flash attention runs here; its class must not be taken for the one that we replace."""
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoFlashAttention2

    model, name = build("gpt_neo", "cpu", num_layers=1, attention_types=[[["global"], 1]])
    own = model.transformer.h[0].attn.attention
    own.__class__ = GPTNeoFlashAttention2
    monkeypatch.setattr(GPTNeoFlashAttention2, "forward", lambda self, x, **_: (x * 2, None))
    ids = token_ids(1, 4)
    with torch.no_grad():
        expected = model(ids).logits
        with eet_patch.enabled():
            assert torch.equal(model(ids).logits, expected)
    assert_fell_back(name, "a submodule is a GPTNeoFlashAttention2, not a GPTNeoSelfAttention")


def test_bool_masks_of_eager_attention(device, kind):
    """The host adds them to the scores, as numbers."""
    model, name = build(kind, device, attn_implementation="eager")
    layer, x = layers_of(model)[0], torch.randn(2, 5, 48, device=device)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device).tril()
    with torch.no_grad():
        own = layer(x, attention_mask=mask)
        with eet_patch.enabled():
            out = layer(x, attention_mask=mask)
    reason = "the attention mask is bool, and eager attention adds it to the scores"
    assert_fell_back(name, reason)
    own, out = (value[0] if isinstance(value, tuple) else value for value in (own, out))
    assert torch.equal(out, own)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_prefix_written_into_the_causal_buffer(device, when):
    model, name = build("gpt_neo", device)
    ids = token_ids(2, 9, device)

    def change():
        model.transformer.h[0].attn.attention.bias[:, :, :4, :4] = True

    with torch.no_grad(), eet_patch.enabled():
        if when == "before":
            change()
        first = model(ids).logits
        if when == "between":
            change()
        eet_patch.reset_report()
        out = model(ids).logits
        row = eet_patch.report()[name]
        assert row.fallbacks == {"the causal buffer of an attention was changed": 1}
        assert row.replaced == 1
        eet_patch.disable()
        torch.testing.assert_close(out, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(out, first) == (when == "before")


@pytest.mark.skipif(HOST < Version("5.2"), reason="its masks are cut to the keys")
def test_a_mask_longer_than_the_keys(device):
    """The host raises; so must the patched call."""
    layer, x = layers_of(build("gpt_neo", device)[0])[0], torch.randn(2, 5, 48, device=device)
    mask = torch.zeros(2, 1, 5, 7, device=device)
    with torch.no_grad(), eet_patch.enabled(), pytest.raises(RuntimeError):
        layer(x, attention_mask=mask)
