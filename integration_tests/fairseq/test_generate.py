"""fairseq-generate on a trained model, patched and unpatched: the same hypotheses, scores and BLEU,
under every option that changes how they are searched.
"""

import pytest
from fairseq_helpers import DECODER, ENCODER, SEARCH, WHOLE_ENCODER, assert_same, generate_both
from helpers import assert_fell_back

import eet_patch

OPTIONS = {
    "beam1": ["--beam", "1"],
    "beam4": ["--beam", "4"],
    "beam5_nbest": ["--beam", "5", "--nbest", "5"],
    "lenpen": ["--beam", "4", "--lenpen", "0.4", "--unkpen", "0.5", "--unnormalized"],
    "lengths": ["--beam", "4", "--min-len", "12", "--max-len-b", "20"],
    "match_source_len": ["--beam", "4", "--match-source-len"],
    "no_early_stop": ["--beam", "4", "--no-early-stop", "--max-len-b", "40"],
    "sampling": ["--sampling", "--beam", "1", "--seed", "5"],
    "sampling_topk": ["--sampling", "--sampling-topk", "5", "--beam", "3", "--nbest", "3"],
    "sampling_topp": ["--sampling", "--sampling-topp", "0.8", "--beam", "2", "--nbest", "2"],
    "temperature": ["--beam", "4", "--temperature", "1.7"],
    "prefix1": ["--beam", "4", "--prefix-size", "1"],
    "prefix5": ["--beam", "4", "--prefix-size", "5"],
    "prefix_beyond_the_shortest": ["--beam", "3", "--prefix-size", "12"],
    "no_repeat_ngram": ["--beam", "4", "--no-repeat-ngram-size", "3"],
    "diversity_rate": ["--beam", "4", "--diversity-rate", "0.5"],
    "score_reference": ["--score-reference"],
    "hard_alignment": ["--beam", "4", "--print-alignment"],
    "soft_alignment": ["--beam", "4", "--print-alignment", "soft"],
}


LEVELS = ["loop", "layer"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(trained, options, level):
    if "--score-reference" in options:  # there is no search then
        level = "layer"
    own, out = generate_both(trained, "pre_norm", *options, level=level)
    assert_same(out, own)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", ["beam1", "beam5_nbest", "prefix5", "sampling_topk"])
@pytest.mark.parametrize("name", ["post_norm", "bart"])
def test_models(trained, name, options, level):
    """Post-norm with GELU, learned positions and an encoder that is wider than the decoder; BART,
    whose cross-attention keeps one row a sentence for all of its beams.
    """
    own, out = generate_both(trained, name, *OPTIONS[options], "--max-len-b", "40", level=level)
    assert_same(out, own)


def test_the_fixture_is_worth_its_name(trained):
    """Hypotheses of the trained model end by themselves, at different lengths, and are mostly
    right; those of random weights would show few faults.
    """
    own, out = generate_both(trained, "pre_norm", *OPTIONS["beam4"], subset="test")
    assert_same(out, own)
    lengths = {len(words.split()) for _, words in own.hypotheses.values()}
    assert len(lengths) > 10 and max(lengths) < 100
    (bleu,) = [float(part.split()[0].strip(",")) for part in own.said.split("BLEU4 = ")[1:]]
    assert bleu > 50


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", [["--max-tokens", "150"], ["--batch-size", "1"]], ids=str)
def test_batches(trained, split, level):
    """Rows that end early leave the batch; a batch of one has no padding."""
    own, out = generate_both(trained, "pre_norm", "--beam", "3", *split, level=level)
    assert_same(out, own)


def test_retained_dropout_runs_the_original(trained):
    arguments = ["--beam", "2", "--retain-dropout", "--seed", "3"]
    arguments += ["--model-overrides", "{'dropout': 0.2}"]
    own, out = generate_both(trained, "pre_norm", *arguments, strict=False, level=None)
    for name in (WHOLE_ENCODER, ENCODER, DECODER, SEARCH):
        assert_fell_back(
            name,
            "dropout is active (training mode, or --retain-dropout); call model.eval() for "
            "inference",
        )
    assert out.hypotheses == own.hypotheses


def test_an_ensemble(trained):
    """The host searches, and its models run layer by layer, each with its own caches."""
    path = f"{trained}/pre_norm/model.pt:{trained}/post_norm/model.pt"
    own, out = generate_both(trained, "pre_norm", "--path", path, "--beam", "4", level=None)
    assert_same(out, own)
    assert eet_patch.report()[DECODER].replaced > 0
    assert_fell_back(SEARCH, "an ensemble of 2 models is searched")


@pytest.mark.parametrize("level", LEVELS)
def test_half_precision(trained, level):
    """--fp16: rounding may decide between hypotheses that score nearly the same, not more."""
    own, out = generate_both(trained, "pre_norm", "--beam", "4", "--fp16", level=level)
    assert out.hypotheses.keys() == own.hypotheses.keys()
    same = [key for key, (_, words) in own.hypotheses.items() if out.hypotheses[key][1] == words]
    assert len(same) >= 0.9 * len(own.hypotheses)
    for key in same:
        assert abs(out.hypotheses[key][0] - own.hypotheses[key][0]) < 0.02


def test_disable_gives_fairseqs_own_back():
    from fairseq.modules import transformer_layer

    classes = (
        transformer_layer.TransformerDecoderLayerBase,
        transformer_layer.TransformerDecoderLayer,
    )
    before = [vars(cls).get("forward") for cls in classes]
    with eet_patch.enabled():
        assert vars(classes[0])["forward"] is not before[0]
    assert [vars(cls).get("forward") for cls in classes] == before
