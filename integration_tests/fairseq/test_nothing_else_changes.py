"""What the patch must leave as it was: TorchScript, the hub interface, parameters, memory that runs
out within a layer.
"""

import copy
import pickle

import pytest
import torch
from fairseq_helpers import DECODER, ENCODER, batch, decoder_layer, run_command, tiny_model
from helpers import patched, run_python

import eet_patch
from eet_patch.ops import blocks


def call_of(model, device):
    source, target = batch([7, 4], "left", device), batch([5, 3], "right", device)
    lengths = torch.tensor([7, 4], device=device)
    return lambda m=model: m(source, lengths, target)[0]


@pytest.mark.parametrize("when", ["enabled", "disabled"])
def test_torchscript(device, when):
    """A model scripts while the patch is enabled, and the script is the original's."""
    model = tiny_model(device, encoder_normalize_before=True, decoder_normalize_before=True)
    run = call_of(model, device)
    with torch.no_grad():
        own = run()
        eet_patch.enable()
        if when == "disabled":
            run()
            eet_patch.disable()
        before = eet_patch.report()[DECODER].replaced
        scripted = torch.jit.script(model)
        out = run(scripted)
        assert eet_patch.report()[DECODER].replaced == before
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-5)


def test_tracing_runs_the_original(device):
    layer = decoder_layer(device).requires_grad_(False)
    x = torch.randn(3, 2, 32, device=device)
    with torch.no_grad(), eet_patch.enabled():
        traced = torch.jit.trace(lambda x: layer(x, x)[0], x)
        assert "the call is being traced" in eet_patch.report()[DECODER].fallbacks
        torch.testing.assert_close(traced(x), layer(x, x)[0], rtol=1e-4, atol=1e-5)


def test_parameters_stay_where_they_are(device):
    model = tiny_model(device)
    before = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    with torch.no_grad(), patched(ENCODER, DECODER):
        call_of(model, device)()
    assert {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()} == before


def test_updates_are_seen_by_the_next_call(device):
    """In place, by load_state_dict, by another dtype and back."""
    model, other = tiny_model(device), tiny_model(device)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        with patched(ENCODER, DECODER):
            call_of(model, device)()
            model.load_state_dict(other.state_dict())
            out = call_of(model, device)()
            model.half().float()
            halved = call_of(model, device)()
        own = call_of(other, device)()
        torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(halved, call_of(model, device)(), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles(device):
    layer, x = decoder_layer(device), torch.randn(3, 2, 32, device=device)
    with torch.no_grad(), patched(DECODER):
        out = layer(x, x)[0]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(twin(x, x)[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("function", ["attention_block", "cross_attention_block", "ffn"])
def test_out_of_memory_leaves_the_state_to_the_original(monkeypatch, device, function):
    """A layer that runs out of memory in any of its parts has not touched its caches."""
    layer = decoder_layer(device)
    layer.need_attn = False
    x, encoder_out = torch.randn(4, 2, 32, device=device), torch.randn(5, 2, 32, device=device)

    def steps():
        state = {}
        outs = [layer(x[i : i + 1], encoder_out, None, state)[0] for i in range(4)]
        return torch.cat(outs), layer.self_attn._get_input_buffer(state)["prev_key"]

    kernel, calls = getattr(blocks, function), []

    def runs_out(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("made up")
        return kernel(*args, **kwargs)

    with torch.no_grad():
        own = steps()
        monkeypatch.setattr(blocks, function, runs_out)
        with pytest.warns(eet_patch.PatchWarning), eet_patch.enabled():
            from eet_patch import patching

            patching._warned.discard("out of memory")
            out = steps()
    row = eet_patch.report()[DECODER]
    assert row.fallbacks == {"out of memory": 2} and row.replaced == 2
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["eet_patch", "fairseq"])
def test_either_may_be_imported_first(first):
    """fairseq's modules import each other in circles; disable() gives the very methods back."""
    lines = ["import eet_patch; eet_patch.enable()", "import fairseq.models.transformer"]
    run_python(
        "\n".join(lines if first == "eet_patch" else lines[::-1])
        + """
import torch
from fairseq.modules import transformer_layer
report = eet_patch.report()
for name in ("fairseq_encoder_layer", "fairseq_decoder_layer"):
    assert report[name].status == "applied", report[name]
    assert report[name].host_version == "0.12.3"
names = "TransformerEncoderLayerBase", "TransformerDecoderLayerBase"
layers = [getattr(transformer_layer, name) for name in names]
files = {layer.forward.__code__.co_filename for layer in layers}
assert files == {eet_patch.patching.__file__}
eet_patch.disable()
files = {layer.forward.__code__.co_filename for layer in layers}
assert files == {transformer_layer.__file__}
"""
    )


def test_an_unknown_fairseq_is_left_alone():
    done = run_python(
        """
        import fairseq
        fairseq.__version__ = "0.13.0"
        import eet_patch
        eet_patch.enable()
        row = eet_patch.report()["fairseq_decoder_layer"]
        assert row.status.startswith("not applied: fairseq 0.13.0 is not in"), row.status
        """
    )
    assert done.stderr.count("leaves fairseq 0.13.0 alone") == 1


def test_the_hub_interface(trained):
    """`from_pretrained(user_dir=...)`, translate() and sample(), as in a user's own script."""
    code = f"""
    import logging, sys
    import torch
    logging.disable(logging.INFO)
    from fairseq.models.transformer import TransformerModel
    import eet_patch
    hub = TransformerModel.from_pretrained(
        {str(trained / "pre_norm")!r}, "model.pt", {str(trained / "corpus" / "data")!r},
        user_dir=eet_patch.fairseq_dir(),
    )
    text = open({str(trained / "corpus" / "test.words")!r}).read().splitlines()[:6]
    out = hub.translate(text, beam=4), hub.sample(text, beam=1)
    report = eet_patch.report()
    for name in ("fairseq_encoder", "fairseq_search"):
        assert report[name].replaced > 0 and not report[name].fallbacks, report[name]
    eet_patch.disable()
    assert out == (hub.translate(text, beam=4), hub.sample(text, beam=1))
    """
    run_python(code)


def test_the_report_is_printed_where_it_was_asked_for(trained):
    done = run_command(
        "fairseq-generate", trained / "corpus" / "data", "--path", trained / "lm" / "none.pt",
        "--user-dir", eet_patch.fairseq_dir(), check=False, EET_REPORT="1",
    )  # fmt: skip
    assert done.returncode != 0 and "eet_patch is enabled" in done.stderr
