"""Promise 5: training, hooks, compilers, copies, workers and every global switch are as without the
patch.
"""

import copy
import functools
import io
import logging
import multiprocessing
import os
import pickle
import sys

import pytest
import torch
from helpers import (
    HOST,
    assert_fell_back,
    assert_replaced,
    batch_of,
    layers_of,
    patched,
    run_python,
    tiny_bert,
    tiny_decoder,
    tiny_gpt2,
    token_ids,
)
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode

import eet_patch

GRADIENTS = "gradients are needed"
tiny_opt = functools.partial(tiny_decoder, "opt")
tiny_neo = functools.partial(tiny_decoder, "gpt_neo")
MODELS = [
    (tiny_bert, "bert_layer"),
    (tiny_gpt2, "gpt2_block"),
    (tiny_opt, "opt_layer"),
    (tiny_neo, "gpt_neo_block"),
]
both = pytest.mark.parametrize("make, name", MODELS, ids=[name for _, name in MODELS])


# --- training ------------------------------------------------------------------------------------


def training_step(make, device, **checkpointing):
    """Loss, gradients, updated weights, and how often the model's layers ran."""
    head = {"head": "ForMaskedLM"} if make is tiny_bert else {}
    model = make(device=device, **head).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    layers = layers_of(model)
    runs = []
    inner = next(layers[0].children())
    inner.register_forward_hook(lambda module, args, out: runs.append(torch.is_grad_enabled()))
    ids = token_ids(2, 6, device)
    torch.manual_seed(5)  # dropout is on
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return loss.detach(), gradients, {k: v.clone() for k, v in model.state_dict().items()}, runs


@both
@pytest.mark.parametrize(
    "checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_a_training_step_is_bit_identical(device, make, name, checkpointing):
    own = training_step(make, device, **checkpointing)
    assert len(own[3]) == (2 if checkpointing else 1)  # checkpointing runs the layer again
    eet_patch.enable()
    out = training_step(make, device, **checkpointing)
    row = eet_patch.report()[name]
    assert row.replaced == 0 and row.fallbacks
    assert torch.equal(out[0], own[0])
    for mine, theirs in zip(out[1:3], own[1:3], strict=True):
        assert mine.keys() == theirs.keys() and len(theirs) > 20
        for key in theirs:
            assert torch.equal(mine[key], theirs[key]), key
    assert out[3] == own[3], "gradient checkpointing was switched off"
    eet_patch.disable()
    again = training_step(make, device, **checkpointing)
    assert torch.equal(again[0], own[0]) and again[3] == own[3]


def test_checkpointed_layers_recognise_themselves():
    """From 5.23 on the parent class wraps `forward` and compares identity: the wrapper must be the
    class's newest.
    """
    from transformers.models.bert.modeling_bert import BertLayer

    wrapped = HOST >= Version("5.23")
    assert (".__init_subclass__." in vars(BertLayer)["forward"].__code__.co_qualname) == wrapped
    with eet_patch.enabled():
        forward = vars(BertLayer)["forward"]
        assert (".__init_subclass__." in forward.__code__.co_qualname) == wrapped


def test_training_then_inference_then_training(device):
    model, ids = tiny_gpt2(device).train(), token_ids(2, 6, device)
    with eet_patch.enabled():
        model(ids, labels=ids).loss.backward()
        eet_patch.reset_report()
        with torch.no_grad():
            model.eval()(ids)
        assert_replaced("gpt2_block")
        model.train()(ids, labels=ids).loss.backward()


# --- compilers and transforms --------------------------------------------------------------------


@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_equals_and_does_not_recompile(device, make, name, backend):
    model, ids = make(device=device), token_ids(2, 6, device)
    options = {"use_cache": False} if make is tiny_gpt2 else {}
    with torch.no_grad():
        own = model(ids, **options)[0]
        torch._dynamo.reset()
        eet_patch.enable()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = torch.compile(model, backend=backend)
            for _ in range(3):
                torch.testing.assert_close(compiled(ids, **options)[0], own, rtol=1e-4, atol=1e-4)
    assert eet_patch.report()[name].fallbacks == {}
    torch._dynamo.reset()


@both
def test_a_layer_stack_compiles_as_one_graph(device, make, name):
    """fullgraph: nothing of ours may break the graph of a stack of layers that the host itself
    allows.
    """
    model = make(device=device)
    layers = layers_of(model)

    def stack(x):
        for layer in layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return x

    x = torch.randn(2, 6, 32 if make is tiny_bert else 48, device=device)
    with torch.no_grad():
        own = stack(x)
        torch._dynamo.reset()
        with eet_patch.enabled():
            out = torch.compile(stack, backend="aot_eager", fullgraph=True)(x)
            torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
            eet_patch.reset_report()
            torch.testing.assert_close(stack(x), own, rtol=1e-4, atol=1e-4)
            assert_replaced(name, calls=2)
    torch._dynamo.reset()


@pytest.mark.slow
def test_torch_compile_with_inductor(device):
    model, ids = tiny_bert("bert", device), token_ids(2, 6, device)
    with torch.no_grad():
        own = model(ids)[0]
        torch._dynamo.reset()
        with eet_patch.enabled():
            out = torch.compile(model)(ids)[0]
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_torch_export(device):
    model, ids = tiny_bert("bert", device), token_ids(2, 6, device)
    with torch.no_grad():
        own = model(ids)[0]
        with eet_patch.enabled():
            program = torch.export.export(model, (ids,), strict=False)
            torch.testing.assert_close(program.module()(ids)[0], own, rtol=1e-4, atol=1e-4)


def test_function_transforms(device):
    layer = tiny_bert("bert", device, attn_implementation="eager").encoder.layer[0]
    x = torch.randn(2, 6, 32, device=device)

    def total(x):
        out = layer(x)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    own = torch.func.grad(total)(x), torch.vmap(total)(x[:, None])
    with eet_patch.enabled():
        out = torch.func.grad(total)(x), torch.vmap(total)(x[:, None])
    for mine, theirs in zip(out, own, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert eet_patch.report()["bert_layer"].replaced == 0


@both
def test_flops_are_counted_as_before(device, make, name):
    model, ids = make(device=device), token_ids(2, 6, device)

    def flops():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids)
        return counter.get_total_flops()

    own = flops()
    with eet_patch.enabled():
        assert flops() == own > 0
    assert_fell_back(name, "a torch dispatch mode or function transform is active")


# --- copies and workers --------------------------------------------------------------------------


def copies(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_patched_model(device, make, name, how):
    model, ids = make(device=device), token_ids(2, 6, device)
    with torch.no_grad(), patched(name):
        own = model(ids)[0]
        twin = copies(model, how)
        eet_patch.reset_report()
        assert torch.equal(twin(ids)[0], own)
        assert_replaced(name, calls=2)
        blob = pickle.dumps(model)
    assert b"eet_patch" not in blob  # loads where we are not installed
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(blob)(ids)[0], own, rtol=1e-4, atol=1e-4)


def work(model, ids, queue, enable):
    """What a worker does; a spawned one has to enable the patch itself."""
    torch.set_num_threads(1)
    if enable:
        eet_patch.enable()
    with torch.no_grad():
        out = model(ids)[0]
    row = eet_patch.report()["bert_model"]
    queue.put((out.tolist(), row.replaced, row.fallbacks))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_workers(monkeypatch, method):
    if method == "fork" and torch.cuda.is_initialized():
        pytest.skip("CUDA can't be used after a fork")
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *paths]))
    )
    context = multiprocessing.get_context(method)
    model, ids = tiny_bert(), token_ids(2, 6)
    with torch.no_grad(), eet_patch.enabled():
        own = model(ids)[0]
        eet_patch.reset_report()
        queue = context.Queue()
        worker = context.Process(target=work, args=(model, ids, queue, method == "spawn"))
        worker.start()
        out, replaced, fallbacks = queue.get(timeout=120)
        worker.join()
    assert (replaced, fallbacks) == (1, {})
    torch.testing.assert_close(torch.tensor(out), own, rtol=1e-5, atol=1e-5)
    assert eet_patch.report()["bert_model"].replaced == 0  # the worker's counts are its own


# --- hooks and other libraries -------------------------------------------------------------------


@both
def test_accelerate_hooks_run_and_come_off(device, make, name):
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module, output):
            return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    model, ids = make(device=device), token_ids(2, 6, device)
    layer = layers_of(model)[1]
    with torch.no_grad():
        plain = model(ids)[0]
        with eet_patch.enabled():
            hooks.add_hook_to_module(layer, Doubling())
            hooked = model(ids)[0]
            hooks.remove_hook_from_module(layer)
            torch.testing.assert_close(model(ids)[0], plain, rtol=1e-4, atol=1e-4)
            assert_replaced(name)
            hooks.add_hook_to_module(layer, Doubling())
        own = model(ids)[0]  # hooked while enabled, called when not
        assert not torch.allclose(own, plain)
        torch.testing.assert_close(hooked, own, rtol=1e-4, atol=1e-4)


def test_accelerate_offload(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_bert(), token_ids(2, 6)
    with torch.no_grad():
        own = model(ids)[0]
        with eet_patch.enabled():
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            torch.testing.assert_close(model(ids)[0], own, rtol=1e-4, atol=1e-4)
    row = eet_patch.report()["bert_layer"]
    assert row.replaced + sum(row.fallbacks.values()) == 2


@both
def test_hooks_on_the_layer_itself_run_around_ours(device, make, name):
    model, ids = make(device=device), token_ids(2, 6, device)
    layer = layers_of(model)[0]
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, out: seen.append("after"))
    with torch.no_grad(), patched(name, calls=2):
        model(ids)
    assert seen == ["before", "after"]


# --- the process ---------------------------------------------------------------------------------


def switches():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "tf32 cudnn": torch.backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "default dtype": torch.get_default_dtype(),
        "seed": torch.initial_seed(),
        "rng": torch.get_rng_state().tolist(),
        "sdp": torch.backends.cuda.flash_sdp_enabled(),
        "environment": dict(os.environ),
        "loggers": [
            (n, getattr(g, "level", 0)) for n, g in sorted(logging.root.manager.loggerDict.items())
        ],
        "handlers": list(logging.root.handlers),
        "excepthook": sys.excepthook,
    }


def test_no_global_switch_is_touched(device):
    bert, gpt2 = tiny_bert("bert", device), tiny_gpt2(device)
    inputs = batch_of("left", device)
    with torch.no_grad():  # the host's own lazy imports
        bert(**inputs), gpt2.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = switches()
    with patched("bert_layer", "gpt2_block"):
        assert switches() == before
        with torch.no_grad():
            inside = switches()
            bert(**inputs), gpt2(**inputs)
            assert switches() == inside
        gpt2.generate(**inputs, max_new_tokens=3, do_sample=False)
        eet_patch.report()
    assert switches() == before


def test_inputs_are_not_written_to(device):
    bert, gpt2 = tiny_bert("bert", device), tiny_gpt2(device)
    inputs = batch_of("left", device)
    saved = {key: value.clone() for key, value in inputs.items()}
    embeddings = torch.randn(3, 11, 32, device=device)
    copied = embeddings.clone()
    with torch.no_grad(), patched("bert_layer", "gpt2_block"):
        bert(**inputs), gpt2(**inputs)
        bert.encoder(embeddings)
    assert torch.equal(embeddings, copied)
    assert all(torch.equal(inputs[key], saved[key]) for key in saved)


def test_the_import_starts_nothing():
    """No host library, no CUDA, no logging, no warning, no thread of ours."""
    run_python(
        """
        import logging, sys, threading, warnings
        import torch
        warnings.simplefilter("error")
        level, handlers = logging.root.level, list(logging.root.handlers)
        loggers = set(logging.root.manager.loggerDict)
        threads = threading.active_count()
        import eet_patch
        eet_patch.enable()
        eet_patch.report()
        assert not torch.cuda.is_initialized()
        assert "transformers" not in sys.modules and "fairseq" not in sys.modules
        assert (logging.root.level, logging.root.handlers) == (level, handlers)
        for name in set(logging.root.manager.loggerDict) - loggers:
            logger = logging.getLogger(name)
            assert logger.level == 0 and not logger.handlers and logger.propagate, name
        assert threading.active_count() == threads
        """
    )
