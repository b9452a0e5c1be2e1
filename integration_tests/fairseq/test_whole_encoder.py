"""fairseq's encoder, all layers of a call over the real tokens alone, against the host's own."""

import pytest
import torch
from fairseq.models.transformer import TransformerEncoder
from fairseq.modules import LayerDropModuleList
from fairseq_helpers import ENCODER, PAD, WHOLE_ENCODER, batch, tiny_model
from helpers import assert_as_accurate, assert_fell_back, assert_replaced, in_double
from torch import nn

import eet_patch
from eet_patch.adapters import fairseq_host, fairseq_whole_encoder
from eet_patch.encoding import packed
from eet_patch.encoding.packed import PADDING_KEPT
from eet_patch.ops import packing

LENGTHS = [9, 1, 6, 9, 3]


def encoder(device="cpu", dtype=torch.float32, **changes):
    return tiny_model(device, dtype, **changes).encoder


def encoded(host, tokens, **arguments):
    with torch.no_grad():
        return host(tokens, None, **arguments)


def padding_between(device):
    """Padding on the left of some, on the right of others, and within one."""
    tokens = torch.cat([batch([7, 4], "left"), batch([7, 5, 2], "right", seed=2)])
    tokens[0, 3:5] = PAD
    return tokens.to(device)


def assert_same_encoding(host, tokens, calls=3):
    """States of real tokens are the host's, zeros stand elsewhere; all else is the very same."""
    own = encoded(host, tokens)
    wide = encoded(in_double(host), tokens)["encoder_out"][0]
    keep = tokens.ne(PAD).t()
    eet_patch.reset_report()
    with eet_patch.enabled(strict=True):
        for _ in range(calls):  # with launches, captured, and replayed
            out = encoded(host, tokens)
            states = out["encoder_out"][0]
            assert states.dtype == own["encoder_out"][0].dtype
            assert states.shape == own["encoder_out"][0].shape
            assert_as_accurate(states[keep], own["encoder_out"][0][keep], wide[keep])
            assert not states[~keep].any()
        assert_replaced(WHOLE_ENCODER, calls)
        assert eet_patch.report()[ENCODER].replaced == 0
    assert out.keys() == own.keys()
    for name in own.keys() - {"encoder_out"}:
        assert len(out[name]) == len(own[name])
        for mine, theirs in zip(out[name], own[name], strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "none", "between"])
def test_same_encoding(device, dtype, side, pre_norm):
    lengths = [9] * 5 if side == "none" else LENGTHS
    tokens = padding_between(device) if side == "between" else batch(lengths, side, device)
    assert_same_encoding(encoder(device, dtype, encoder_normalize_before=pre_norm), tokens)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_accurate", "gelu_fast", "linear"])
def test_activations(device, activation):
    host = encoder(device, activation_fn=activation)
    assert_same_encoding(host, batch(LENGTHS, "left", device))


def test_learned_positions_and_normed_embeddings(device):
    host = encoder(device, encoder_learned_pos=True, layernorm_embedding=True)
    assert_same_encoding(host, batch(LENGTHS, "left", device))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_a_block_takes_in_one_call(device, dtype, pre_norm):
    """A pre-norm layer ends in a product, and must still leave its result in the step's buffer."""
    host = encoder(device, dtype, encoder_normalize_before=pre_norm, encoder_layers=6)
    assert_same_encoding(host, batch([60, 59, 33, 60, 48], "left", device), calls=5)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_onto_their_input(device, dtype, pre_norm):
    host = encoder(device, dtype, encoder_normalize_before=pre_norm)
    layers = [fairseq_whole_encoder._packed(layer) for layer in host.layers]
    starts = torch.tensor([0, 100, 150], device=device)
    starts = packing.Starts(starts, starts.int())
    states = torch.randn(150, 32, generator=torch.manual_seed(0)).to(device, dtype)
    shape = packed.Shape(150, 2, 128)
    with torch.no_grad():
        own = packed.run_layers(states.clone(), layers, starts, shape)
        buffer = states.clone()
        made = packed.run_layers(buffer, layers, starts, shape, buffer)
    assert made.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, own) and not torch.equal(buffer, states)


def test_a_sentence_of_padding_alone(device):
    tokens = batch(LENGTHS, "left", device)
    tokens[2] = PAD
    host = encoder(device)
    own = encoded(host, tokens)
    with eet_patch.enabled():
        states = encoded(host, tokens)["encoder_out"][0]
        assert_replaced(WHOLE_ENCODER, 1)
    keep = tokens.ne(PAD).t()
    torch.testing.assert_close(states[keep], own["encoder_out"][0][keep], rtol=1e-4, atol=1e-5)
    assert not states[:, 2].any()


def test_batches_of_many_shapes_one_after_the_other(device):
    host = encoder(device)
    with eet_patch.enabled():
        for seed in range(12):
            lengths = torch.randint(1, 40, (1 + seed % 5,), generator=torch.manual_seed(seed))
            tokens = batch(lengths.tolist(), "left", device, seed)
            keep = tokens.ne(PAD).t()
            for _ in range(2):
                states = encoded(host, tokens)["encoder_out"][0]
            eet_patch.disable()
            own = encoded(host, tokens)["encoder_out"][0]
            eet_patch.enable()
            torch.testing.assert_close(states[keep], own[keep], rtol=1e-4, atol=1e-5)
        assert_replaced(WHOLE_ENCODER, 24)
    eet_patch.disable()


# --- what runs the original ----------------------------------------------------------------------


def dropped(host):
    layers = LayerDropModuleList(0.5)
    layers.extend(host.layers)
    host.layers = layers.train()
    for layer in layers:
        layer.eval()


def hooked(host):
    host.layers[1].register_forward_hook(lambda module, args, out: out * 2)


def a_dropout_that_stays(host):
    host.dropout_module.p, host.dropout_module.apply_during_inference = 0.1, True


def in_another_list(host):
    class Layers(nn.ModuleList):
        pass

    host.layers = Layers(host.layers)


CHANGES = {
    "layers are dropped (training mode); call model.eval() for inference": dropped,
    "a submodule (TransformerEncoderLayerBase) has hooks, which fusion would skip": hooked,
    fairseq_host.DROPOUT_ACTIVE: a_dropout_that_stays,
    "the layers are in a Layers": in_another_list,
    "return_fc is set, and the fused kernel doesn't keep that result": lambda host: setattr(
        host.layers[0], "return_fc", True
    ),
    "the activation is the host's own function": lambda host: setattr(
        host.layers[1], "activation_fn", torch.tanh
    ),
    "a submodule is a Identity, not a LayerNorm": lambda host: setattr(
        host, "layer_norm", nn.Identity()
    ),
    "the input is a NoneType, not a torch.Tensor": lambda host: setattr(
        host, "layers", nn.ModuleList()
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_changed_runs_the_original(device, reason):
    """Before the first call, and between two."""
    tokens = batch(LENGTHS, "left", device)
    for late in (False, True):
        host = encoder(device)
        if late:
            with eet_patch.enabled(only=WHOLE_ENCODER):
                for _ in range(3):
                    encoded(host, tokens)
        CHANGES[reason](host)
        torch.manual_seed(0)
        own = encoded(host, tokens)["encoder_out"][0]
        eet_patch.reset_report()
        with eet_patch.enabled(only=WHOLE_ENCODER):
            torch.manual_seed(0)
            out = encoded(host, tokens)["encoder_out"][0]
            assert_fell_back(WHOLE_ENCODER, reason)
        assert torch.equal(out, own)


def test_hidden_states_of_all_layers(device):
    host, tokens = encoder(device), batch(LENGTHS, "left", device)
    own = encoded(host, tokens, return_all_hiddens=True)
    with eet_patch.enabled(only=WHOLE_ENCODER):
        out = encoded(host, tokens, return_all_hiddens=True)
        assert_fell_back(WHOLE_ENCODER, "the hidden states of all layers are returned")
    assert len(out["encoder_states"]) == 3
    for mine, theirs in zip(out["encoder_states"], own["encoder_states"], strict=True):
        assert torch.equal(mine, theirs)


def test_padding_is_kept_where_asked_for(device):
    host, tokens = encoder(device), batch(LENGTHS, "left", device)
    own = encoded(host, tokens)["encoder_out"][0]
    with eet_patch.enabled(keep_padding=True):
        out = encoded(host, tokens)["encoder_out"][0]
        assert_fell_back(WHOLE_ENCODER, PADDING_KEPT)
        assert_replaced(ENCODER, 2)
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-5)


def test_a_subclass_runs_the_original(device):
    class Encoder(TransformerEncoder):
        pass

    host, tokens = encoder(device), batch(LENGTHS, "left", device)
    host.__class__ = Encoder
    own = encoded(host, tokens)["encoder_out"][0]
    with eet_patch.enabled(only=WHOLE_ENCODER):
        out = encoded(host, tokens)["encoder_out"][0]
        assert_fell_back(WHOLE_ENCODER, "Encoder is a subclass of TransformerEncoderBase")
    assert torch.equal(out, own)


def test_a_method_of_the_layers_that_is_replaced(device, monkeypatch):
    host, tokens = encoder(device), batch(LENGTHS, "left", device)
    with eet_patch.enabled(only=WHOLE_ENCODER):
        encoded(host, tokens)
        monkeypatch.setattr(
            type(host.layers[0]), "residual_connection", lambda layer, x, residual: residual + x / 2
        )
        eet_patch.reset_report()
        out = encoded(host, tokens)["encoder_out"][0]
        assert_fell_back(WHOLE_ENCODER, "a method of the layers was replaced")
    assert torch.equal(out, encoded(host, tokens)["encoder_out"][0])


def test_embeddings_of_another_length(device):
    host, tokens = (
        encoder(device, no_token_positional_embeddings=True),
        batch([1, 1], "left", device),
    )
    embeddings = torch.randn(2, 7, 32, device=device)
    own = encoded(host, tokens, token_embeddings=embeddings)["encoder_out"][0]
    with eet_patch.enabled(only=WHOLE_ENCODER):
        out = encoded(host, tokens, token_embeddings=embeddings)["encoder_out"][0]
        assert_fell_back(WHOLE_ENCODER, "the embeddings are torch.float32, of shape (2, 7, 32)")
    assert torch.equal(out, own)


def test_weights_that_change_between_calls(device):
    host, tokens = encoder(device), batch(LENGTHS, "left", device)
    other, keep = encoder(device), tokens.ne(PAD).t()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)

    def move():
        weight = host.layers[1].fc1.weight
        weight.data = weight.data.clone().mul_(1.1)

    for change in (lambda: host.load_state_dict(other.state_dict()), move):
        with eet_patch.enabled():
            for _ in range(3):
                encoded(host, tokens)
        change()
        own = encoded(host, tokens)["encoder_out"][0]
        eet_patch.reset_report()
        with eet_patch.enabled():
            for _ in range(3):
                states = encoded(host, tokens)["encoder_out"][0]
                torch.testing.assert_close(states[keep], own[keep], rtol=1e-4, atol=1e-5)
            assert_replaced(WHOLE_ENCODER, 3)
