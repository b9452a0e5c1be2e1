"""A decoder-only language model: scoring by fairseq-eval-lm, and generation from prefixes."""

import pytest
from fairseq_helpers import DECODER, SEARCH, assert_same, configured, in_this_process, parse
from helpers import assert_replaced

import eet_patch

BREAKS = {
    "none": ["--sample-break-mode", "none"],
    "complete": ["--sample-break-mode", "complete"],
    "eos": ["--sample-break-mode", "eos"],
    "context_window": ["--context-window", "16"],
    "word_probs": ["--output-word-probs", "--output-word-stats"],
}


def both(command, trained, *arguments, replaced=DECODER, **enabled):
    config = configured(
        command,
        trained / "corpus" / "data_lm",
        "--path",
        trained / "lm" / "model.pt",
        "--gen-subset",
        "test1",
        "--max-tokens",
        "500",
        *arguments,
    )
    own = in_this_process(command, config)
    with eet_patch.enabled(strict=True, **enabled):
        out = in_this_process(command, config)
        assert_replaced(replaced)
    return own, out


@pytest.mark.parametrize("options", BREAKS.values(), ids=BREAKS)
def test_eval_lm(trained, options):
    """Blocks of text without padding, and sentences that are padded on the right."""
    blocks = ["--tokens-per-sample", "64"]
    (_, own), (_, out) = both("fairseq-eval-lm", trained, *blocks, *options)
    assert 0 < float(own["loss"]) < 10
    assert float(out["loss"]) == pytest.approx(float(own["loss"]), abs=1e-4)
    assert float(out["perplexity"]) == pytest.approx(float(own["perplexity"]), rel=1e-4)


@pytest.mark.parametrize("options", [["--beam", "1"], ["--beam", "4", "--nbest", "4"],
                                     ["--sampling", "--sampling-topk", "5", "--beam", "1"]],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("prefix", ["2", "6"])
@pytest.mark.parametrize("level", ["loop", "layer"])
def test_generate_from_prefixes(trained, options, prefix, level):
    """Rows with prefixes of different lengths, through fairseq-generate."""
    (own, _), (out, _) = both(
        "fairseq-generate", trained, "--task", "language_modeling", "--sample-break-mode", "eos",
        "--prefix-size", prefix, "--max-len-b", "30", *options,
        replaced=SEARCH if level == "loop" else DECODER, exclude=() if level == "loop" else SEARCH,
    )  # fmt: skip
    assert_same(parse(out), parse(own))
