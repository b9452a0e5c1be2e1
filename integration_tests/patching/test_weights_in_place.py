"""Promise 2: no weight is copied, packed or moved; every change of a weight is seen by the next
call.
"""

import copy
import functools

import pytest
import torch
from helpers import (
    DECODERS,
    assert_replaced,
    batch_of,
    layers_of,
    patched,
    tiny_bert,
    tiny_decoder,
    tiny_gpt2,
    token_ids,
)
from torch import nn

import eet_patch

MODELS = {"bert": (tiny_bert, "bert_layer"), "gpt2": (tiny_gpt2, "gpt2_block")}
for _kind in ("opt", "gpt_neo", "gpt_bigcode"):
    MODELS[_kind] = (functools.partial(tiny_decoder, _kind), DECODERS[_kind][1])


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def build(kind, device, dtype=torch.float32):
    make, name = MODELS[kind]
    return make(device=device, dtype=dtype), name


def last_hidden(model, ids):
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    return out.hidden_states[-1]


def fingerprint(model):
    """Where and what every tensor of the model is."""
    return {
        name: (t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype, t.device, t._version)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }


def test_every_tensor_stays_where_it_is(kind, device, dtype):
    model, name = build(kind, device, dtype)
    before = fingerprint(model)
    parameters = dict(model.named_parameters())
    values = {key: value.clone() for key, value in model.state_dict().items()}
    with patched(name):
        for batch, length in ((1, 1), (2, 70)):
            last_hidden(model, token_ids(batch, length, device))
        if kind != "bert":
            model.generate(**batch_of("left", device), max_new_tokens=5, do_sample=False)
        assert fingerprint(model) == before
    assert fingerprint(model) == before
    for key, parameter in model.named_parameters():
        assert parameter is parameters[key]
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])


def test_no_state_is_left_on_the_modules(kind, device):
    """No attribute, buffer, module or hook of ours: pickles, checkpoints and __repr__ stay the
    host's.
    """
    model, name = build(kind, device)
    last_hidden(model, token_ids(1, 5, device))  # the host's own lazily set attributes
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    text = repr(model)
    with patched(name):
        last_hidden(model, token_ids(1, 5, device))
        assert {path: set(vars(module)) for path, module in model.named_modules()} == before
        assert repr(model) == text


def test_checkpoints_are_equal(kind, device, tmp_path):
    model, name = build(kind, device)
    model.save_pretrained(tmp_path / "before")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with patched(name):
        last_hidden(model, token_ids(1, 5, device))
        model.save_pretrained(tmp_path / "patched")
        assert list(model.state_dict()) == list(state)
        loaded = type(model).from_pretrained(tmp_path / "patched").to(device)
    for file in ("model.safetensors", "config.json"):
        written = (tmp_path / "patched" / file).read_bytes()
        assert written == (tmp_path / "before" / file).read_bytes()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key])


def test_tied_weights_stay_tied(device):
    model = tiny_gpt2(device)
    ids = token_ids(2, 6, device)
    with torch.no_grad(), patched("gpt2_block"):
        before = model(ids).logits
        assert model.lm_head.weight is model.transformer.wte.weight
        model.transformer.wte.weight.mul_(2)
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
        assert not torch.allclose(model(ids).logits, before)


def test_weights_shared_between_layers(device):
    """ALBERT-like sharing: the same Linear object in both layers."""
    model = tiny_bert("bert", device)
    first, second = model.encoder.layer
    second.attention.self.query = first.attention.self.query
    second.output.dense.weight = first.output.dense.weight
    assert_seen(model, "bert_layer", device, lambda: None)


# --- every way in which a weight can change ------------------------------------------------------


def inner_weight(model):
    """A weight that only the replaced layer reads."""
    layer = layers_of(model)[1]
    if hasattr(layer, "mlp"):
        return layer.mlp.c_fc
    return layer.fc1 if hasattr(layer, "fc1") else layer.attention.self.value


def assert_seen(model, name, device, change):
    """After `change()` the patched model gives what an unpatched one with these weights gives."""
    ids = token_ids(2, 6, device)
    with patched(name):
        last_hidden(model, ids)
        change()
        eet_patch.reset_report()
        out = last_hidden(model, ids)
        assert_replaced(name)
    expected = last_hidden(model, ids)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    return out


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(-1.5)


def through_data(layer):
    layer.weight.data.add_(0.3)


def swapped_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def merged_lora(layer):
    """As PEFT merges: weight.data += scale * B @ A."""
    rows, columns = layer.weight.shape
    down, up = torch.randn(4, columns), torch.randn(rows, 4)
    layer.weight.data += (0.3 * up @ down).to(layer.weight)


def bias_changed(layer):
    with torch.no_grad():
        layer.bias.add_(1.0)


@pytest.mark.parametrize(
    "change", [in_place, through_data, swapped_data, new_parameter, merged_lora, bias_changed]
)
def test_a_changed_weight_is_seen_at_once(kind, device, change):
    model, name = build(kind, device)
    before = last_hidden(model, token_ids(2, 6, device))
    out = assert_seen(model, name, device, lambda: change(inner_weight(model)))
    assert (out - before).abs().max() > 1e-2  # the change did change something


def test_merged_and_unmerged_lora_gives_the_old_answers(kind, device):
    model, name = build(kind, device)
    ids = token_ids(2, 6, device)
    layer = inner_weight(model)
    saved = layer.weight.detach().clone()
    with patched(name):
        before = last_hidden(model, ids)
        merged_lora(layer)
        assert not torch.equal(last_hidden(model, ids), before)
        layer.weight.data.copy_(saved)
        assert torch.equal(last_hidden(model, ids), before)


def test_load_state_dict(kind, device):
    model, name = build(kind, device)
    make, _ = MODELS[kind]
    other = make(device=device, seed=7)
    pointers = {key: value.data_ptr() for key, value in model.state_dict().items()}
    assert_seen(model, name, device, lambda: model.load_state_dict(other.state_dict()))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == pointers
    ids = token_ids(1, 5, device)
    with patched(name):
        assert torch.equal(last_hidden(model, ids), last_hidden(other, ids))


def test_load_state_dict_assign(kind, device):
    model, name = build(kind, device)
    state = {
        key: value.clone() for key, value in MODELS[kind][0](seed=7).to(device).state_dict().items()
    }
    assert_seen(model, name, device, lambda: model.load_state_dict(state, assign=True))


def test_an_optimizer_step_is_seen(kind, device):
    model, name = build(kind, device)
    ids = token_ids(2, 6, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step():
        with eet_patch.enabled():
            out = model(ids)
        out[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        eet_patch.reset_report()

    assert_seen(model, name, device, step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_there_and_back_in_half_precision(kind, device, dtype):
    model, name = build(kind, device)
    ids = token_ids(2, 6, device)
    with patched(name):
        full = last_hidden(model, ids)
        model.to(dtype)
        half = last_hidden(model, ids)
        assert half.dtype == dtype
        rounding = {torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
        assert (half.float() - full).norm() < rounding * full.norm()
        model.float()
        back = last_hidden(model, ids)
        assert back.dtype == torch.float32
    # The weights are the rounded ones now, patched or not.
    torch.testing.assert_close(back, last_hidden(model, ids), rtol=1e-4, atol=1e-4)


def test_double_falls_back_and_comes_back(kind, device):
    model, name = build(kind, device)
    ids = token_ids(2, 6, device)
    with patched(name):
        before = last_hidden(model, ids)
        double = last_hidden(model.double(), ids)
        assert double.dtype == torch.float64
        assert (double - before).abs().max() < 1e-3
        row = eet_patch.report()[name]
        assert row.fallbacks == {"there is no kernel for torch.float64": 2}
        eet_patch.reset_report()
        assert torch.equal(last_hidden(model.float(), ids), before)


def test_to_another_device_and_back(kind):
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    model, name = build(kind, "cpu")
    ids = token_ids(2, 6)
    with patched(name):
        before = last_hidden(model, ids)
        moved = last_hidden(model.cuda(), ids.cuda())
        assert (moved.cpu() - before).abs().max() < 1e-3
        assert torch.equal(last_hidden(model.cpu(), ids), before)


def test_a_deep_copy_has_weights_of_its_own(kind, device):
    model, name = build(kind, device)
    ids = token_ids(2, 6, device)
    with patched(name):
        before = last_hidden(model, ids)
        twin = copy.deepcopy(model)
        in_place(inner_weight(twin))
        assert torch.equal(last_hidden(model, ids), before)
        assert not torch.equal(last_hidden(twin, ids), before)


def test_memory_beyond_the_model_is_bounded_and_reported(device):
    """A cache grows by blocks of 64 tokens and an eighth: what no token fills yet is what the
    report says.
    """
    model = tiny_gpt2(device)
    sizes = []
    with torch.no_grad(), patched("gpt2_block"):
        out = model(token_ids(2, 70, device))
        cache = out.past_key_values
        for step in range(70):
            model(token_ids(2, 1, device, seed=step), past_key_values=cache)
            sizes.append(sum(eet_patch.report().memory.values()))
        tokens = cache.get_seq_length()
        assert tokens == 140
        per_token = 2 * 2 * 48 * 4 * 2  # layers, key and value, hidden size, bytes, batch
        assert 0 < max(sizes) <= per_token * (64 + 140 // 8)
        del out, cache
        assert sum(eet_patch.report().memory.values()) == 0
