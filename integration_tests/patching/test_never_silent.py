"""Promise 4: what no kernel supports runs the original, gives its answer, and is reported with the
reason.
"""

import inspect
import re
import types
import warnings

import fallback_cases_attention  # noqa: F401  registers its cases
import fallback_cases_decoders  # noqa: F401
import fallback_cases_modules  # noqa: F401
import pytest
import torch
from fallback_cases import ATTENTIONS, CASES, REASONS
from helpers import (
    STEP_TARGETS,
    assert_fell_back,
    assert_replaced,
    batch_of,
    patched,
    run_python,
    tiny_bert,
    tiny_gpt2,
    token_ids,
)

import eet_patch
from eet_patch import gates
from eet_patch.adapters import (
    bert,
    causal,
    gpt2,
    gpt2_lm_head,
    gpt_bigcode,
    gpt_neo,
    host,
    kv_cache,
    opt,
)

GRADIENTS = "gradients are needed"
LOOPS = "# --- the model in the terms of the loops"


def outcome(run):
    """The result of a call as comparable data, or its exception."""
    torch.manual_seed(0)
    try:
        return flat(run())
    except eet_patch.FallbackError:
        raise
    except Exception as error:
        return [type(error), str(error)]


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "to_tuple") or type(value) in (tuple, list):
        items = value.to_tuple() if hasattr(value, "to_tuple") else value
        return [leaf for item in items for leaf in flat(item)]
    return [] if hasattr(value, "get_seq_length") else [value]


def assert_equal(out, own):
    assert len(out) == len(own)
    for mine, theirs in zip(out, own, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == theirs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_fallback(device, name):
    """Bit for bit the unpatched answer (or exception), counted once for exactly this reason; strict
    raises it.
    """
    case = CASES[name]
    reason = case.reason.format(device=device)
    run = case.build(device)
    with torch.no_grad():
        own = outcome(run)
        with eet_patch.enabled(only=case.target):
            out = outcome(run)
            assert_fell_back(case.target, reason)
        assert_equal(out, own)
        message = f"{case.target} would run the original code: {reason}"
        with eet_patch.enabled(strict=True, only=case.target):
            with pytest.raises(eet_patch.FallbackError, match=f"^{re.escape(message)}$"):
                outcome(run)
        assert_equal(outcome(run), own)


def test_a_model_that_nothing_hinders_is_replaced_under_strict(device):
    bert, gpt2 = tiny_bert("bert", device), tiny_gpt2(device)
    with torch.no_grad(), patched("bert_layer", "gpt2_block", "gpt2_lm_head", strict=True):
        bert(**batch_of("right", device))
        gpt2(**batch_of("left", device))
        gpt2.generate(**batch_of("left", device), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("make, name", [(tiny_bert, "bert_layer"), (tiny_gpt2, "gpt2_block")])
def test_only_the_hindered_layer_falls_back(device, make, name):
    model = (
        make(device=device, num_hidden_layers=3) if make is tiny_bert else make(device, n_layer=3)
    )
    layers = model.encoder.layer if make is tiny_bert else model.transformer.h
    layers[1].register_forward_hook(lambda module, args, out: out)  # on the layer itself: harmless
    (layers[1].output.dense if make is tiny_bert else layers[1].mlp.c_fc).register_forward_hook(
        lambda module, args, out: out * 1.5
    )
    ids = token_ids(2, 6, device)
    with torch.no_grad():
        own = model(ids)[0]
        with eet_patch.enabled():
            out = model(ids)[0]
    row = eet_patch.report()[name]
    assert row.replaced == 2 and sum(row.fallbacks.values()) == 1
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)


# --- gradients -----------------------------------------------------------------------------------


def test_a_plain_call_says_the_remedy_once():
    model, ids = tiny_bert(), token_ids(2, 6)
    with eet_patch.enabled():
        with pytest.warns(eet_patch.PatchWarning) as caught:
            model(ids)
            model(ids)
            tiny_gpt2()(ids)
    mine = [str(w.message) for w in caught if issubclass(w.category, eet_patch.PatchWarning)]
    assert len(mine) == 1
    assert "torch.no_grad()" in mine[0] and "torch.inference_mode()" in mine[0]
    assert_fell_back("bert_layer", GRADIENTS, calls=4)
    assert_fell_back("gpt2_block", GRADIENTS, calls=2)


def test_strict_raises_where_gradients_are_needed():
    model, ids = tiny_bert(), token_ids(2, 6)
    with eet_patch.enabled(strict=True), pytest.raises(eet_patch.FallbackError, match=GRADIENTS):
        model(ids)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_remedy_works_and_says_nothing(device, context):
    model, ids = tiny_bert("bert", device), token_ids(2, 6, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", eet_patch.PatchWarning)
        with context(), patched("bert_layer", calls=2):
            assert not model(ids)[0].requires_grad


def test_frozen_parameters_need_no_gradients(device):
    model, ids = tiny_bert("bert", device).requires_grad_(False), token_ids(2, 6, device)
    with patched("bert_layer"):
        model(ids)
    # ... but the input may: prompt tuning
    embeddings = model.embeddings.word_embeddings(ids).requires_grad_()
    with eet_patch.enabled():
        eet_patch.reset_report()
        model(inputs_embeds=embeddings)[0].sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert_fell_back("bert_layer", GRADIENTS, calls=2)


def test_one_trainable_bias_needs_gradients(device):
    model, ids = tiny_bert("bert", device).requires_grad_(False), token_ids(2, 6, device)
    model.encoder.layer[0].output.LayerNorm.bias.requires_grad_()
    with eet_patch.enabled():
        model(ids)[0].sum().backward()
    assert model.encoder.layer[0].output.LayerNorm.bias.grad is not None
    assert_fell_back("bert_layer", GRADIENTS, calls=2)


# --- what the fused layer doesn't form -----------------------------------------------------------


@pytest.mark.parametrize("make, name", [(tiny_bert, "bert_layer"), (tiny_gpt2, "gpt2_block")])
def test_attentions_are_complete_and_equal(device, make, name):
    model, inputs = make(device=device, attn_implementation="eager"), batch_of("right", device)
    with torch.no_grad():
        own = model(**inputs, output_attentions=True).attentions
        with eet_patch.enabled(exclude=STEP_TARGETS):
            out = model(**inputs, output_attentions=True).attentions
            assert_fell_back(name, ATTENTIONS, calls=2)
            eet_patch.reset_report()
            model(**inputs)
            assert_replaced(name, calls=2)
    assert len(out) == 2
    for mine, theirs in zip(out, own, strict=True):
        assert torch.equal(mine, theirs) and mine.shape == (3, 4, 11, 11)


@pytest.mark.parametrize("make, name", [(tiny_bert, "bert_layer"), (tiny_gpt2, "gpt2_block")])
def test_hidden_states_are_complete_and_equal(device, make, name):
    model, inputs = make(device=device), batch_of("none", device)
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True).hidden_states
        with patched(name):
            model(**inputs)
            out = model(**inputs, output_hidden_states=True).hidden_states
            assert model(**inputs).hidden_states is None
    assert len(out) == len(own) == 3
    for mine, theirs in zip(out, own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len({state.data_ptr() for state in out}) == 3


def test_cross_attentions_are_complete(device):
    settings = {"is_decoder": True, "add_cross_attention": True, "attn_implementation": "eager"}
    model, encoder = tiny_bert("bert", device, **settings), torch.randn(2, 5, 32, device=device)
    call = {"input_ids": token_ids(2, 6, device), "encoder_hidden_states": encoder}
    with torch.no_grad():
        own = model(**call, output_attentions=True).cross_attentions
        with eet_patch.enabled():
            out = model(**call, output_attentions=True).cross_attentions
    assert_fell_back("bert_layer", ATTENTIONS, calls=2)
    assert len(out) == 2 and all(torch.equal(a, b) for a, b in zip(out, own, strict=True))


# --- methods replaced on the classes -------------------------------------------------------------


def submodule_classes(model, path):
    layer = model.encoder.layer[0] if hasattr(model, "encoder") else model.transformer.h[0]
    return type(layer.get_submodule(path))


@pytest.mark.parametrize(
    "make, path, name",
    [
        (tiny_bert, "attention.self", "bert_layer"),
        (tiny_bert, "output", "bert_layer"),
        (tiny_gpt2, "attn", "gpt2_block"),
        (tiny_gpt2, "mlp", "gpt2_block"),
        (tiny_gpt2, "mlp.c_fc", "gpt2_block"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_replaced_on_a_submodules_class(monkeypatch, device, make, path, name, when):
    """Another library patches the class of a submodule, before or after enable(): its code must
    run.
    """
    model, ids = make(device=device), token_ids(2, 6, device)
    cls, count = submodule_classes(model, path), []
    original = cls.forward

    def theirs(self, *args, **kwargs):
        count.append(1)
        return original(self, *args, **kwargs)

    if when == "before":
        monkeypatch.setattr(cls, "forward", theirs)
    with torch.no_grad(), eet_patch.enabled():
        if when == "after":
            monkeypatch.setattr(cls, "forward", theirs)
        model(ids)
    instances = sum(type(module) is cls for module in model.modules())
    assert len(count) == instances, "their forward was skipped"
    reason = f"the forward of {cls.__name__}, which fusion would skip, was replaced"
    assert_fell_back(name, reason, calls=2)


def test_a_subclass_of_the_model_with_layers_of_its_own():
    model = tiny_bert()
    layer = model.encoder.layer[0]
    layer.forward = types.MethodType(
        type(layer).forward, layer
    )  # bound per instance, before enable()
    ids = token_ids(2, 6)
    with torch.no_grad():
        own = model(ids)[0]
        with eet_patch.enabled():
            torch.testing.assert_close(model(ids)[0], own, rtol=1e-4, atol=1e-4)
    assert eet_patch.report()["bert_layer"].replaced == 1  # the other layer


# --- the report ----------------------------------------------------------------------------------


def test_the_report_as_text_and_as_data():
    model, ids = tiny_bert(), token_ids(2, 6)
    with eet_patch.enabled(exclude=STEP_TARGETS):
        with torch.no_grad():
            model(ids)
            model.double()(ids)
            model.float()
        report = eet_patch.report()
        text = str(report)
    assert text.startswith("eet_patch is enabled")
    assert "2 calls replaced" in text
    assert "2 calls ran the original: there is no kernel for torch.float64" in text
    (row,) = [row for row in report.as_dict()["targets"] if row["name"] == "bert_layer"]
    assert row["replaced"] == 2 and row["fallbacks"] == {"there is no kernel for torch.float64": 2}
    assert row["status"] == "applied" and row["attribute"] == "BertLayer.forward"
    with pytest.raises(KeyError, match="no target 'bertlayer'"):
        report["bertlayer"]
    eet_patch.reset_report()
    assert eet_patch.report()["bert_layer"].fallbacks == {}
    assert report["bert_layer"].replaced == 2  # a report is a snapshot
    assert str(eet_patch.report()).startswith("eet_patch is disabled")


def test_the_remedy_is_said_once_per_process():
    done = run_python(
        """
        import torch, warnings
        warnings.simplefilter("always")
        import eet_patch
        from helpers import tiny_bert, token_ids
        eet_patch.enable()
        model = tiny_bert()
        for _ in range(3):
            model(token_ids(1, 4))
        """
    )
    assert done.stderr.count("torch.inference_mode()") == 1


def test_every_reason_has_a_case():
    """Each reason that stands in the source as text is the reason of a case, or of a test named
    here.
    """
    elsewhere = (
        GRADIENTS,
        "the forward of {cls.__name__}, which fusion would skip",
        "the attention implementation is {name!r}",  # no str: no host makes one
        "a layer is a decoder's",  # transformers/test_encoders.py
    )
    layers = (bert, gpt2, gpt2_lm_head, opt, gpt_neo, gpt_bigcode)
    for module in (gates, *layers, causal, host, kv_cache):
        # What stands there for the loops is theirs: generation/test_decoder_loops.py.
        source = inspect.getsource(module).partition(LOOPS)[0]
        for text in re.findall(r'return \(?\s*f?"([a-z][^"]* [^"]*)"', source):
            parts = re.split(r"(\{[^}]*\})", text)
            pattern = "".join(".+" if p.startswith("{") else re.escape(p) for p in parts)
            known = any(re.match(pattern, reason) for reason in REASONS)
            assert known or text.startswith(elsewhere), f"no test has the reason {text!r}"
