"""More calls that must run the original: attention implementations, masks, caches, cross-attention,
GPT-2's head.
"""

import torch
import transformers
from fallback_cases import (
    CustomCache,
    bert_layer,
    call,
    case,
    first,
    gpt2,
    hidden,
    with_instance_update,
)
from helpers import token_ids
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

BROADCAST = "attention_mask must broadcast to (batch_size, num_heads, q_len, kv_len) = (2, 4, 6, 6)"
CONTIGUOUS_GPT2 = (
    "encoder_hidden_states have another batch or hidden size, or are not contiguous"
)  # fmt: skip


# --- attention implementations -------------------------------------------------------------------


def made_up_attention(module, query, key, value, attention_mask, **kwargs):
    """Attends to nothing but the token itself."""
    return value.transpose(1, 2), None


@case("the attention implementation is made_up", "gpt2_block")
def custom_attention(device):
    transformers.AttentionInterface.register("made_up", made_up_attention)
    model = gpt2(device)
    model.config._attn_implementation = "made_up"
    return call(model, device)


@case("the attention implementation is made_up", versions=">=5")
def custom_attention_bert(device):
    transformers.AttentionInterface.register("made_up", made_up_attention)
    layer, x = bert_layer(device), hidden(device)
    layer.attention.self.config._attn_implementation = "made_up"
    return lambda: first(layer(x))


@case("the attention implementation is flex_attention", "gpt2_block")
def flex_attention(device):
    block, x = gpt2(device).transformer.h[0], hidden(device, 2, 6, 48)
    block.attn.config._attn_implementation = "flex_attention"
    return lambda: first(block(x))


@case("the sdpa attention function was replaced", "gpt2_block")
def replaced_sdpa(device):
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    inner = call(gpt2(device), device)

    def run():
        functions["sdpa"] = made_up_attention
        try:
            return inner()
        finally:
            del functions["sdpa"]

    return run


# --- masks ---------------------------------------------------------------------------------------


def masked(mask):
    def build(device):
        layer, x = bert_layer(device), hidden(device)
        return lambda: first(layer(x, attention_mask=mask.to(device)))

    return build


@case("the attention mask has shape (2, 5)")
def mask_of_another_length(device):
    return masked(torch.ones(2, 5))(device)


@case("attention_mask must be bool, float32 or torch.float32, got torch.int64")
def integer_mask(device):
    return masked(torch.zeros(2, 1, 1, 6, dtype=torch.int64))(device)


@case(f"{BROADCAST}, got shape (2, 1, 6, 5)")
def mask_that_does_not_broadcast(device):
    return masked(torch.zeros(2, 1, 6, 5))(device)


@case(f"{BROADCAST}, got shape (6, 6, 6)")
def three_dimensional_mask(device):
    return masked(torch.zeros(6, 6, 6))(device)


@case("the attention mask is a Parameter")
def mask_of_another_type(device):
    layer, x = bert_layer(device), hidden(device)
    mask = nn.Parameter(torch.zeros(2, 1, 1, 6, device=device), requires_grad=False)
    return lambda: first(layer(x, attention_mask=mask))


@case("the attention mask is on meta and the input on {device}")
def mask_on_another_device(device):
    layer, x = bert_layer(device), hidden(device)
    mask = torch.zeros(2, 1, 1, 6, device="meta")
    return lambda: first(layer(x, attention_mask=mask)).shape


# --- caches --------------------------------------------------------------------------------------


def with_cache(make, prepare=None):
    """A call of GPT-2 whose cache is made anew every time."""

    def build(device):
        model = gpt2(device)
        if prepare is not None:
            prepare(model)
        ids = token_ids(2, 6, device)
        return lambda: model(ids, past_key_values=make(model), use_cache=True).logits

    return build


@case("the cache is a CustomCache, which is not one of transformers' own", "gpt2_block")
def custom_cache(device):
    return with_cache(lambda model: CustomCache())(device)


@case("the cache is a DynamicCache, which is not one of transformers' own", "gpt2_block")
def cache_with_an_update_of_its_own(device):
    return with_cache(lambda model: with_instance_update(DynamicCache()))(device)


@case("the cache layer is a DynamicSlidingWindowLayer", "gpt2_block")
def sliding_window(device):
    from transformers.cache_utils import DynamicSlidingWindowLayer

    def make(model):
        cache = DynamicCache()
        cache.layers = [DynamicSlidingWindowLayer(sliding_window=8)]
        return cache

    return with_cache(make)(device)


@case("the cache has no layer 0", "gpt2_block")
def cache_without_the_layer(device):
    def make(model):
        cache = StaticCache(model.config, max_cache_len=8)
        cache.layers = []
        return cache

    block, x = gpt2(device).transformer.h[0], hidden(device, 2, 6, 48)
    model = gpt2(device)
    return lambda: first(block(x, past_key_values=make(model)))


@case("the layer has no index in the cache", "gpt2_block")
def layer_without_index(device):
    def prepare(model):
        model.transformer.h[0].attn.layer_idx = None

    return with_cache(lambda model: DynamicCache(), prepare)(device)


# --- cross-attention -----------------------------------------------------------------------------

DECODER = {"is_decoder": True, "add_cross_attention": True}


def crossed(device, encoder, cache=None, decoder=DECODER):
    """A call of a BERT decoder layer with encoder states and, made anew every time, a cache."""
    layer, x = bert_layer(device, **decoder), hidden(device)

    def run():
        inputs = {"past_key_values": cache(x)} if cache is not None else {}
        return first(layer(x, encoder_hidden_states=encoder, **inputs))

    return run


@case("the layer has no cross-attention (the original raises the error)")
def no_cross_attention(device):
    return crossed(device, hidden(device, 2, 5, 32), decoder={"is_decoder": True})


@case("encoder_hidden_states differ from the input in type, dtype or device")
def encoder_in_half(device):
    return crossed(device, hidden(device, 2, 5, 32).half())


@case("encoder_hidden_states have shape (1, 5, 32)")
def encoder_of_another_batch(device):
    return crossed(device, hidden(device, 1, 5, 32))


@case("encoder_hidden_states are not contiguous")
def encoder_not_contiguous(device):
    return crossed(device, hidden(device, 5, 2, 32).transpose(0, 1))


@case("cross-attention with a DynamicCache")
def cross_attention_with_a_plain_cache(device):
    return crossed(device, hidden(device, 2, 5, 32), lambda x: DynamicCache())


def kept(make):
    """A cache that already holds cross-attention keys and values, of make(x)."""

    def cache(x):
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        both.cross_attention_cache.update(make(x), make(x), 0)
        both.is_updated[0] = True
        return both

    return cache


@case("the kept cross-attention keys have shape (2, 4, 7, 8), not (2, 4, 5, 8)")
def kept_keys_of_another_length(device):
    return crossed(
        device, hidden(device, 2, 5, 32), kept(lambda x: hidden(device, 2, 4, 7, 8))
    )  # fmt: skip


@case("the kept cross-attention keys differ from the input in type, dtype or device")
def kept_keys_in_half(device):
    half = kept(lambda x: hidden(device, 2, 4, 5, 8).half())
    return crossed(device, hidden(device, 2, 5, 32), half)


def gpt2_crossed(device, encoder, cache=None, **changes):
    block = gpt2(device, **({"add_cross_attention": True} | changes)).transformer.h[0]
    x = hidden(device, 2, 6, 48)

    def run():
        inputs = {"past_key_values": cache(x)} if cache is not None else {}
        return first(block(x, encoder_hidden_states=encoder, **inputs))

    return run


@case("the layer has no cross-attention (the original raises the error)", "gpt2_block")
def no_cross_attention_gpt2(device):
    return gpt2_crossed(device, hidden(device, 2, 5, 48), add_cross_attention=False)


@case("encoder_hidden_states differ from the input in type, dtype or device", "gpt2_block")
def encoder_in_half_gpt2(device):
    return gpt2_crossed(device, hidden(device, 2, 5, 48).half())


@case(CONTIGUOUS_GPT2, "gpt2_block")
def encoder_not_contiguous_gpt2(device):
    return gpt2_crossed(device, hidden(device, 5, 2, 48).transpose(0, 1))


@case("cross-attention with a DynamicCache", "gpt2_block")
def cross_attention_with_a_plain_cache_gpt2(device):
    return gpt2_crossed(device, hidden(device, 2, 5, 48), lambda x: DynamicCache())


@case("the kept cross-attention keys have shape (2, 4, 7, 12), not (2, 4, 5, 12)", "gpt2_block")
def kept_keys_of_another_length_gpt2(device):
    return gpt2_crossed(
        device, hidden(device, 2, 5, 48), kept(lambda x: hidden(device, 2, 4, 7, 12))
    )  # fmt: skip


@case("reorder_and_upcast_attn is set", "gpt2_block", versions=">=5")
def reorder_and_upcast_in_cross_attention(device):
    block = gpt2(device, add_cross_attention=True, attn_implementation="eager").transformer.h[0]
    block.crossattention.reorder_and_upcast_attn = True
    x, encoder = hidden(device, 2, 6, 48), hidden(device, 2, 5, 48)
    return lambda: first(block(x, encoder_hidden_states=encoder))


# --- GPT-2's language model head -----------------------------------------------------------------

HEAD = "gpt2_lm_head"


def headed(device, change=None, **inputs):
    model = gpt2(device)
    if change is not None:
        change(model)
    return call(model, device, **inputs)


@case("labels are given, and the loss is the original's", HEAD)
def labels(device):
    return headed(device, labels=token_ids(2, 6, device))


@case("logits_to_keep is a list", HEAD)
def logits_to_keep_as_list(device):
    return headed(device, logits_to_keep=[0, 3])


@case("a submodule (Linear) has hooks, which fusion would skip", HEAD)
def hook_on_the_head(device):
    def change(model):
        model.lm_head.register_forward_hook(lambda module, args, out: out * 2)

    return headed(device, change)


@case("the forward of a submodule (Linear) was replaced", HEAD)
def head_with_a_forward_of_its_own(device):
    def change(model):
        old = model.lm_head.forward
        model.lm_head.forward = lambda x: old(x) + 1

    return headed(device, change)


@case("a submodule is a CastingLinear, not a Linear", HEAD)
def head_of_another_type(device):
    class CastingLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    def change(model):
        model.lm_head.__class__ = CastingLinear

    return headed(device, change)


@case("the model is a CustomModel", HEAD)
def another_model_beneath(device):
    class CustomModel(transformers.GPT2Model):
        pass

    def change(model):
        model.transformer.__class__ = CustomModel

    return headed(device, change)


@case("model.parallelize() is in force", HEAD, versions="<5")
def parallelized(device):
    def change(model):
        model.model_parallel = True
        model.transformer.first_device = torch.device(device)

    return headed(device, change)
