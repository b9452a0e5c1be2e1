"""Promise 6: whoever lacks a part loses only that part."""

import pytest
import torch
from helpers import run_python, tiny_bert, token_ids

import eet_patch


def test_without_the_extension_models_run_unpatched():
    """As after a failed build, or one for another Python: one warning, and the report says why."""
    done = run_python(
        """
        import sys, warnings
        warnings.simplefilter("always")

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == "eet_patch._C":
                    raise ImportError("undefined symbol: made_up")

        sys.meta_path.insert(0, Blocker())
        import torch
        import eet_patch
        eet_patch.enable()
        eet_patch.enable()
        with eet_patch.enabled():
            pass
        from helpers import tiny_bert, tiny_gpt2, token_ids
        from transformers.models.bert.modeling_bert import BertLayer
        assert "eet_patch" not in vars(BertLayer)["forward"].__code__.co_filename
        with torch.no_grad():
            assert tiny_bert()(token_ids(2, 6))[0].isfinite().all()
            tiny_gpt2().generate(token_ids(1, 3), max_new_tokens=3, do_sample=False)
        report = eet_patch.report()
        assert report.extension["loaded"] is False
        row = report["bert_layer"]
        assert row.replaced == 0
        assert row.status == (
            "not applied: the extension could not be loaded "
            "(ImportError: undefined symbol: made_up)"
        ), row.status
        assert "extension not loaded: ImportError: undefined symbol: made_up" in str(report)
        eet_patch.disable()
        from eet_patch import ops
        try:
            ops.layernorm(torch.ones(1, 4), torch.ones(4), torch.ones(4), 1e-5)
        except RuntimeError as error:
            assert "undefined symbol: made_up" in str(error) and "pip install" in str(error)
        else:
            raise AssertionError("the op ran without the extension")
        """
    )
    assert done.stderr.count("models run unpatched") == 1


NO_TRANSFORMERS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "fairseq"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_without_transformers():
    run_python(
        NO_TRANSFORMERS
        + """
import warnings
warnings.simplefilter("error")
import torch
import eet_patch
eet_patch.enable()
with eet_patch.enabled(strict=True, only="bert_layer"):
    pass
report = eet_patch.report()
assert report.extension["loaded"]
for row in report.targets:
    assert row.status == "waiting for the import of its module" and row.host_version is None
assert "wait for the import" in str(report)
out = eet_patch.ops.layernorm(torch.randn(2, 8), torch.ones(8), torch.zeros(8), 1e-5)
assert abs(out.mean()) < 1e-5
eet_patch.disable()
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("blocked")
"""
    )


def test_info_without_transformers():
    done = run_python(
        NO_TRANSFORMERS
        + """
from eet_patch.cli import main
assert main(["info"]) == 0
"""
    )
    assert "transformers is not there" in done.stdout
    assert "fairseq is not there" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with torch.no_grad(), eet_patch.enabled(strict=True):
        tiny_bert()(token_ids(2, 6))
    assert eet_patch.report()["bert_model"].replaced == 1
    assert not torch.cuda.is_initialized()


def test_without_visible_devices():
    """A machine with a GPU and a user who hides it."""
    run_python(
        """
        import torch
        import eet_patch
        from helpers import tiny_bert, token_ids
        with torch.no_grad(), eet_patch.enabled(strict=True):
            tiny_bert()(token_ids(2, 6))
        assert eet_patch.report()["bert_model"].replaced == 1
        """,
        CUDA_VISIBLE_DEVICES="",
    )


def test_an_unknown_transformers_is_left_alone():
    """A version that doesn't exist yet: one warning with the range, and models run."""
    done = run_python(
        """
        import sys, warnings
        warnings.simplefilter("always")
        import torch
        from helpers import tiny_bert, tiny_gpt2, token_ids
        models = tiny_bert(), tiny_gpt2()
        # Not by `import transformers`: its lazy module is another one by now.
        sys.modules["transformers"].__version__ = "99.0.0"
        import eet_patch
        eet_patch.enable()
        with torch.no_grad():
            for model in models:
                model(token_ids(2, 6))
        for name in ("bert_layer", "gpt2_block"):
            row = eet_patch.report()[name]
            assert row.status.startswith("not applied: transformers 99.0.0 is not in"), row.status
            assert row.replaced == 0
        """
    )
    assert done.stderr.count("leaves transformers 99.0.0 alone") == 1
    assert "transformers<5.24,>=4.56" in done.stderr or "transformers>=4.56,<5.24" in done.stderr
