"""Promise 3: on and off at any time and in any order; off puts back the very objects."""

import importlib
import inspect
import threading

import made_up
import pytest
import torch
from helpers import STEP_TARGETS, assert_replaced, run_python, tiny_bert, tiny_gpt2, token_ids
from made_up import MODULE, ONE, on
from transformers.models.bert import modeling_bert
from transformers.models.decision_transformer import modeling_decision_transformer
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_bigcode import modeling_gpt_bigcode
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.opt import modeling_opt

import eet_patch

MODULES = (
    modeling_bert,
    modeling_gpt2,
    modeling_decision_transformer,
    modeling_opt,
    modeling_gpt_neo,
    modeling_gpt_bigcode,
)
CLASSES = [
    modeling_bert.BertLayer,
    modeling_gpt2.GPT2Block,
    modeling_decision_transformer.DecisionTransformerGPT2Block,
    modeling_opt.OPTDecoderLayer,
    modeling_gpt_neo.GPTNeoBlock,
    modeling_gpt_bigcode.GPTBigCodeBlock,
]


# --- real host: identity -------------------------------------------------------------------------


def class_dicts():
    """Every class of the patched modules with what stands in it."""
    return {
        (module.__name__, name): dict(vars(cls))
        for module in MODULES
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
    }


def assert_identical(before):
    after = class_dicts()
    assert after.keys() == before.keys()
    for key, attributes in before.items():
        assert after[key].keys() == attributes.keys()
        for name, value in attributes.items():
            if name not in ("__dict__", "__weakref__", "_abc_impl"):
                assert after[key][name] is value, f"{key}.{name} is another object"


def test_disable_restores_the_very_objects():
    before = class_dicts()
    for _ in range(3):
        eet_patch.enable()
        for cls in CLASSES:
            assert vars(cls)["forward"] is not before[cls.__module__, cls.__name__]["forward"]
        eet_patch.enable()  # twice is once
        eet_patch.disable()
        assert_identical(before)
        eet_patch.disable()
        assert_identical(before)


def test_enable_touches_only_the_named_methods():
    named = {tuple(target.attribute.split(".")) for target in eet_patch.TARGETS}
    before = class_dicts()
    eet_patch.enable()
    for key, attributes in class_dicts().items():
        for name, value in attributes.items():
            if name not in ("__dict__", "__weakref__") and value is not before[key].get(name):
                assert (key[1], name) in named


def test_a_plain_function_with_the_hosts_signature():
    signatures = {cls: inspect.signature(cls.forward) for cls in CLASSES}
    names = {cls: (cls.forward.__name__, cls.forward.__qualname__) for cls in CLASSES}
    eet_patch.enable()
    for cls in CLASSES:
        assert inspect.isfunction(vars(cls)["forward"])
        assert inspect.signature(cls.forward) == signatures[cls]
        assert (cls.forward.__name__, cls.forward.__qualname__) == names[cls]


@pytest.mark.parametrize("make, name", [(tiny_bert, "bert_layer"), (tiny_gpt2, "gpt2_block")])
def test_a_model_built_before_and_one_built_after(make, name):
    ids = token_ids(2, 6)
    with torch.no_grad():
        early = make()
        own = early(ids)[0]
        eet_patch.enable(exclude=STEP_TARGETS)
        late = make()
        for model in (early, late):
            eet_patch.reset_report()
            torch.testing.assert_close(model(ids)[0], own, rtol=1e-4, atol=1e-4)
            assert_replaced(name, calls=2)
        eet_patch.disable()
        eet_patch.reset_report()
        for model in (early, late):
            assert torch.equal(model(ids)[0], own)
    row = eet_patch.report()[name]
    assert (row.replaced, row.fallbacks) == (0, {})


ORDERS = """\
enable import build
import enable build
import build enable
enable import enable build enable
enable disable import build enable"""
SCRIPT = """
import os
import sys
import torch
import eet_patch
def run(steps):
    assert "transformers" not in sys.modules
    for step in steps:
        if step == "import":
            import transformers
            from transformers import BertConfig, BertModel
        elif step == "build":
            model = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
                                         num_attention_heads=2, intermediate_size=16)).eval()
        else:
            getattr(eet_patch, step)()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        out = model(ids)[0]
        row = eet_patch.report()["bert_model"]
        assert (row.replaced, row.fallbacks, row.status) == (1, {}, "applied"), row
        eet_patch.disable()
        own = model(ids)[0]
    assert (out - own).abs().max() < 1e-5
    assert eet_patch.report()["bert_model"].replaced == 1
for order in sys.argv[1].splitlines():
    child = os.fork()  # each order in a process that has never imported transformers
    if child == 0:
        run(order.split())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.slow
def test_any_order_in_a_fresh_process():
    run_python(SCRIPT, ORDERS)


def test_disabled_before_the_import_leaves_it_alone(host):
    finder = host(imported=False)
    eet_patch.enable()
    eet_patch.disable()
    layers = importlib.import_module(MODULE)
    assert vars(layers.Layer)["forward"] is vars(finder.layers.Layer)["forward"]
    assert not on(layers.Layer)
    eet_patch.enable()
    assert on(layers.Layer)


# --- a made-up host: inheritance and __init_subclass__ -------------------------------------------


def test_an_inherited_method_is_deleted_again(host):
    layers = host(made_up.target(attribute="Leaf.forward"))
    base = vars(layers.Layer)["forward"]
    assert "forward" not in vars(layers.Leaf)
    eet_patch.enable()
    assert on(layers.Leaf) and not on(layers.Layer)
    eet_patch.disable()
    assert "forward" not in vars(layers.Leaf)
    assert vars(layers.Layer)["forward"] is base
    assert not on(layers.Leaf)


def test_a_method_wrapped_by_init_subclass(host):
    """The replacement goes beneath the parent's wrapper, which still recognises itself; undo
    restores the old one.
    """
    calls = []
    adapter = made_up.scaling_adapter(calls=calls)
    layers = host(made_up.target(attribute="Wrapped.forward", adapter=adapter))
    wrapper = vars(layers.Wrapped)["forward"]
    eet_patch.enable()
    layer = layers.Wrapped()
    with torch.no_grad():
        assert layer(ONE).tolist() == [100, 100]
    assert layer.through_wrapper  # type(self).forward is the parent's own newest wrapper
    assert calls[0][1] is wrapper.__wrapped__
    eet_patch.disable()
    assert vars(layers.Wrapped)["forward"] is wrapper
    assert not on(layers.Wrapped)


def test_an_instance_bound_before_disable_runs_the_original_after(host):
    """accelerate and others keep the bound forward they found: it must not go on replacing."""
    layers = host()
    eet_patch.enable()
    bound = layers.Layer().forward
    with torch.no_grad():
        assert bound(ONE).tolist() == [100, 100]
        eet_patch.disable()
        assert bound(ONE).tolist() == [2, 2]
        eet_patch.enable()
        eet_patch.disable()
        assert bound(ONE).tolist() == [2, 2]


# --- scopes --------------------------------------------------------------------------------------


def test_scopes_nest(host):
    layers = host(made_up.target("a"), made_up.target("b", "Leaf.forward"))
    state = lambda: (on(layers.Layer), on(layers.Leaf))  # noqa: E731
    with eet_patch.enabled(only="a"):
        assert eet_patch.report().enabled
        assert on(layers.Layer)
        with eet_patch.enabled(only="b"):
            assert state() == (False, True)
        assert on(layers.Layer) and eet_patch.report()["b"].status != "applied"
    assert state() == (False, False)
    assert not eet_patch.report().enabled
    assert vars(layers.Leaf).get("forward") is None


def test_a_scope_gives_back_what_was_in_force(host):
    layers = host()
    eet_patch.enable(strict=True)
    layer = layers.Layer()
    layer.reason = "made up"
    with torch.no_grad():
        with eet_patch.enabled():
            assert layer(ONE).tolist() == [2, 2]
        with pytest.raises(eet_patch.FallbackError, match="made up"):
            layer(ONE)
    assert on(layers.Layer)


def test_scopes_that_overlap(host):
    layers = host()
    first, second = eet_patch.enabled(), eet_patch.enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert on(layers.Layer)
    second.__exit__(None, None, None)
    assert not on(layers.Layer)


def test_disable_inside_a_scope(host):
    layers = host()
    with eet_patch.enabled():
        with eet_patch.enabled():
            eet_patch.disable()
            assert not on(layers.Layer)
        assert not on(layers.Layer)
    assert not on(layers.Layer)


def test_an_exception_leaves_the_scope(host):
    layers = host()
    before = vars(layers.Layer)["forward"]
    with pytest.raises(ZeroDivisionError), eet_patch.enabled():
        raise ZeroDivisionError
    assert vars(layers.Layer)["forward"] is before


def test_a_scope_as_decorator(host):
    layers = host()

    @eet_patch.enabled()
    def call():
        return on(layers.Layer)

    assert call() and call() and not on(layers.Layer)


# --- threads -------------------------------------------------------------------------------------


def in_threads(function, count=4):
    errors = []

    def guarded(index):
        try:
            function(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_call_while_another_switches():
    """Every call gives the one answer, whichever code ran; no count is lost; the end is the
    beginning.
    """
    model, ids = tiny_bert(), token_ids(2, 6)
    before = class_dicts()
    with torch.no_grad():
        own = model(ids)[0]
    stop = threading.Event()

    def work(index):
        if index == 0:
            for _ in range(30):
                eet_patch.enable()
                eet_patch.disable()
            stop.set()
            return
        with torch.no_grad():
            while not stop.is_set():
                torch.testing.assert_close(model(ids)[0], own, rtol=1e-4, atol=1e-4)

    in_threads(work)
    assert_identical(before)


def test_scopes_in_threads(host):
    layers = host()
    barrier = threading.Barrier(4)

    def work(index):
        for _ in range(20):
            with eet_patch.enabled():
                barrier.wait(timeout=60)
                assert on(layers.Layer)
                barrier.wait(timeout=60)

    in_threads(work)
    assert not on(layers.Layer)


def test_counts_in_threads(host):
    layers = host()
    odd = layers.Layer()
    odd.reason = "made up"
    eet_patch.enable()

    def work(index):
        with torch.no_grad():
            for _ in range(200):
                layers.Layer()(ONE)
                odd(ONE)

    in_threads(work)
    row = eet_patch.report()["made_up"]
    assert (row.replaced, row.fallbacks) == (800, {"made up": 800})
