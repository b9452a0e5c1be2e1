"""Promise 4 for fairseq: what no kernel supports runs the original, gives its answer bit for bit,
and is reported with the one reason.
"""

import inspect
import re

import pytest
import torch
from fairseq_helpers import (
    DECODER,
    ENCODER,
    batch,
    decoder_layer,
    encoder_layer,
    layer_config,
    tiny_args,
    tiny_model,
)
from helpers import assert_fell_back, patched
from torch import nn

import eet_patch
from eet_patch.adapters import fairseq_decoder, fairseq_encoder, fairseq_host

B, T, S, C = 3, 5, 7, 32
CASES, REASONS = {}, []
DROPOUT = fairseq_host.DROPOUT_ACTIVE


def case(reason, target=DECODER):
    def register(build):
        REASONS.append(reason)
        CASES[build.__name__] = (build, reason, target)
        return build

    return register


def inputs(device, width=C, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, B, C, generator=generator).to(device, dtype)
    return x, torch.randn(S, B, width, generator=generator).to(device, dtype)


def decode(layer, device, **arguments):
    x, encoder_out = inputs(device)
    arguments.setdefault("encoder_out", encoder_out)
    return lambda: layer(x, **arguments)


def encode(layer, device, **arguments):
    x, _ = inputs(device)
    arguments.setdefault("encoder_padding_mask", None)
    return lambda: layer(x, **arguments)


def changed(device, change, target=DECODER):
    """A call of a layer that `change` has worked on."""
    layer = decoder_layer(device) if target == DECODER else encoder_layer(device)
    change(layer)
    return (decode if target == DECODER else encode)(layer, device)


def filled_state(layer, device, rows=B):
    """A state of three tokens, as the host makes it."""
    state, (x, encoder_out) = {}, inputs(device)
    for step in range(3):
        layer(x[step : step + 1, :rows], encoder_out[:, :rows], None, state)
    return state


# --- the layer -----------------------------------------------------------------------------------


@case("TransformerDecoderLayer is a subclass of TransformerDecoderLayerBase")
def the_layer_of_older_code(device):
    from fairseq.modules import TransformerDecoderLayer

    return decode(TransformerDecoderLayer(tiny_args()).to(device).eval(), device)


@case(DROPOUT)
def training(device):
    return changed(device, lambda layer: layer.train())


@case(DROPOUT, ENCODER)
def training_of_an_encoder(device):
    return changed(device, lambda layer: layer.train(), ENCODER)


@case(DROPOUT)
def retained_dropout(device):
    def retain(layer):
        layer.activation_dropout_module.apply_during_inference = True

    return changed(device, retain)


@case("a submodule (Linear) has hooks, which fusion would skip")
def quant_noise(device):
    return decode(decoder_layer(device, quant_noise__pq=0.1), device)


@case("a submodule (Linear) has hooks, which fusion would skip", ENCODER)
def quant_noise_of_an_encoder(device):
    return encode(encoder_layer(device, quant_noise__pq=0.1), device)


@case("a submodule is a Linear, not a Linear")
def quantised(device):
    if device.type == "cuda":
        pytest.skip("torch quantises dynamically on the CPU alone")
    layer = torch.ao.quantization.quantize_dynamic(decoder_layer(device), {nn.Linear})
    return decode(layer, device)


for _name, _flag in (("attn_ln", "scale_attn"), ("c_attn", "scale_heads"),
                     ("ffn_layernorm", "scale_fc"), ("w_resid", "scale_resids")):  # fmt: skip

    def _build(device, flag=_flag):
        return decode(decoder_layer(device, **{flag: True}), device)

    _build.__name__ = _flag
    case(f"the layer has a {_name}, which the kernels don't know")(_build)


@case("cross_self_attention is set")
def cross_self_attention(device):
    return decode(decoder_layer(device, cross_self_attention=True), device)


@case("the attention adds a key of its own (bias_k, add_zero_attn)")
def bias_kv(device):
    from fairseq.modules.transformer_layer import TransformerDecoderLayerBase

    layer = TransformerDecoderLayerBase(layer_config(), no_encoder_attn=True, add_bias_kv=True)
    return decode(layer.to(device).eval(), device)


@case("the attention is one of xformers")
def xformers(device):
    return changed(device, lambda layer: setattr(layer.encoder_attn, "use_xformers", True))


@case("the layer is being exported (onnx_trace)")
def onnx(device):
    return changed(device, lambda layer: layer.self_attn.prepare_for_onnx_export_())


@case("residual_connection was replaced")
def residual_connection(device):
    return changed(
        device, lambda layer: setattr(layer, "residual_connection", lambda x, residual: x)
    )


@case("apply_sparse_mask of an attention was replaced", ENCODER)
def sparse_mask(device):
    def replace(layer):
        layer.self_attn.apply_sparse_mask = lambda weights, *sizes: weights

    return changed(device, replace, ENCODER)


@case("a submodule (MultiheadAttention) has hooks, which fusion would skip")
def a_hook(device):
    return changed(
        device, lambda layer: layer.encoder_attn.register_forward_hook(lambda m, a, out: None)
    )


@case("a submodule is a Adapted, not a Linear")
def an_adapter(device):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    def replace(layer):
        layer.fc1.__class__ = Adapted

    return changed(device, replace)


@case("heads were pruned, or the input's size 32 is not 24")
def pruned_heads(device):
    def prune(layer):
        layer.self_attn._set_skip_embed_dim_check()
        layer.self_attn._adaptive_prune_heads(layer.self_attn._get_reserve_head_index(3))

    return changed(device, prune)


@case("return_fc is set, and the fused kernel doesn't keep that result", ENCODER)
def return_fc(device):
    return changed(device, lambda layer: setattr(layer, "return_fc", True), ENCODER)


@case("there is no kernel for the activation custom")
def activation(device):
    def custom(x):
        return x.abs()

    custom.__qualname__ = "custom"
    return changed(device, lambda layer: setattr(layer, "activation_fn", custom))


@case("keys and values of the encoder attention differ in size")
def value_size(device):
    def widen(layer):
        layer.encoder_attn.vdim = 40
        layer.encoder_attn.v_proj = nn.Linear(40, C).to(device)

    return changed(device, widen)


@case("a parameter is torch.float64 and the input torch.float32")
def mixed_dtypes(device):
    return changed(device, lambda layer: layer.fc2.double())


# --- the call ------------------------------------------------------------------------------------


@case("there is no kernel for torch.float64")
def double(device):
    layer, (x, encoder_out) = decoder_layer(device).double(), inputs(device, dtype=torch.float64)
    return lambda: layer(x, encoder_out)


@case("the input is not contiguous")
def strided(device):
    layer, (x, encoder_out) = decoder_layer(device), inputs(device)
    return lambda: layer(x[:, ::2], encoder_out[:, ::2])


@case(f"the input has shape {(0, B, C)}", ENCODER)
def no_tokens(device):
    layer = encoder_layer(device)
    return lambda: layer(torch.zeros(0, B, C, device=device), None)


@case("an attention mask is given, which the encoder's kernels don't take", ENCODER)
def encoder_attention_mask(device):
    mask = torch.ones(T, T, device=device).triu(2)
    return encode(encoder_layer(device), device, attn_mask=mask)


@case("prev_self_attn_state is given, which the kernels don't know")
def prev_self_attn_state(device):
    layer, (x, encoder_out) = decoder_layer(device), inputs(device)
    past = [torch.zeros(B, 4, 2, 8, device=device)] * 2
    return lambda: layer(x[:1], encoder_out, None, {}, prev_self_attn_state=past)


@case("prev_attn_state is given, which the kernels don't know")
def prev_attn_state(device):
    layer, (x, encoder_out) = decoder_layer(device), inputs(device)
    past = [torch.zeros(B, 4, S, 8, device=device)] * 2
    return lambda: layer(x[:1], encoder_out, None, {}, prev_attn_state=past)


@case("the attention mask is a torch.bool")
def bool_mask(device):
    mask = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
    return decode(decoder_layer(device), device, self_attn_mask=mask)


@case(f"the attention mask has shape {(T + 1, T + 1)}, not {(T, T)}")
def mask_of_another_size(device):
    mask = torch.zeros(T + 1, T + 1, device=device)
    return decode(decoder_layer(device), device, self_attn_mask=mask)


@case(f"the padding mask has shape {(B, S + 1)}, not {(B, S)}")
def padding_mask_of_another_size(device):
    mask = torch.zeros(B, S + 1, dtype=torch.bool, device=device)
    return decode(decoder_layer(device), device, encoder_padding_mask=mask)


@case("encoder_out differs from the input in type or dtype")
def encoder_out_in_double(device):
    return decode(decoder_layer(device), device, encoder_out=inputs(device)[1].double())


@case(f"encoder_out has shape {(S, B, 40)}")
def encoder_out_of_another_size(device):
    return decode(decoder_layer(device), device, encoder_out=inputs(device, 40)[1])


@case("encoder_out is of 2 sequences, and the input of 3")
def encoder_out_of_other_rows(device):
    return decode(decoder_layer(device), device, encoder_out=inputs(device)[1][:, :2])


@case("the state is of 2 sequences, and the input of 3")
def state_of_other_rows(device):
    layer, (x, encoder_out) = decoder_layer(device), inputs(device)
    state = filled_state(layer, device, rows=2)
    return lambda: layer(x[:1], encoder_out, None, {k: dict(v) for k, v in state.items()})


@case("the incremental state differs from the input in type, dtype or device")
def state_in_double(device):
    layer, (x, encoder_out) = decoder_layer(device), inputs(device)
    state = filled_state(layer, device)
    for part in state.values():
        part.update({k: v.double() for k, v in part.items() if v is not None})
    return lambda: layer(x[:1], encoder_out, None, {k: dict(v) for k, v in state.items()})


# --- the tests -----------------------------------------------------------------------------------


def outcome(run):
    torch.manual_seed(0)
    try:
        out = run()
    except eet_patch.FallbackError:
        raise
    except Exception as error:
        return [type(error), str(error)]
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def assert_equal(out, own):
    assert len(out) == len(own)
    for mine, theirs in zip(out, own, strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == theirs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_fallback(device, name):
    build, reason, target = CASES[name]
    with torch.no_grad():
        run = build(device)
        own = outcome(run)
        with eet_patch.enabled(only=target):
            out = outcome(run)
            assert_fell_back(target, reason)
        assert_equal(out, own)
        message = f"{target} would run the original code: {reason}"
        with eet_patch.enabled(strict=True, only=target):
            with pytest.raises(eet_patch.FallbackError, match=f"^{re.escape(message)}$"):
                outcome(run)
        assert_equal(outcome(run), own)


# Reasons that take another device, or a host that is broken, to be given.
UNREACHED = {
    "the padding mask is on ",
    "the padding mask is a ",
    "encoder_out is on ",
    "there is no kernel for a head size of ",
    "the incremental state's head dimension is not contiguous",
    "the incremental state holds keys of shape ",
    "the incremental state holds keys and values of different shapes",
    "the self-attention takes keys of its own",
    "the encoder attention is not an encoder-decoder attention",
    " rows are not a multiple of the beam size ",
}


def test_every_reason_has_a_case():
    """The reasons are read from the adapters' source, so that none is added without a test."""
    written = set()
    for module in (fairseq_decoder, fairseq_encoder, fairseq_host):
        source = inspect.getsource(module)
        for text in re.findall(r"(?:return|reason =) f?\"([^\"]+)\"", source):
            written.add(text)
    assert len(written) > 20
    for text in written:
        fixed = max(re.split(r"\{[^{}]*\}", text), key=len)
        reached = any(fixed in reason for reason in REASONS)
        assert reached != any(fixed in other or other in fixed for other in UNREACHED), text


def test_a_model_that_nothing_hinders_is_replaced_under_strict(device):
    model = tiny_model(device)
    with torch.no_grad(), patched(ENCODER, DECODER, strict=True):
        model(batch([7, 4], "left", device), None, batch([5, 3], "right", device))


def test_a_change_after_the_first_call_is_seen(device):
    """What was found sound is looked at again when it has changed."""
    layer, (x, encoder_out) = decoder_layer(device), inputs(device)
    with torch.no_grad(), eet_patch.enabled():
        layer(x, encoder_out)
        layer.fc1.register_forward_hook(lambda module, args, out: out * 2)
        layer(x, encoder_out)
    row = eet_patch.report()[DECODER]
    assert row.replaced == 1
    assert list(row.fallbacks) == ["a submodule (Linear) has hooks, which fusion would skip"]
