"""EETTransformer...: the model-level API against fairseq's own classes."""

import copy

import pytest
import torch
from fairseq_helpers import PAD, batch, decoder_layer, tiny_model
from helpers import assert_as_accurate, in_double
from test_layers import future_mask, lengths_mask, random

from eet_patch import models

B, T, S, C = 3, 7, 9, 32
norms = pytest.mark.parametrize("normalize_before", [False, True], ids=["post", "pre"])


def check(own, ours, run_own, run_ours=None, keep=None):
    with torch.no_grad():
        truth, expected, out = run_own(in_double(own)), run_own(own), (run_ours or run_own)(ours)
    if keep is not None:
        truth, expected, out = truth[keep], expected[keep], out[keep]
    assert_as_accurate(out, expected, truth)


def assert_shares(ours, own):
    mine = {id(p): p.data_ptr() for p in ours.parameters()}
    theirs = {id(p): p.data_ptr() for p in own.parameters()}
    assert mine and mine.items() <= theirs.items()


@norms
def test_parts(device, dtype, normalize_before):
    layer = decoder_layer(device, dtype, normalize_before=normalize_before)

    ours = models.EETTransformerLayerNorm.from_torch(layer.final_layer_norm)
    check(layer.final_layer_norm, ours, lambda m: m(random(m, T, B, C)))
    assert_shares(ours, layer.final_layer_norm)

    ours = models.EETTransformerAttention.from_torch(layer.self_attn)
    padding = lengths_mask([7, 4, 6], T, device)

    def attend(m):
        x = random(m, T, B, C)
        return m(
            x, x, x, key_padding_mask=padding, need_weights=False, attn_mask=future_mask(m, T)
        )[0]

    check(layer.self_attn, ours, attend, keep=~padding.T)
    assert_shares(ours, layer.self_attn)

    ours = models.EETTransformerAttention.from_torch(layer.encoder_attn)
    source = lengths_mask([9, 4, 6], S, device)

    def attend_source(m):
        encoder = random(m, S, B, C, seed=8)
        x = random(m, T, B, C)
        return m(x, encoder, encoder, key_padding_mask=source, static_kv=True, need_weights=False)[
            0
        ]

    check(layer.encoder_attn, ours, attend_source)

    ours = models.EETTransformerFeedforward.from_torch(layer)

    def feed_forward(m):
        x = random(m, T, B, C)
        inner = m.final_layer_norm(x) if m.normalize_before else x
        out = x + m.fc2(m.activation_fn(m.fc1(inner)))
        return out if m.normalize_before else m.final_layer_norm(out)

    check(layer, ours, feed_forward, lambda m: m(random(m, T, B, C)))
    assert_shares(ours, layer)


@norms
@pytest.mark.parametrize("encoder", [True, False], ids=["translation", "language model"])
def test_decoder_layer(device, dtype, normalize_before, encoder):
    layer = decoder_layer(
        device, dtype, no_encoder_attn=not encoder, normalize_before=normalize_before
    )
    ours = models.EETTransformerDecoderLayer.from_torch(layer)
    assert_shares(ours, layer)
    source = lengths_mask([9, 4, 6], S, device)

    def run(m):
        states = random(m, S, B, C, seed=8) if encoder else None
        mask = source if encoder else None
        return m(random(m, T, B, C), states, mask, self_attn_mask=future_mask(m, T))[0]

    def step_by_step(m):
        states = random(m, S, B, C, seed=8) if encoder else None
        mask, state, x = (source if encoder else None), {}, random(m, T, B, C)
        return torch.cat([m(x[t : t + 1], states, mask, state)[0] for t in range(T)])

    check(layer, ours, run)
    check(layer, ours, step_by_step)


def encoded(model, source):
    return model.encoder(source, (source != PAD).sum(1))


@norms
@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
def test_decoder(device, dtype, normalize_before, learned):
    model = tiny_model(
        device,
        dtype,
        decoder_normalize_before=normalize_before,
        decoder_learned_pos=learned,
        layernorm_embedding=learned,
        share_decoder_input_output_embed=learned,
    )
    ours = models.EETTransformerDecoder.from_torch(model.decoder)
    assert_shares(ours, model.decoder)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in model.decoder.parameters()}
    source, target = batch((9, 4, 6), "left", device), batch((7, 5, 6), "right", device, seed=2)

    with torch.no_grad():
        double = in_double(model)
        truth = double.decoder(target, encoded(double, source))[0]
        encoder_out = encoded(model, source)
        expected, out = model.decoder(target, encoder_out)[0], ours(target, encoder_out)[0]
        keep = target != PAD
        assert_as_accurate(out[keep], expected[keep], truth[keep])
        features = ours(target, encoder_out, features_only=True)[0]
        assert torch.equal(ours.output_layer(features), out)


@pytest.mark.parametrize("learned", [False, True], ids=["sinusoidal", "learned"])
def test_embedding(device, dtype, learned):
    model = tiny_model(device, dtype, decoder_learned_pos=learned)
    ours = models.EETTransformerEmbedding.from_torch(model.decoder)
    tokens = batch((7, 5, 6), "left", device)

    def run(m):
        return m.embed_scale * m.embed_tokens(tokens) + m.embed_positions(tokens)

    check(model.decoder, ours, run, lambda m: m(tokens), keep=tokens != PAD)


def test_steps_prefix_and_changing_batches(device):
    """Steps, and a prefix at once, are the whole pass; rows may be reordered and end between."""
    model = tiny_model(device)
    ours = models.EETTransformerDecoder.from_torch(model.decoder)
    source, target = batch((9, 4, 6), "left", device), batch((7, 7, 7), "right", device, seed=2)
    order = torch.tensor([2, 0], device=device)
    with torch.no_grad():
        encoder_out = encoded(model, source)
        expected = model.decoder(target, encoder_out)[0]
        state, host_state = {}, {}
        for t in range(1, 8):
            step = ours(target[:, :t], encoder_out, state)[0]
            host = model.decoder(target[:, :t], encoder_out, host_state)[0]
            torch.testing.assert_close(step, host, rtol=1e-4, atol=1e-4)
        state = {}
        prefix = ours(target[:, :4], encoder_out, state)[0]
        torch.testing.assert_close(prefix, expected[:, :4], rtol=1e-4, atol=1e-4)
        ours.reorder_incremental_state(state, order)
        rest = ours(target[order], model.encoder.reorder_encoder_out(encoder_out, order), state)[0]
        torch.testing.assert_close(rest, expected[order, 4:], rtol=1e-4, atol=1e-4)


def test_left_padding_keeps_positions(device):
    """What EET calls pre-padding: a padded row goes on as the row alone does."""
    model = tiny_model(device)
    ours = models.EETTransformerDecoder.from_torch(model.decoder)
    source = batch((9, 9), "left", device)
    target = batch((7, 4), "left", device, seed=2)
    with torch.no_grad():
        encoder_out, state = encoded(model, source), {}
        ours(target[:, :6], encoder_out, state)
        out = ours(target, encoder_out, state)[0][1, -1]
        alone = model.decoder(target[1:, 3:], encoded(model, source[1:]))[0][0, -1]
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)


def test_from_pretrained(trained, device):
    path, data = trained / "translation" / "model.pt", trained / "corpus" / "data"
    if not path.exists():
        path = next(trained.glob("*/model.pt"))
    ours = models.EETTransformerDecoder.from_pretrained(str(path), str(data)).to(device)
    assert isinstance(ours, models.EETTransformerDecoder)
    assert not any(p.requires_grad and p.grad is not None for p in ours.parameters())
    with pytest.raises(OSError):
        models.EETTransformerDecoder.from_pretrained("no/such/model.pt")


def test_bad_arguments():
    model = tiny_model()
    ours = models.EETTransformerDecoder.from_torch(model.decoder)
    tokens = batch((5, 5), "right")
    odd = copy.deepcopy(model.decoder)
    odd.layers[0].activation_fn = torch.tanh
    layer = models.EETTransformerDecoderLayer.from_torch(model.decoder.layers[0])
    x = torch.randn(T, B, C)
    with torch.no_grad():
        for call, error, message in (
            (lambda: models.EETTransformerDecoder.from_torch(model), TypeError, "can't be made"),
            (lambda: models.EETTransformerDecoder.from_torch(odd), ValueError, "no kernel"),
            (lambda: ours(tokens[0]), ValueError, "prev_output_tokens must be a tensor"),
            (lambda: ours(tokens, alignment_layer=1), ValueError, "alignment_layer is not"),
            (lambda: layer(x[0]), ValueError, "x must be a tensor"),
            (lambda: layer(x, need_attn=True), ValueError, "need_attn is not supported"),
            (
                lambda: layer.attention(x, need_weights=True),
                ValueError,
                "need_weights is not supported",
            ),
        ):
            with pytest.raises(error, match=message):
                call()
        state = {}
        encoder_out = encoded(model, tokens)
        ours(tokens, encoder_out, state)
        with pytest.raises(ValueError, match="must hold more than the 5 tokens"):
            ours(tokens, encoder_out, state)
