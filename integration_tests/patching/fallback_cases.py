"""Calls that must run the original, each with the one reason that the report has to give.

A case is a function of the device that builds a model and returns the call; models have one layer,
so that the call's
only layer falls back. Direct calls of a layer return a tensor, or a tuple before transformers 5.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from helpers import HOST, tiny_bert, tiny_gpt2, token_ids
from packaging.specifiers import SpecifierSet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DROPOUT = "dropout is active (the layer is in training mode); call model.eval() for inference"
ATTENTIONS = "attention weights were asked for, and the fused kernel doesn't form them"


@dataclass(frozen=True)
class Case:
    build: Callable
    reason: str
    target: str


CASES = {}
REASONS = []  # also those of cases that this host can't have


def case(reason, target="bert_layer", versions=""):
    """Registers a case; `versions` limits it to hosts that have the feature."""

    def register(build):
        REASONS.append(reason)
        if HOST in SpecifierSet(versions):
            CASES[build.__name__] = Case(build, reason, target)
        return build

    return register


def bert(device, **changes):
    return tiny_bert("bert", device, num_hidden_layers=1, **changes)


def gpt2(device, **changes):
    return tiny_gpt2(device, n_layer=1, **changes)


def bert_layer(device, **changes):
    return bert(device, **changes).encoder.layer[0]


def hidden(device, *shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape or (2, 6, 32), generator=generator).to(device)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def call(model, device, **inputs):
    ids = token_ids(2, 6, device)
    return lambda: model(ids, **inputs)


def changed(device, change):
    """A call of a BERT whose layer `change` has worked on."""
    model = bert(device)
    change(model.encoder.layer[0])
    return call(model, device)


# --- the engine's own reasons --------------------------------------------------------------------


@case("Subclass is a subclass of BertLayer")
def subclass(device):
    from transformers.models.bert.modeling_bert import BertLayer

    class Subclass(BertLayer):
        def forward(self, *args, **kwargs):
            return BertLayer.forward(self, *args, **kwargs)

    model = bert(device)
    model.encoder.layer[0].__class__ = Subclass
    return call(model, device)


@case("the input is a TensorSubclass, not a torch.Tensor")
def tensor_subclass(device):
    class TensorSubclass(torch.Tensor):
        pass

    layer, x = bert_layer(device), hidden(device).as_subclass(TensorSubclass)
    return lambda: first(layer(x))


@case("there is no kernel for torch.float64")
def float64(device):
    return call(bert(device).double(), device)


@case("there is no kernel for the device meta")
def meta(device):
    layer = bert_layer("meta")
    return lambda: first(layer(torch.empty(2, 6, 32, device="meta"))).shape


@case("the input is a FakeTensor, not a torch.Tensor")
def fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    layer = bert_layer(device)
    x = mode.from_tensor(hidden(device))
    return lambda: first(layer(x)).shape


@case("the input is not contiguous")
def non_contiguous(device):
    layer, x = bert_layer(device), hidden(device, 6, 2, 32).transpose(0, 1)
    return lambda: first(layer(x))


@case("autocast is on")
def autocast(device):
    inner = call(bert(device), device)

    def run():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return inner()

    return run


@case("the call is being traced")
def tracing(device):
    layer, x = bert_layer(device), hidden(device)

    def run():
        traced = torch.jit.trace(lambda x: first(layer(x)), (x,), check_trace=False)
        return traced(x)

    return run


MODE = "a torch dispatch mode or function transform is active"


@case(MODE)
def flop_counter(device):
    inner = call(bert(device), device)

    def run():
        with FlopCounterMode(display=False) as counter:
            out = inner()
        assert counter.get_total_flops() > 2 * 12 * 4 * 32 * 32
        return out[0], counter.get_total_flops()

    return run


@case(MODE)
def vmap(device):
    layer, x = bert_layer(device, attn_implementation="eager"), hidden(device)
    return lambda: torch.vmap(lambda row: first(layer(row[None]))[0])(x)


@case("hooks on all modules are registered")
def global_hooks(device):
    inner = call(bert(device), device)

    def run():
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(type(module).__name__)
        )
        try:
            out = inner()
        finally:
            handle.remove()
        return out[0], tuple(seen)

    return run


# --- dropout, attentions, activations, arguments -------------------------------------------------


@case(DROPOUT)
def training_dropout(device):
    return call(bert(device).train(), device)


@case(DROPOUT, "gpt2_block")
def training_dropout_gpt2(device):
    return call(gpt2(device).train(), device)


def only_dropouts_train(model):
    """Monte Carlo dropout: everything in eval mode but the Dropout modules."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    return model


@case(DROPOUT)
def monte_carlo_dropout(device):
    return call(only_dropouts_train(bert(device)), device)


@case(DROPOUT, "gpt2_block")
def monte_carlo_dropout_gpt2(device):
    return call(only_dropouts_train(gpt2(device)), device)


@case(ATTENTIONS)
def output_attentions(device):
    return call(bert(device, attn_implementation="eager"), device, output_attentions=True)


@case(ATTENTIONS, "gpt2_block")
def output_attentions_gpt2(device):
    return call(gpt2(device, attn_implementation="eager"), device, output_attentions=True)


@case(ATTENTIONS)
def output_attentions_by_config(device):
    return call(bert(device, attn_implementation="eager", output_attentions=True), device)


@case("there is no kernel for the activation Tanh")
def activation_module(device):
    return call(bert(device, hidden_act="tanh"), device)


@case("there is no kernel for the activation QuickGELUActivation", "gpt2_block")
def activation_gpt2(device):
    return call(gpt2(device, activation_function="quick_gelu"), device)


@case("there is no kernel for the activation builtin_function_or_method")
def activation_function(device):
    def change(layer):
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = torch.sin

    return changed(device, change)


@case("positions are relative_key", versions="<5")
def relative_positions(device):
    return call(bert(device, position_embedding_type="relative_key"), device)


@case("the argument head_mask is given, which the kernels don't know", versions="<5")
def head_mask(device):
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.5]], device=device)
    return call(bert(device, attn_implementation="eager"), device, head_mask=mask)


@case("the argument made_up is given, which the kernels don't know")
def unknown_argument(device):
    layer, x = bert_layer(device), hidden(device)
    return lambda: first(layer(x, made_up=torch.ones(1)))


@case("the input has 2 dimensions")
def two_dimensions(device):
    layer, x = bert_layer(device), hidden(device, 6, 32)
    return lambda: first(layer(x))


@case("reorder_and_upcast_attn is set", "gpt2_block")
def reorder_and_upcast(device):
    changes = {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}
    return call(gpt2(device, **changes), device)


def with_instance_update(cache):
    cache.update = types.MethodType(type(cache).update, cache)
    return cache


class CustomCache(transformers.DynamicCache):
    """A user's cache."""
