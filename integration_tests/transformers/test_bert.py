"""BertLayer and its family, patched against unpatched: every mask, position, activation and use as
a decoder.
"""

import pytest
import torch
import transformers
from helpers import (
    BEFORE_5,
    FAMILY,
    assert_fell_back,
    assert_same_tokens,
    batch_of,
    compare,
    patched,
    tiny_bert,
    token_ids,
)

import eet_patch

family = pytest.mark.parametrize("folder", FAMILY)
IMPLEMENTATIONS = ["sdpa", "eager"]
FLOAT32 = [torch.float32]


def target(folder):
    return FAMILY[folder][1]


# Before 5.0 these classes know no sdpa.
def implementation_of(folder, implementation):
    if BEFORE_5 and folder == "bert_generation" and implementation == "sdpa":
        return "eager"
    return implementation


def family_model(folder, device, dtype=torch.float32, implementation="sdpa", **changes):
    implementation = implementation_of(folder, implementation)
    try:
        return tiny_bert(folder, device, dtype, attn_implementation=implementation, **changes)
    except ValueError as error:  # "... does not support ... scaled_dot_product_attention yet"
        if "sdpa" not in str(error) and "scaled_dot_product" not in str(error):
            raise
        return tiny_bert(folder, device, dtype, attn_implementation="eager", **changes)


@family
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["none", "right", "left", "interior"])
def test_every_family_and_padding(device, folder, implementation, side):
    model = family_model(folder, device, implementation=implementation)
    inputs = batch_of(side, device)
    compare(
        model,
        lambda m: m(**inputs).last_hidden_state,
        target(folder),
        keep=inputs["attention_mask"],
        calls=2,
    )


@family
def test_every_family_in_every_dtype(device, dtype, folder):
    model = family_model(folder, device, dtype)
    inputs = batch_of("right", device)
    compare(
        model,
        lambda m: m(**inputs).last_hidden_state,
        target(folder),
        keep=inputs["attention_mask"],
    )


@family
def test_only_its_own_family_is_replaced(folder):
    model = family_model(folder, "cpu")
    with torch.no_grad(), patched(target(folder)):
        model(**batch_of("right"))
        for row in eet_patch.report().targets:
            assert (row.replaced > 0) == (row.name == target(folder))


HEADS = [
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
]


@pytest.mark.parametrize("head", HEADS)
def test_heads(device, head):
    model = tiny_bert("bert", device, head=head)
    inputs = batch_of("right", device)
    keep = None if head == "ForSequenceClassification" else inputs["attention_mask"]
    compare(model, lambda m: m(**inputs)[0], "bert_layer", keep=keep)


# --- inputs --------------------------------------------------------------------------------------


def user_masks(model, kind, dtype):
    """Masks of the user's own: (batch, 1 or heads, q_len, kv_len), True or 0 where attention is
    allowed.
    """
    keep = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    keep |= torch.eye(11, dtype=torch.bool)
    if kind == "block":  # two packed sequences
        block = torch.arange(11) < 5
        keep = (block[:, None] == block[None, :]).expand(3, 11, 11)
    keep = keep[:, None].to(model.device)
    if dtype == torch.bool:
        return keep
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(
        ~keep, torch.finfo(dtype).min
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize("form", ["float", "bool"])
def test_users_own_four_dimensional_masks(device, implementation, kind, form):
    if form == "bool" and (implementation == "eager" or BEFORE_5):
        pytest.skip("eager adds the mask, and before 5.0 BERT doesn't pass bool masks on")
    model = tiny_bert("bert", device, attn_implementation=implementation)
    ids = token_ids(3, 11, device)

    def run(m):
        mask = user_masks(m, kind, torch.bool if form == "bool" or BEFORE_5 else m.dtype)
        if BEFORE_5:  # its BertModel takes (batch, q_len, kv_len), 1 = keep, and makes four
            mask = mask[:, 0].long()
        return m(ids, attention_mask=mask).last_hidden_state

    plain = model(ids)[0]
    out = compare(model, run, "bert_layer")
    assert (out - plain).abs().max() > 1e-2  # the mask matters


@pytest.mark.parametrize("form", [(3, 1, 1, 11), (1, 1, 11, 11), (3, 4, 11, 11), (1, 4, 1, 11)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_that_broadcast(device, form, implementation):
    """Straight to the stack of layers, additive: with biases that differ per head too."""
    model = tiny_bert("bert", device, attn_implementation=implementation)
    bias = torch.randn(form, generator=torch.Generator().manual_seed(4)).to(device)
    x = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(5)).to(device)
    compare(
        model,
        lambda m: m.encoder(x.to(m.dtype), attention_mask=bias.to(m.dtype)).last_hidden_state,
        "bert_layer",
    )


def test_mask_with_strides(device):
    model = tiny_bert("bert", device)
    bias = torch.randn(11, 4, 11, 3, device=device).permute(3, 1, 2, 0)[:, :, :, ::1]
    x = torch.randn(3, 11, 32, device=device)
    compare(
        model,
        lambda m: m.encoder(x.to(m.dtype), attention_mask=bias.to(m.dtype)).last_hidden_state,
        "bert_layer",
    )


def test_token_types_positions_and_embeddings(device):
    model = tiny_bert("bert", device)
    ids = token_ids(2, 9, device)
    inputs = {
        "token_type_ids": (torch.arange(9, device=device) > 4).long().expand(2, 9),
        "position_ids": torch.arange(20, 29, device=device).expand(2, 9),
    }
    plain = model(ids)[0]
    out = compare(model, lambda m: m(ids, **inputs).last_hidden_state, "bert_layer")
    assert (out - plain).abs().max() > 1e-2
    embeddings = torch.randn(2, 9, 32, device=device)
    compare(
        model,
        lambda m: m(inputs_embeds=embeddings.to(m.dtype)).last_hidden_state,
        "bert_layer",
    )


def test_tuples_instead_of_outputs(device):
    model, ids = tiny_bert("bert", device), token_ids(2, 9, device)
    compare(model, lambda m: m(ids, return_dict=False)[0], "bert_layer")


@pytest.mark.parametrize(
    "hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish"]
)
def test_activations(device, dtype, hidden_act):
    model = tiny_bert("bert", device, dtype, hidden_act=hidden_act)
    ids = token_ids(2, 9, device)
    compare(model, lambda m: m(ids).last_hidden_state, "bert_layer")


@pytest.mark.parametrize("hidden_size, heads", [(24, 3), (40, 1), (96, 12), (160, 2), (256, 1)])
def test_head_sizes(device, hidden_size, heads):
    """head_dim 8, 40, 8, 80 and 256."""
    model = tiny_bert("bert", device, hidden_size=hidden_size, num_attention_heads=heads)
    inputs = batch_of("right", device)
    compare(
        model, lambda m: m(**inputs).last_hidden_state, "bert_layer", keep=inputs["attention_mask"]
    )


@pytest.mark.parametrize("length", [1, 2, 16, 63, 64, 65, 96])
def test_lengths(device, length):
    model, ids = tiny_bert("bert", device), token_ids(1, length, device)
    compare(model, lambda m: m(ids).last_hidden_state, "bert_layer")


def test_chunked_feed_forward(device):
    """chunk_size_feed_forward splits the host's work, not its result."""
    model = tiny_bert("bert", device, chunk_size_feed_forward=3)
    ids = token_ids(2, 9, device)
    compare(model, lambda m: m(ids).last_hidden_state, "bert_layer")


# --- as a decoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["none", "left"])
def test_decoder_without_and_with_cache(device, implementation, side):
    model = tiny_bert(
        "bert", device, head="LMHeadModel", is_decoder=True, attn_implementation=implementation
    )
    inputs = batch_of(side, device)

    def whole(m):
        return m(**inputs, use_cache=False).logits

    def stepwise(m):
        ids, mask, cache, logits = inputs["input_ids"], inputs["attention_mask"], None, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
            out = m(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, 1)

    for run, length in ((whole, 11), (stepwise, 8)):
        keep = inputs["attention_mask"][:, :length]
        if not (BEFORE_5 and implementation == "sdpa"):
            compare(model, run, "bert_layer", keep=keep)
            continue
        with torch.no_grad():  # this host's masks overflow in fp64
            own = run(model)[keep.bool()]
            with patched("bert_layer"):
                out = run(model)[keep.bool()]
        torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", ["bert", "roberta", "bert_generation", "electra"])
def test_decoder_generates(device, folder):
    head = {"bert": "LMHeadModel", "bert_generation": "Decoder"}.get(folder, "ForCausalLM")
    model = family_model(folder, device, head=head, is_decoder=True)
    ids = token_ids(2, 4, device)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generation_config.eos_token_id = None
    own = model.generate(ids, **settings)
    with patched(target(folder)):
        out = model.generate(ids, **settings)
    assert len(own[:, 4:].unique()) > 2
    assert torch.equal(out, own)


def encoder_decoder(device, folder="bert", implementation="sdpa"):
    prefix = FAMILY[folder][0]
    encoder = family_model(folder, "cpu", implementation=implementation)
    head = {"bert": "LMHeadModel", "bert_generation": "Decoder"}.get(folder, "ForCausalLM")
    decoder = family_model(
        folder,
        "cpu",
        head=head,
        seed=1,
        implementation=implementation,
        is_decoder=True,
        add_cross_attention=True,
    )
    assert type(decoder).__name__.startswith(prefix)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval().to(device)


@pytest.mark.parametrize("folder", ["bert", "roberta", "bert_generation"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_encoder_decoder_forward(device, folder, implementation):
    model = encoder_decoder(device, folder, implementation)
    inputs = batch_of("right", device)
    decoder_ids = token_ids(3, 6, device, seed=8)
    compare(
        model,
        lambda m: m(**inputs, decoder_input_ids=decoder_ids, use_cache=False).logits,
        target(folder),
        calls=4,
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_encoder_decoder_generates(device, num_beams):
    """Cross-attention: its keys are computed once and kept in an EncoderDecoderCache."""
    model = encoder_decoder(device)
    inputs = batch_of("right", device)
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": num_beams}
    own = model.generate(**inputs, **settings)
    with patched("bert_layer"):
        out = model.generate(**inputs, **settings)
    assert len(own.unique()) > 4
    assert torch.equal(out, own)


def test_encoder_decoder_generates_in_half_precision(device, dtype):
    model = encoder_decoder(device).to(dtype)
    inputs = batch_of("none", device)
    with patched("bert_layer"):
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    own = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    if dtype == torch.float32:
        assert_same_tokens(model, 1, own, out)
    assert out.shape == own.shape


def test_a_layer_called_alone(device):
    """The layer's own interface, with the return type that its version has."""
    layer = tiny_bert("bert", device).encoder.layer[0]
    x = torch.randn(2, 7, 32, device=device)
    with torch.no_grad():
        own = layer(x)
        with patched("bert_layer", calls=2):
            for out in (layer(x), layer(hidden_states=x)):
                assert type(out) is type(own)
                tensors = (out, own) if isinstance(own, torch.Tensor) else (out[0], own[0])
                torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-4)


def test_attentions_of_sdpa(device):
    """Asked for attentions, sdpa models of 4.x change to eager; 5.x returns none: as the unpatched
    model does.
    """
    model, ids = tiny_bert("bert", device), token_ids(2, 6, device)
    with torch.no_grad():
        own = model(ids, output_attentions=True)
        with eet_patch.enabled():
            out = model(ids, output_attentions=True)
    assert_fell_back(
        "bert_layer",
        "attention weights were asked for, and the fused kernel doesn't form them",
        calls=2,
    )
    assert torch.equal(out[0], own[0])
    assert (own.attentions is None) == (out.attentions is None)
