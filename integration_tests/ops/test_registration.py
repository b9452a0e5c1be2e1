"""Every public op as torch sees it: opcheck, torch.compile(fullgraph=True), torch.export,
gradients.
"""

import inspect

import pytest
import torch
from helpers import run_python

from eet_patch import ops
from eet_patch.ops import registration
from eet_patch.testing import inputs

SHAPE = (2, 5, 32)
HEADS, HEAD_DIM, CAPACITY, VOCAB = 4, 8, 9, 70
INT32 = torch.int32
# Public, but no ops: they prepare a call on the host, or read a result there.
NO_OPS = {
    *("BeamState", "DecodeLayer", "beam_state", "begin_beams", "ended_sequences", "goes_on"),
    *("Packing", "decode_layers_workspace", "pack_layers", "select_token_workspace"),
}


def randn(device, *shape):
    return inputs.randn(*shape, dtype=torch.float32, device=device)


def caches(device, past_len):
    shape = (SHAPE[0], HEADS, CAPACITY, HEAD_DIM)
    return {
        "key_cache": randn(device, *shape),
        "value_cache": randn(device, *shape),
        "past_len": past_len,
    }


def beam_step_arguments(device):
    batch, num_beams, kept, limit = 2, 3, 6, 7
    rows = batch * num_beams
    state = ops.beam_state(batch, num_beams, kept, limit, torch.empty(0, device=device))
    ops.begin_beams(state, limit, 1.0, False)

    def full(value, dtype, *shape):
        return torch.full((rows, *shape), value, dtype=dtype, device=device)

    own = torch.arange(rows, dtype=INT32, device=device)[:, None]
    return {
        "state": state,
        "scores": -torch.rand(batch, kept).sort(dim=1).values.to(device),
        "candidate_tokens": torch.arange(kept, dtype=INT32).repeat(batch, 1).to(device),
        "tokens": full(0, torch.int64, limit),
        "input_ids": full(0, torch.int64),
        "position_ids": full(3, torch.int64),
        "lengths": full(4, INT32),
        "key_rows": own // num_beams * num_beams + full(0, INT32, 5 + limit),
        "seen": ops.seen_tokens(full(0, torch.int64, 1), VOCAB),
        "eos_token_ids": torch.tensor([3], device=device),
    }


def decode_layers_arguments(device):
    hidden_size = HEADS * HEAD_DIM

    def layer():
        return ops.DecodeLayer(
            randn(device, hidden_size),
            randn(device, hidden_size),
            (randn(device, hidden_size, 3 * hidden_size),),
            (randn(device, 3 * hidden_size),),
            randn(device, hidden_size, hidden_size),
            None,
            randn(device, hidden_size),
            None,
            randn(device, hidden_size, 2 * hidden_size),
            None,
            randn(device, 2 * hidden_size, hidden_size),
            None,
            *(randn(device, 3, HEADS, CAPACITY, HEAD_DIM) for _ in range(2)),
            HEAD_DIM**-0.5,
        )

    layers = [layer(), layer()]
    _alive.extend(layers)  # a table holds addresses alone
    hidden_states = randn(device, 3, hidden_size)
    table = ops.pack_layers(layers, in_out=True)
    return {
        "hidden_states": hidden_states,
        "table": table,
        "lengths": torch.tensor([4, 0, 7], dtype=INT32, device=device),
        "activation": "gelu_tanh",
        "norm_eps": 1e-5,
        "workspace": ops.decode_layers_workspace(table, hidden_states, 3),
        "out": torch.zeros_like(hidden_states),
    }


_alive = []


def select_token_arguments(device, **options):
    rows = 3
    history = torch.randint(0, VOCAB, (rows, 8), device=device)
    return {
        "logits": randn(device, rows, VOCAB),
        "tokens": history.clone(),
        "input_ids": history[:, 4].clone(),
        "position_ids": torch.full((rows,), 4, device=device),
        "lengths": torch.full((rows,), 4, dtype=INT32, device=device),
        "finished": torch.zeros(rows, dtype=torch.bool, device=device),
        "unfinished_count": torch.tensor([rows], dtype=INT32, device=device),
        "seen": ops.seen_tokens(history, VOCAB),
        "repetition_penalty": 1.2,
        **options,
    }


def norm_arguments(device):
    return inputs.bias_residual_layernorm_inputs(SHAPE, torch.float32, device)


def named(names, values, **others):
    return dict(zip(names, values, strict=True)) | others


def with_out(given, *names):
    like = given.get("hidden_states")
    return given | {name: torch.zeros_like(like) for name in names}


F32 = torch.float32
# Case -> (the public function, device -> its arguments).
CASES = {
    "layernorm": (
        ops.layernorm,
        lambda d: named(
            ("hidden_states", "weight", "bias"), inputs.layernorm_inputs(SHAPE, F32, d)
        ),
    ),
    "layernorm_out": (
        ops.layernorm,
        lambda d: with_out(
            {"hidden_states": randn(d, *SHAPE), "weight": None, "bias": None}, "out"
        ),
    ),
    "bias_residual_layernorm": (
        ops.bias_residual_layernorm,
        lambda d: with_out(norm_arguments(d), "sum_out"),
    ),
    "bias_residual_layernorm_out": (
        ops.bias_residual_layernorm,
        lambda d: with_out(norm_arguments(d), "sum_out", "out"),
    ),
    "bias_activation": (
        ops.bias_activation,
        lambda d: {"hidden_states": randn(d, *SHAPE), "bias": randn(d, 32), "activation": "relu"},
    ),
    "bias_activation_out": (
        ops.bias_activation,
        lambda d: with_out({"hidden_states": randn(d, *SHAPE), "bias": None}, "out"),
    ),
    "embedding": (ops.embedding, lambda d: inputs.embedding_inputs(SHAPE, F32, d)),
    "linear": (
        ops.linear,
        lambda d: inputs.linear_inputs(SHAPE, 24, F32, d, residual=True, norm=True),
    ),
    "linear_in_out": (
        ops.linear,
        lambda d: inputs.linear_inputs(SHAPE, 24, F32, d, weight_layout="in_out"),
    ),
    "attention": (
        ops.attention,
        lambda d: named(
            ("query", "key", "value"),
            inputs.attention_inputs(2, 4, 3, 7, 8, F32, d),
            attention_mask=inputs.attention_mask("bool", (2, 1, 1, 7), F32, d),
            is_causal=True,
        ),
    ),
    "attention_packed": (
        ops.attention,
        lambda d: {
            **{name: randn(d, 9, HEADS, HEAD_DIM) for name in ("query", "key", "value")},
            "cu_seqlens": inputs.cu_seqlens_of([4, 5], d),
            "max_seqlen": 5,
        },
    ),
    "multi_head_attention": (
        ops.multi_head_attention,
        lambda d: inputs.attention_block_inputs(SHAPE, HEADS, F32, d),
    ),
    "masked_multi_head_attention": (
        ops.masked_multi_head_attention,
        lambda d: inputs.attention_block_inputs(SHAPE, HEADS, F32, d, norm="pre") | caches(d, 3),
    ),
    "masked_multi_head_attention_uncached": (
        ops.masked_multi_head_attention,
        lambda d: inputs.attention_block_inputs(SHAPE, HEADS, F32, d, norm="pre"),
    ),
    "cross_multi_head_attention": (
        ops.cross_multi_head_attention,
        lambda d: inputs.cross_attention_block_inputs(SHAPE, 6, HEADS, F32, d),
    ),
    "ffn": (ops.ffn, lambda d: inputs.ffn_inputs(SHAPE, 48, F32, d)),
    "seen_tokens": (
        ops.seen_tokens,
        lambda d: {"token_ids": torch.randint(0, 70, (3, 5), device=d), "vocab_size": VOCAB},
    ),
    "select_token": (ops.select_token, select_token_arguments),
    "select_token_sampling": (
        ops.select_token,
        lambda d: select_token_arguments(
            d, noise=torch.empty(3, VOCAB).exponential_().to(d), top_k=9, top_p=0.9
        ),
    ),
    "top_candidates": (
        ops.top_candidates,
        lambda d: {"logits": randn(d, 4, VOCAB), "count": 6, "row_scores": randn(d, 4)},
    ),
    "pack_tokens": (
        ops.pack_tokens,
        lambda d: {"attention_mask": (torch.arange(6) < torch.tensor([[4], [6], [1]])).to(d)},
    ),
    "gather_rows": (
        ops.gather_rows,
        lambda d: {
            "rows": randn(d, 5, 32),
            "index": torch.tensor([3, -1, 0, 3], dtype=INT32, device=d),
        },
    ),
    "beam_step": (ops.beam_step, beam_step_arguments),
    "decode_layers": (ops.decode_layers, decode_layers_arguments),
}
cases = pytest.mark.parametrize("case", CASES)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes which of our ops the dispatcher runs, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == registration.NAMESPACE:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def flat(value):
    """Tensors in a result or in arguments, named tuples and all."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def copied(given):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, given)


def overload_and_arguments(function, given):
    """What a call of the public function asks of the dispatcher, before it has run."""
    recorder = Recorder()
    with recorder:
        function(**copied(given))
    ((overload, args, kwargs),) = recorder.calls
    return overload, args, kwargs


def test_every_public_function_is_a_case_or_says_why_not():
    names = {function.__name__ for function, _ in CASES.values()}
    assert names | NO_OPS == set(ops.__all__)


def test_every_registered_op_is_checked(device):
    checked = {
        overload_and_arguments(function, make(device))[0].name().split("::")[1]
        for function, make in CASES.values()
    }
    namespace = getattr(torch.ops, registration.NAMESPACE)
    registered = {n for n in dir(namespace) if hasattr(getattr(namespace, n), "default")}
    assert checked == registered


@cases
def test_opcheck(device, case):
    function, make = CASES[case]
    overload, args, kwargs = overload_and_arguments(function, make(device))
    results = torch.library.opcheck(overload, copied(args), copied(kwargs))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@cases
def test_watched_and_plain_calls_do_the_same(device, case):
    function, make = CASES[case]
    given = make(device)
    plain, watched = copied(given), copied(given)
    expected = function(**plain)
    with Recorder():
        out = function(**watched)
    for a, b in zip(flat((expected, plain)), flat((out, watched)), strict=True):
        assert torch.equal(a, b)


@cases
def test_compiles_into_one_graph(device, case):
    """Results and every buffer that the op writes are those of the eager call."""
    function, make = CASES[case]
    given = make(device)

    def call(tensors, rest):
        return function(**tensors, **rest)

    tensors = {k: v for k, v in given.items() if flat(v)}
    rest = {k: v for k, v in given.items() if not flat(v)}
    eager, compiled = copied(tensors), copied(tensors)
    torch._dynamo.reset()
    expected = call(eager, rest)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(compiled, rest)
    for a, b in zip(flat((expected, eager)), flat((out, compiled)), strict=True):
        assert torch.equal(a, b)


class Layer(torch.nn.Module):
    """Norm, cached attention and feed-forward, with something of torch's own between them."""

    def __init__(self, device):
        super().__init__()
        parts = {
            "norm": inputs.linear_inputs(SHAPE, 32, F32, device),
            "attention": inputs.attention_block_inputs(SHAPE, HEADS, F32, device, norm="pre"),
            "ffn": inputs.ffn_inputs(SHAPE, 48, F32, device, norm="pre"),
        }
        self.options, self.names = {}, {}
        for part, given in parts.items():
            given.pop("hidden_states")
            self.options[part] = {k: v for k, v in given.items() if not flat(v)}
            self.names[part] = [name for name in given if flat(given[name])]
            for name in self.names[part]:
                self.register_buffer(f"{part}_{name}", given[name])

    def of(self, part):
        tensors = {name: getattr(self, f"{part}_{name}") for name in self.names[part]}
        return {**tensors, **self.options[part]}

    def forward(self, x, key_cache, value_cache):
        x = ops.linear(torch.sin(x), **self.of("norm"))
        cached = {"key_cache": key_cache, "value_cache": value_cache, "past_len": 2}
        x = ops.masked_multi_head_attention(x, **self.of("attention"), **cached)
        return ops.ffn(x * 2, **self.of("ffn")), key_cache.sum()


def layer_arguments(device):
    return (randn(device, *SHAPE), *list(caches(device, 2).values())[:2])


def assert_close(out, expected):
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_of_ops_compiles_with_inductor(device):
    layer, given = Layer(device), layer_arguments(device)
    torch._dynamo.reset()
    with torch.no_grad():
        expected_caches, caches_ = copied(given[1:]), copied(given[1:])
        expected = layer(given[0], *expected_caches)
        compiled = torch.compile(layer, fullgraph=True)
        assert_close(compiled(given[0], *caches_), expected)
    assert_close(caches_, expected_caches)


@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_of_ops_exports(device, strict):
    layer, given = Layer(device), layer_arguments(device)
    with torch.no_grad():
        program = torch.export.export(layer, copied(given), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "eet_patch.ffn.default" in targets
        assert_close(program.module()(*copied(given)), layer(*copied(given)))


def test_sizes_may_be_dynamic(device):
    def call(x, weight):
        return ops.linear(x.relu(), weight)

    torch._dynamo.reset()
    weight, counter = randn(device, 24, 32), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 5, 70):
        x = randn(device, rows, 32)
        assert torch.equal(compiled(x, weight), call(x, weight))
    assert counter.frame_count == 1


def test_a_backward_pass_raises(device):
    x = randn(device, *SHAPE).requires_grad_()
    out = ops.layernorm(x, None, None)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="eet_patch.*autograd|autograd.*eet_patch"):
        out.sum().backward()
    with torch.no_grad():
        assert not ops.layernorm(x, None, None).requires_grad


def test_wrong_arguments_raise_the_same_through_the_dispatcher(device):
    x = randn(device, *SHAPE)
    for scope in (torch.no_grad(), Recorder()):
        with scope, pytest.raises(ValueError, match=r"weight must have shape \(32,\), got \(7,\)"):
            ops.layernorm(x, randn(device, 7), None)


def test_plain_calls_go_past_the_dispatcher(device):
    """What layers of a patched model and loops rely on: no 13 us a call."""
    x = randn(device, *SHAPE)
    with torch.profiler.profile() as profile:
        ops.layernorm(x, None, None)
    assert not any(event.key == "eet_patch::layernorm" for event in profile.key_averages())


def test_signatures_and_docstrings_stay():
    for name in ops.__all__:
        function = getattr(ops, name)
        assert function.__doc__ and function.__module__.startswith("eet_patch.ops")
        if name not in NO_OPS:
            for section in ("Args:", "Raises:"):
                assert section in function.__doc__, f"{name} documents no {section}"
            for parameter in inspect.signature(function).parameters:
                assert parameter in function.__doc__, f"{name} doesn't document {parameter}"


def test_importing_us_imports_no_compiler():
    code = "import sys, eet_patch.ops; print('torch._dynamo' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"
