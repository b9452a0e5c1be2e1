"""Promise 3, with others at the same methods, with options, and with whatever goes wrong at the
import.
"""

import functools
import importlib
import sys
import warnings

import made_up
import pytest
from helpers import patched
from made_up import MODULE, on
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2

import eet_patch


def forwards():
    return [vars(cls)["forward"] for cls in (modeling_bert.BertLayer, modeling_gpt2.GPT2Block)]


# --- somebody else's wrapper ---------------------------------------------------------------------


def wrap(cls, log):
    """Puts a wrapper over cls.forward as other patching libraries do; returns the function that
    takes it off.
    """
    inner = cls.forward

    @functools.wraps(inner)
    def foreign(self, *args, **kwargs):
        log.append("foreign")
        return inner(self, *args, **kwargs)

    cls.forward = foreign

    def unwrap():
        cls.forward = inner

    return unwrap


def test_their_wrapper_over_ours_taken_off_first(host):
    layers, log = host(), []
    before = vars(layers.Layer)["forward"]
    eet_patch.enable()
    unwrap = wrap(layers.Layer, log)
    assert on(layers.Layer) and log == ["foreign"]
    unwrap()
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is before


def test_our_patch_taken_off_beneath_their_wrapper(host):
    layers, log = host(), []
    before = vars(layers.Layer)["forward"]
    eet_patch.enable()
    unwrap = wrap(layers.Layer, log)
    eet_patch.disable()
    assert not on(layers.Layer) and log == ["foreign"]  # theirs still works, over the original
    assert "another patch" in eet_patch.report()["made_up"].status
    eet_patch.enable()
    assert on(layers.Layer) and len(log) == 2
    assert eet_patch.report()["made_up"].status == "applied"
    eet_patch.disable()
    unwrap()
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is before


def test_their_wrapper_taken_off_while_ours_is_off(host):
    layers = host()
    before = vars(layers.Layer)["forward"]
    eet_patch.enable()
    unwrap = wrap(layers.Layer, [])
    eet_patch.disable()
    unwrap()  # ours stands in the class again, inert
    assert not on(layers.Layer)
    eet_patch.enable()
    assert on(layers.Layer)
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is before


def test_our_patch_over_theirs_in_order(host):
    layers, log = host(), []
    unwrap = wrap(layers.Layer, log)
    theirs = vars(layers.Layer)["forward"]
    eet_patch.enable()
    assert on(layers.Layer)
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is theirs
    unwrap()
    assert not on(layers.Layer)


def test_their_wrapper_taken_off_from_beneath_ours(host):
    """They put back what they had found, and so throw ours out: the next enable() must notice."""
    layers = host()
    before = vars(layers.Layer)["forward"]
    unwrap = wrap(layers.Layer, [])
    eet_patch.enable()
    unwrap()
    assert vars(layers.Layer)["forward"] is before
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is before
    eet_patch.enable()
    assert on(layers.Layer) == (eet_patch.report()["made_up"].status == "applied")
    assert on(layers.Layer)
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is before


def test_thrown_out_by_an_assignment(host):
    """Somebody sets a forward of their own over ours: it stays, and enable() afterwards goes over
    it.
    """
    layers = host()
    eet_patch.enable()

    def theirs(self, hidden_states):
        return hidden_states + 1

    layers.Layer.forward = theirs
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is theirs
    eet_patch.enable()
    assert on(layers.Layer) == (eet_patch.report()["made_up"].status == "applied")
    eet_patch.disable()
    assert vars(layers.Layer)["forward"] is theirs


# --- options -------------------------------------------------------------------------------------


def test_only_and_exclude():
    with eet_patch.enabled(only="bert_layer"):
        statuses = {target.name: target.status for target in eet_patch.report().targets}
    assert statuses.pop("bert_layer") == "applied"
    assert "applied" not in statuses.values()
    assert statuses["gpt2_block"] == "not selected by enable(only=..., exclude=...)"
    with eet_patch.enabled(exclude=["bert_layer"]):
        assert eet_patch.report()["bert_layer"].status != "applied"
        assert eet_patch.report()["gpt2_block"].status == "applied"
    with eet_patch.enabled(only=["bert_layer", "gpt2_block"], exclude="gpt2_block"):
        assert eet_patch.report()["bert_layer"].status == "applied"
        assert eet_patch.report()["gpt2_block"].status != "applied"


def test_a_second_enable_replaces_the_options():
    before = forwards()
    eet_patch.enable(only="bert_layer")
    eet_patch.enable(only="gpt2_block")
    assert forwards()[0] is before[0]
    assert eet_patch.report()["gpt2_block"].status == "applied"


@pytest.mark.parametrize("argument", ["only", "exclude"])
def test_an_unknown_name_changes_nothing(argument):
    before = forwards()
    with pytest.raises(
        ValueError, match=f"{argument} must name targets out of bert_layer, .*bertlayer"
    ):
        eet_patch.enable(**{argument: ["bertlayer"]})
    assert forwards() == before
    with pytest.raises(ValueError, match="bertlayer"), eet_patch.enabled(**{argument: "bertlayer"}):
        pass
    assert not eet_patch.report().enabled


# --- what can go wrong at the import -------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.9", "2.0", "2.1.dev0"])
@pytest.mark.parametrize("imported", [True, False])
def test_an_unknown_version_is_left_alone_with_one_warning(host, version, imported):
    targets = made_up.target("a"), made_up.target("b", "Leaf.forward")
    made = host(*targets, version=version, imported=imported)
    with pytest.warns(eet_patch.PatchWarning) as caught:
        eet_patch.enable()
        layers = made if imported else importlib.import_module(MODULE)
        eet_patch.enable()
    mine = [str(w.message) for w in caught if issubclass(w.category, eet_patch.PatchWarning)]
    assert len(mine) == 1
    assert "made_up_host>=1,<2" in mine[0] and version in mine[0]
    assert not on(layers.Layer) and not on(layers.Leaf)
    for name in ("a", "b"):
        row = eet_patch.report()[name]
        assert row.status == f"not applied: made_up_host {version} is not in <2,>=1"
        assert row.host_version == version


@pytest.mark.parametrize("version", ["1.0", "1.5rc1", "1.99.dev3", "1.9+local"])
def test_a_version_in_the_range_is_patched(host, version):
    layers = host(version=version)
    eet_patch.enable()
    assert on(layers.Layer)


def test_a_missing_package_is_no_warning(host):
    host(imported=False)
    sys.meta_path.pop()  # nobody can import it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eet_patch.enable()
    assert eet_patch.report()["made_up"].status == "waiting for the import of its module"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(MODULE)
    eet_patch.disable()


@pytest.mark.parametrize("attribute", ["Gone.forward", "Layer.gone"])
def test_a_missing_class_or_method_is_said(host, attribute):
    host(made_up.target(attribute=attribute))
    eet_patch.enable()
    assert eet_patch.report()["made_up"].status == f"not applied: {MODULE} has no {attribute}"


def test_enable_while_the_module_is_half_imported(host):
    """enable() from code that runs during the import: the class isn't there yet, but will be."""
    host(imported=False, during=lambda module: eet_patch.enable())
    layers = importlib.import_module(MODULE)
    eet_patch.report()  # looks again
    assert eet_patch.report()["made_up"].status == "applied"
    assert on(layers.Layer)


def test_a_failing_adapter_does_not_break_the_import(host):
    def broken(cls, original):
        raise KeyError("no such class")

    finder = host(
        made_up.target("a", adapter=broken), made_up.target("b", "Leaf.forward"), imported=False
    )
    eet_patch.enable()
    with pytest.warns(
        eet_patch.PatchWarning, match=f"could not patch {MODULE}.*KeyError.*unpatched"
    ):
        layers = importlib.import_module(MODULE)
    assert vars(layers.Layer)["forward"] is vars(finder.layers.Layer)["forward"]
    assert not on(layers.Layer)
    status = eet_patch.report()["a"].status
    assert status.startswith("not applied") and "no such class" in status
    assert on(layers.Leaf)  # the other target of the module is none the worse
    eet_patch.disable()
    assert not on(layers.Leaf)


def test_patched_helper_notices_a_model_that_was_not_replaced():
    with pytest.raises(AssertionError, match="was not called"), patched("gpt2_block"):
        pass
