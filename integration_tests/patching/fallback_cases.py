"""Calls that must run the original, each with the one reason that the report has to give.

A case is a function of the device that builds a model and returns the call; models have one layer, so that the call's
only layer falls back. Direct calls of a layer return a tensor, or a tuple before transformers 5.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from helpers import BEFORE_5, HOST, tiny_bert, tiny_gpt2, token_ids
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


# --- the engine's own reasons -----------------------------------------------------------------------------------------


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


# --- submodules that fusion would skip ----------------------------------------------------------------------------------


def hook_case(register, path):
    """The hook must run and change the result: the call gives what it gave with it."""

    def build(device):
        model = bert(device)
        getattr(model.encoder.layer[0].get_submodule(path), register)(HOOKS[register])
        return call(model, device)

    return build


HOOKS = {
    "register_forward_hook": lambda module, args, out: (
        (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2
    ),
    "register_forward_pre_hook": lambda module, args: (args[0] * 2, *args[1:]),
    "register_full_backward_hook": lambda module, grad_in, grad_out: None,
    "register_full_backward_pre_hook": lambda module, grad_out: None,
}
SUBMODULES = {
    "attention": "BertAttention",
    "attention.self": "BertSdpaSelfAttention" if BEFORE_5 else "BertSelfAttention",
    "attention.self.query": "Linear",
    "attention.self.value": "Linear",
    "attention.self.dropout": "Dropout",
    "attention.output": "BertSelfOutput",
    "attention.output.LayerNorm": "LayerNorm",
    "intermediate": "BertIntermediate",
    "intermediate.intermediate_act_fn": "GELUActivation",
    "output.dense": "Linear",
    "output.dropout": "Dropout",
}
for _path, _kind in SUBMODULES.items():
    CASES[f"forward_hook on {_path}"] = Case(
        hook_case("register_forward_hook", _path),
        f"a submodule ({_kind}) has hooks, which fusion would skip",
        "bert_layer",
    )
for _register in list(HOOKS)[1:]:
    CASES[f"{_register} on a Linear"] = Case(
        hook_case(_register, "output.dense"),
        "a submodule (Linear) has hooks, which fusion would skip",
        "bert_layer",
    )


class LoraLinear(nn.Module):
    """As PEFT's: the base layer plus a low-rank update."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, 0.5
        self.down = nn.Linear(base.in_features, 2, bias=False).to(base.weight.device)
        self.up = nn.Linear(2, base.out_features, bias=False).to(base.weight.device)

    def forward(self, x):
        return self.base(x) + self.scale * self.up(self.down(x))


@case("a submodule is a LoraLinear, not a Linear")
def replaced_linear(device):
    torch.manual_seed(0)

    def change(layer):
        layer.attention.self.value = LoraLinear(layer.attention.self.value)

    return changed(device, change)


@case("a submodule is a ParametrizedLinear, not a Linear")
def parametrized(device):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def change(layer):
        nn.utils.parametrize.register_parametrization(layer.output.dense, "weight", Doubled())

    return changed(device, change)


@case("a submodule is a Identity, not a LayerNorm")
def replaced_norm(device):
    return changed(device, lambda layer: setattr(layer.output, "LayerNorm", nn.Identity()))


@case("a submodule is a DynamicQuantizedLinear, not a Linear")
def quantised(device):
    class DynamicQuantizedLinear(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(torch.bfloat16).float(), self.bias)

    def change(layer):
        layer.intermediate.dense.__class__ = DynamicQuantizedLinear

    return changed(device, change)


@case("the forward of a submodule (Linear) was replaced")
def forward_replaced(device):
    """As accelerate's hooks do: a forward bound on the instance."""

    def change(layer):
        linear = layer.attention.self.key
        old = linear.forward
        linear.forward = lambda x: old(x) * 3

    return changed(device, change)


@case("feed_forward_chunk was replaced")
def feed_forward_replaced(device):
    def change(layer):
        old = layer.feed_forward_chunk
        layer.feed_forward_chunk = lambda x: old(x) * 2

    return changed(device, change)


@case("a submodule (GPT2MLP) has hooks, which fusion would skip", "gpt2_block")
def hook_on_mlp(device):
    model = gpt2(device)
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: out * 2)
    return call(model, device)


@case("a submodule is a LoraLinear, not a Conv1D", "gpt2_block")
def replaced_conv1d(device):
    torch.manual_seed(0)
    model = gpt2(device)
    attn = model.transformer.h[0].attn
    attn.c_attn.in_features, attn.c_attn.out_features = 48, 144
    attn.c_attn = LoraLinear(attn.c_attn)
    return call(model, device)


# --- parameters -------------------------------------------------------------------------------------------------


@case("a parameter is torch.bfloat16 and the input torch.float32")
def mixed_dtypes(device):
    return changed(device, lambda layer: layer.output.LayerNorm.bfloat16())


@case("a parameter is torch.float16 and the input torch.float32")
def one_half_linear(device):
    """The original raises its own error, and so do we."""
    return changed(device, lambda layer: layer.attention.self.query.half())


@case("a parameter is on meta and the input on {device}")
def parameter_on_meta(device):
    return changed(device, lambda layer: layer.attention.self.query.to("meta"))


@case("a parameter is a QuantizedParameter")
def parameter_subclass(device):
    class QuantizedParameter(nn.Parameter):
        pass

    def change(layer):
        linear = layer.output.dense
        linear.weight = QuantizedParameter(linear.weight.detach())

    return changed(device, change)


@case("a parameter is missing")
def norm_without_weight(device):
    def change(layer):
        layer.output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)

    return changed(device, change)


@case("a parameter is not contiguous")
def transposed_parameter(device):
    def change(layer):
        linear = layer.attention.output.dense
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())

    return changed(device, change)


@case("a parameter has shape (40, 32), not (32, 32)")
def another_shape(device):
    return changed(
        device, lambda layer: setattr(layer.attention.self, "key", nn.Linear(32, 40).to(device))
    )


@case("a layer norm is over (6, 32)")
def norm_over_two_dimensions(device):
    def change(layer):
        layer.output.LayerNorm = nn.LayerNorm((6, 32)).to(device)

    return changed(device, change)


@case("heads were pruned, or the input's hidden size 32 is another", versions="<5")
def pruned_heads(device):
    model = bert(device)
    model.prune_heads({0: [1]})
    return call(model, device)


@case("heads were pruned, or the input's hidden size 48 is not 24", "gpt2_block", versions="<5")
def pruned_heads_gpt2(device):
    model = gpt2(device)
    attn = model.transformer.h[0].attn
    attn.embed_dim = attn.split_size = 24
    block, x = model.transformer.h[0], hidden(device, 2, 6, 48)
    return lambda: first(block(x))


@case("there is no kernel for a head size of 264")
def large_heads(device):
    return call(bert(device, hidden_size=528, num_attention_heads=2), device)


# --- dropout, attentions, activations, arguments ------------------------------------------------------------------------


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
