"""Single layers patched against unpatched and against fp64: norms, activations, masks, caches,
encoder attention, attention weights.
"""

import pytest
import torch
from fairseq_helpers import DECODER, ENCODER, batch, decoder_layer, encoder_layer, tiny_model
from helpers import assert_fell_back, compare, patched

import eet_patch

B, T, S, C = 3, 7, 9, 32
SUPPORTED = ["relu", "gelu", "gelu_accurate", "relu_squared", "tanh", "linear"]
norms = pytest.mark.parametrize("normalize_before", [False, True], ids=["post", "pre"])


def dtype_of(module):
    return next(module.parameters()).dtype


def random(module, *shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    like = next(module.parameters())
    # In the dtype of the patched run first: the fp64 run gets the same numbers.
    values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    return values.to(like.device, like.dtype)


def lengths_mask(lengths, width, device, side="right"):
    positions = torch.arange(width)
    if side == "left":
        positions = positions.flip(0)
    return (positions[None] >= torch.tensor(lengths)[:, None]).to(device)


def future_mask(module, length):
    mask = torch.full((length, length), -torch.inf).triu(1)
    like = next(module.parameters())
    return mask.to(like.device, like.dtype)


# --- the encoder layer ---------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("padded", ["none", "left", "right"])
def test_encoder(device, dtype, normalize_before, padded):
    layer = encoder_layer(device, dtype, normalize_before=normalize_before)
    mask = None if padded == "none" else lengths_mask([9, 4, 6], S, device, padded)
    keep = None if mask is None else ~mask.T
    compare(layer, lambda m: m(random(m, S, B, C), mask), ENCODER, keep=keep)


@norms
@pytest.mark.parametrize("activation", SUPPORTED)
def test_encoder_activations(device, dtype, normalize_before, activation):
    layer = encoder_layer(
        device, dtype, normalize_before=normalize_before, activation_fn=activation
    )
    compare(layer, lambda m: m(random(m, S, B, C), None), ENCODER)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (40, 5)], ids=str)
def test_encoder_sizes_and_layouts(device, shape):
    """Input as (seq_len, batch) or with the two exchanged, whichever is contiguous."""
    layer = encoder_layer(device)
    length, rows = shape

    def exchanged(m):
        return random(m, rows, length, C).transpose(0, 1)

    own = compare(layer, lambda m: m(random(m, length, rows, C), None), ENCODER)
    assert own.shape == (length, rows, C)
    compare(layer, lambda m: m(exchanged(m), None), ENCODER)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
def test_encoder_mask_dtypes(device, kind):
    layer = encoder_layer(device)
    mask = lengths_mask([9, 4, 6], S, device).to(kind)
    compare(layer, lambda m: m(random(m, S, B, C), mask.bool()), ENCODER)
    with torch.no_grad(), patched(ENCODER):
        out = layer(random(layer, S, B, C), mask)
        torch.testing.assert_close(out, layer(random(layer, S, B, C), mask.bool()))


# --- the decoder layer, whole sequences -----------------------------------------------------------


def whole(m, padded=False, mask=None, **arguments):
    """One call without a cache: output and, if there are any, attention weights."""
    device = next(m.parameters()).device
    width = m.encoder_attn.kdim if m.encoder_attn is not None else C
    out, weights, _ = m(
        random(m, T, B, C),
        random(m, S, B, width, seed=4),
        lengths_mask([9, 4, 6], S, device, "left"),
        self_attn_mask=future_mask(m, T) if mask is None else mask,
        self_attn_padding_mask=lengths_mask([7, 3, 5], T, device) if padded else None,
        **arguments,
    )
    return out if weights is None else (out, weights)


@norms
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["same", "wider", "none"])
def test_decoder(device, dtype, normalize_before, padded, kind):
    layer = decoder_layer(
        device,
        dtype,
        no_encoder_attn=kind == "none",
        normalize_before=normalize_before,
        encoder__embed_dim=48 if kind == "wider" else C,
    )
    layer.need_attn = False
    compare(layer, lambda m: whole(m, padded), DECODER)


@norms
@pytest.mark.parametrize("activation", SUPPORTED)
def test_decoder_activations(device, dtype, normalize_before, activation):
    layer = decoder_layer(
        device, dtype, normalize_before=normalize_before, activation_fn=activation
    )
    compare(layer, whole, DECODER)


@pytest.mark.parametrize("need", ["need_attn", "need_head_weights", "by default"])
def test_attention_weights(device, dtype, need):
    layer = decoder_layer(device, dtype)
    layer.need_attn = need == "by default"
    arguments = {} if need == "by default" else {need: True}
    _, weights = compare(layer, lambda m: whole(m, **arguments), DECODER)
    heads = (4,) if need == "need_head_weights" else ()
    assert weights.shape == (*heads, B, T, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_masks_of_the_users_own(device):
    """An additive mask that is not causal, with and without padding, is read as it is."""
    layer = decoder_layer(device)
    banded = torch.full((T, T), -torch.inf).triu(1) + torch.full((T, T), -torch.inf).tril(-4)
    wider = torch.zeros(T + 1, T + 1, device=device).fill_(-0.5)[:T, :T]
    for mask in (banded.to(device), wider, torch.zeros(T, T, device=device)):
        for padded in (False, True):
            compare(layer, lambda m, p=padded, k=mask: whole(m, p, k.to(dtype_of(m))), DECODER)


def test_a_causal_mask_that_changes_in_place(device):
    """What was seen of a mask holds for as long as the mask does not change."""
    layer = decoder_layer(device)
    mask = future_mask(layer, T)
    compare(layer, lambda m: whole(m, mask=mask.to(dtype_of(m))), DECODER)
    mask[5, 2] = -torch.inf
    compare(layer, lambda m: whole(m, mask=mask.to(dtype_of(m))), DECODER)


def test_in_inference_mode(device):
    """Tensors without a version count: their mask is read, and not taken for a causal one."""
    layer = decoder_layer(device)
    with torch.inference_mode():
        own = whole(layer)[0]
        with patched(DECODER):
            out = whole(layer)[0]
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-5)


def test_without_encoder_out(device):
    """A layer with encoder attention that is given no encoder's output leaves it out."""
    layer = decoder_layer(device)
    compare(layer, lambda m: m(random(m, T, B, C), self_attn_mask=future_mask(m, T))[0], DECODER)


# --- the decoder layer, token by token ------------------------------------------------------------


def stepwise(m, order=None, padding=(), rows=B, **arguments):
    """Six steps over a cache; `order` reorders its rows after steps 2 and 4, `padding` masks steps.

    Returns the outputs, the attention weights if there are any, and the state at the end.
    """
    state, outs, weights = {}, [], []
    device = next(m.parameters()).device
    x = random(m, 6, B, C)
    encoder_out = mask = None
    if m.encoder_attn is not None:
        encoder_out = random(m, S, rows, m.encoder_attn.kdim, seed=4)
        mask = lengths_mask([9, 4, 6][:rows], S, device, "left")
    for step in range(6):
        padded = torch.zeros(B, 1, dtype=torch.bool, device=device)
        padded[0] = step in padding
        out, formed, _ = m(
            x[step : step + 1],
            encoder_out,
            mask,
            state,
            self_attn_padding_mask=padded if padded.any() else None,
            **arguments,
        )
        outs.append(out)
        weights += [] if formed is None else [formed]
        if order is not None and step in (2, 4):
            for name in ("self_attn", "encoder_attn"):
                if getattr(m, name) is not None:
                    rows_now = torch.tensor(order, device=device)
                    getattr(m, name).reorder_incremental_state(state, rows_now)
    attentions = [a for a in (m.self_attn, m.encoder_attn) if a is not None]
    kept = [t for a in attentions for t in a._get_input_buffer(state).values() if t is not None]
    # All steps together: over the hundred numbers of one, bfloat16's rounding is a matter of luck.
    return (torch.cat(outs), *([torch.cat(weights)] if weights else []), *kept)


@norms
@pytest.mark.parametrize("padding", [(), (2, 3)], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["same", "wider", "none"])
def test_steps(device, dtype, normalize_before, padding, kind):
    """Outputs and the cache itself are the host's, in its own format."""
    layer = decoder_layer(
        device,
        dtype,
        no_encoder_attn=kind == "none",
        normalize_before=normalize_before,
        encoder__embed_dim=48 if kind == "wider" else C,
    )
    layer.need_attn = False
    compare(layer, lambda m: stepwise(m, padding=padding), DECODER)


# Beams with one parent share its past; the same order twice is another order; rows change places.
@pytest.mark.parametrize("order", [[0, 0, 0], [1, 0, 2], [2, 2, 0]], ids=str)
@pytest.mark.parametrize("kind", ["encoder", "none"])
def test_steps_with_reordered_rows(device, dtype, order, kind):
    layer = decoder_layer(device, dtype, no_encoder_attn=kind == "none")
    compare(layer, lambda m: stepwise(m, order), DECODER)


@pytest.mark.parametrize("need", ["need_attn", "need_head_weights"])
def test_steps_with_attention_weights(device, need):
    layer = decoder_layer(device)
    compare(layer, lambda m: stepwise(m, [0, 0, 2], **{need: True}), DECODER)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("need", [False, True])
def test_beams_that_share_an_encoder(device, rows, need):
    """BART: one row of the encoder for the three beams of a sentence, however it is passed."""
    layer = decoder_layer(device)
    layer.encoder_attn.set_beam_size(3)
    layer.need_attn = False
    compare(layer, lambda m: stepwise(m, [0, 0, 2], rows=rows, need_head_weights=need), DECODER)


def test_rows_that_end_early(device):
    """Fewer rows from one step to the next."""
    layer = decoder_layer(device)

    def run(m):
        state, outs, x = {}, [], random(m, 4, B, C)
        encoder_out = random(m, S, B, C, seed=4)
        for step, rows in enumerate(([0, 1, 2], [2, 0], [0], [0])):
            outs.append(m(x[step : step + 1, : len(rows)], encoder_out, None, state)[0])
            following = torch.tensor(([2, 0], [0], [0], [0])[step], device=device)
            for attention in (m.self_attn, m.encoder_attn):
                attention.reorder_incremental_state(state, following)
            encoder_out = encoder_out.index_select(1, following)
        return tuple(outs)

    compare(layer, run, DECODER)


def test_several_tokens_at_once_over_a_cache(device):
    """fairseq masks nothing then: the new tokens see each other."""
    layer = decoder_layer(device)

    def run(m):
        state, x, encoder_out = {}, random(m, 8, B, C), random(m, S, B, C, seed=4)
        parts = x[:3], x[3:5], x[5:]
        return tuple(m(part, encoder_out, None, state)[0] for part in parts)

    compare(layer, run, DECODER)


@pytest.mark.parametrize("first", ["patched", "unpatched"])
def test_switching_within_a_sequence(device, first):
    """fairseq's own layer goes on from a cache that ours made, and the other way round."""
    layer, results = decoder_layer(device), []
    for switched in (False, True):
        state, x = {}, random(layer, 6, B, C)
        encoder_out, mask = random(layer, S, B, C, seed=4), lengths_mask([9, 4, 6], S, device)
        outs = []
        for step in range(6):
            ours = switched and (step < 3) == (first == "patched")
            with torch.no_grad(), eet_patch.enabled(only=() if not ours else DECODER):
                outs.append(layer(x[step : step + 1], encoder_out, mask, state)[0])
        results.append(torch.cat(outs))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert eet_patch.report()[DECODER].replaced == 3


def test_encoder_out_is_honoured(device):
    """Another encoder's output gives another answer, with a cache and without."""
    layer = decoder_layer(device)
    with torch.no_grad(), patched(DECODER):
        for state in (None, {}):
            x, results = random(layer, 1, B, C), []
            for seed in (4, 5):
                encoder_out = random(layer, S, B, C, seed=seed)
                state = None if state is None else {}
                results.append(layer(x, encoder_out, None, state)[0])
            assert (results[0] - results[1]).abs().max() > 0.1


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
        {"encoder_learned_pos": True, "decoder_learned_pos": True, "activation_fn": "gelu"},
        {"layernorm_embedding": True, "no_scale_embedding": True},
        {"encoder_embed_dim": 48},
    ],
    ids=["default", "pre_norm", "learned_pos", "layernorm_embedding", "wider_encoder"],
)
def test_a_model_teacher_forced(device, dtype, changes):
    model = tiny_model(device, dtype, **changes)
    source, target = batch([9, 5, 7], "left", device), batch([6, 8, 3], "right", device, seed=2)

    def run(m):
        logits, extra = m(source, None, target)
        return logits, extra["attn"][0]

    with torch.no_grad():
        compare(model, run, (ENCODER, DECODER), keep=target != 1)


def test_learned_positions_count(device):
    """The same token at another position has another output: positions reach the patched layers."""
    model = tiny_model(device, encoder_learned_pos=True, decoder_learned_pos=True)
    source = batch([5], "left", device).repeat(2, 1)
    target = torch.full((2, 6), 7, device=device)
    with torch.no_grad(), patched(DECODER):
        logits = model(source, None, target)[0]
    assert (logits[0, 2] - logits[0, 4]).abs().max() > 0.02


def test_gradients_run_the_original(device):
    """Training: bit for bit what it was."""
    model = tiny_model(device, dropout=0.0).train()
    source, target = batch([9, 5, 7], "left", device), batch([6, 8, 3], "right", device, seed=2)

    def gradients():
        model.zero_grad()
        model(source, None, target)[0].logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    own = gradients()
    with pytest.warns(eet_patch.PatchWarning), eet_patch.enabled():
        from eet_patch import patching

        patching._warned.discard("gradients")
        out = gradients()
    assert_fell_back(DECODER, "gradients are needed", 2)
    assert all(torch.equal(a, b) for a, b in zip(out, own, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_gradients_through_the_state_alone(device):
    """A frozen decoder behind a prompt that is being trained: only the cache needs gradients."""
    layer = decoder_layer(device, no_encoder_attn=True).requires_grad_(False)
    prompt = random(layer, 1, B, C).requires_grad_()
    following = random(layer, 1, B, C, seed=5)

    def gradient():
        state = {}
        layer(prompt, incremental_state=state)
        out, _, _ = layer(following, incremental_state=state)
        return torch.autograd.grad(out.square().sum(), prompt)[0]

    own = gradient()
    with eet_patch.enabled():
        out = gradient()
    assert_fell_back(DECODER, "gradients are needed", 2)
    assert torch.equal(out, own)
