"""More calls that must run the original: OPT, GPT-Neo and GPTBigCode."""

import torch
from fallback_cases import (
    ATTENTIONS,
    CASES,
    DROPOUT,
    REASONS,
    Case,
    call,
    case,
    first,
    hidden,
    only_dropouts_train,
)
from helpers import DECODERS, layers_of, tiny_decoder, token_ids
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

ONE_LAYER = {
    "opt": {"num_hidden_layers": 1},
    "opt_post_norm": {"num_hidden_layers": 1},
    "gpt_neo": {"num_layers": 1, "attention_types": [[["local"], 1]]},
    "gpt_bigcode": {"n_layer": 1},
}

DROPOUTS = {"gpt_neo": {"resid_dropout": 0.1}}  # the others' are on by default


def decoder(kind, device, **changes):
    return tiny_decoder(kind, device, **ONE_LAYER[kind] | changes)


def layer_of(kind, device, **changes):
    return layers_of(decoder(kind, device, **changes))[0]


def for_each_kind(reason, kinds=tuple(ONE_LAYER)):
    """Registers a case of every kind; the function gets the kind as well."""

    def register(build):
        REASONS.append(reason)
        for kind in kinds:
            CASES[f"{build.__name__} {kind}"] = Case(
                lambda device, kind=kind: build(kind, device), reason, DECODERS[kind][1]
            )
        return build

    return register


@for_each_kind("the layer is in training mode; call model.eval() for inference")
def training(kind, device):
    return call(decoder(kind, device).train(), device)


@for_each_kind(DROPOUT, ("gpt_neo", "gpt_bigcode"))  # OPT has no Dropout modules
def monte_carlo_dropout(kind, device):
    return call(only_dropouts_train(decoder(kind, device, **DROPOUTS.get(kind, {}))), device)


@case(DROPOUT, "opt_layer")
def only_opts_attention_trains(device):
    model = decoder("opt", device, attention_dropout=0.2)
    layers_of(model)[0].self_attn.train()
    return call(model, device)


@case(DROPOUT, "gpt_bigcode_block")
def only_gpt_bigcodes_attention_trains(device):
    model = decoder("gpt_bigcode", device, resid_pdrop=0.0, attn_pdrop=0.2)
    layers_of(model)[0].attn.train()
    return call(model, device)


@for_each_kind(ATTENTIONS)
def attentions(kind, device):
    model = decoder(kind, device, attn_implementation="eager")
    return call(model, device, output_attentions=True)


@for_each_kind("there is no kernel for the activation QuickGELUActivation")
def activation(kind, device):
    return call(decoder(kind, device, activation_function="quick_gelu"), device)


@for_each_kind("there is no kernel for the activation builtin_function_or_method")
def activation_function(kind, device):
    model = decoder(kind, device)
    layer = layers_of(model)[0]
    owner, name = (layer, "activation_fn") if kind.startswith("opt") else (layer.mlp, "act")
    delattr(owner, name)
    setattr(owner, name, torch.sin)
    return call(model, device)


@for_each_kind("the input has 2 dimensions", ("opt", "opt_post_norm"))
def two_dimensions(kind, device):
    layer, x = layer_of(kind, device), hidden(device, 6, 48)

    def run():  # the host's own failure, or its answer
        return first(layer(x))

    return run


@for_each_kind("the argument made_up is given, which the kernels don't know", ("opt",))
def unknown_argument(kind, device):
    layer, x = layer_of(kind, device), hidden(device, 2, 6, 48)
    return lambda: first(layer(x, made_up=torch.ones(1)))


@for_each_kind("there is no kernel for a head size of 264")
def large_heads(kind, device):
    width = {"n_embd": 264} if kind == "gpt_bigcode" else {"hidden_size": 264}
    heads = {"gpt_neo": "num_heads", "gpt_bigcode": "n_head"}.get(kind, "num_attention_heads")
    if kind.startswith("opt"):
        width["word_embed_proj_dim"] = 264
    return call(decoder(kind, device, **width, **{heads: 1}), device)


@for_each_kind("heads were pruned, or the input's hidden size 48 is not 36")
def pruned(kind, device):
    """Three of four heads of 12; the host's own failure is as good as its answer."""
    layer, x = layer_of(kind, device), hidden(device, 2, 6, 48)
    attn = layer.self_attn if kind.startswith("opt") else layer.attn
    attn = attn.attention if kind == "gpt_neo" else attn
    attn.num_heads, attn.embed_dim = 3, 36
    return lambda: first(layer(x))


@for_each_kind("a parameter is torch.float16 and the input torch.float32")
def another_dtype(kind, device):
    model = decoder(kind, device)
    layer = layers_of(model)[0]
    (layer.fc1 if kind.startswith("opt") else layer.mlp.c_fc).half()
    return call(model, device)


@for_each_kind("a parameter is not contiguous")
def transposed_weight(kind, device):
    model = decoder(kind, device)
    layer = layers_of(model)[0]
    fc = layer.fc2 if kind.startswith("opt") else layer.mlp.c_proj
    fc.weight = nn.Parameter(fc.weight.detach().t().contiguous().t())
    return call(model, device)


@for_each_kind("a parameter is missing", ("opt", "opt_post_norm"))
def norm_without_weights(kind, device):
    model = decoder(kind, device)
    norm = nn.LayerNorm(48, elementwise_affine=False, device=device)
    layers_of(model)[0].final_layer_norm = norm
    return call(model, device)


# --- what attention sees -------------------------------------------------------------------------


@for_each_kind("self-attention with an EncoderDecoderCache", ("opt", "gpt_neo"))
def encoder_decoder_cache(kind, device):
    layer, x = layer_of(kind, device), hidden(device, 2, 6, 48)
    name = "past_key_values" if kind == "opt" else "layer_past"
    return lambda: first(layer(x, **{name: EncoderDecoderCache(DynamicCache(), DynamicCache())}))


@for_each_kind("the attention mask has two dimensions, with sdpa attention", ("opt", "gpt_bigcode"))
def mask_of_two_dimensions(kind, device):
    layer, x = layer_of(kind, device), hidden(device, 2, 6, 48)
    mask = torch.ones(6, 6, dtype=torch.bool, device=device).tril()
    return lambda: first(layer(x, attention_mask=mask))


@for_each_kind("the attention mask is bool, and eager attention adds it to the scores")
def bool_mask(kind, device):
    layer, x = layer_of(kind, device, attn_implementation="eager"), hidden(device, 2, 6, 48)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool, device=device).tril()
    return lambda: first(layer(x, attention_mask=mask))


@for_each_kind("the attention implementation is made_up", ("opt", "gpt_bigcode"))
def made_up_attention(kind, device):
    layer, x = layer_of(kind, device), hidden(device, 2, 6, 48)
    attn = layer.self_attn if kind == "opt" else layer.attn
    attn.config._attn_implementation = "made_up"
    return lambda: first(layer(x))


@case("a local layer over a static cache", "gpt_neo_block")
def local_layer_over_a_static_cache(device):
    model = decoder("gpt_neo", device)
    ids = token_ids(2, 6, device)

    def run():
        cache = StaticCache(config=model.config, max_cache_len=32)
        return model(ids, past_key_values=cache).logits

    return run


@case("there are more keys than the model has positions", "gpt_neo_block")
def more_keys_than_positions(device):
    layer = layer_of("gpt_neo", device, max_position_embeddings=4)
    x = hidden(device, 2, 6, 48)
    return lambda: first(layer(x))


@case("the causal buffer of an attention was changed", "gpt_neo_block")
def a_prefix_in_the_causal_buffer(device):
    model = decoder("gpt_neo", device)
    layers_of(model)[0].attn.attention.bias[:, :, :3, :3] = True
    return call(model, device)


@case("cross-attention, for which this layer has no kernel", "gpt_bigcode_block")
def cross_attention_gpt_bigcode(device):
    layer, x = layer_of("gpt_bigcode", device), hidden(device, 2, 6, 48)
    return lambda: first(layer(x, encoder_hidden_states=x))
