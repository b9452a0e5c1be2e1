"""More calls that must run the original: submodules that fusion would skip, parameters it can't
read.
"""

import torch
from fallback_cases import CASES, Case, bert, call, case, changed, first, gpt2, hidden
from helpers import BEFORE_5
from torch import nn

# --- submodules that fusion would skip -----------------------------------------------------------


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


# --- parameters ----------------------------------------------------------------------------------


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
