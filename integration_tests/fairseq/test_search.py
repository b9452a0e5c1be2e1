"""The search of SequenceGenerator over our decode step, on tiny models with random weights: the
same hypotheses, scores and attention as fairseq's own, and everything that must run the original.
"""

import copy

import pytest
import torch
from fairseq import search
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from fairseq.modules import LayerDropModuleList
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq_helpers import DECODER, SEARCH, Task, batch, tiny_args, tiny_model
from helpers import assert_fell_back, patched, randomised

import eet_patch
from eet_patch.adapters.fairseq_model import decoder_of
from eet_patch.generation import sentence_pool, sentence_search, sentence_step
from eet_patch.ops import blocks

EOS, PAD = 2, 1
PRE = {"encoder_normalize_before": True, "decoder_normalize_before": True}
LONG = {"max_source_positions": 300, "max_target_positions": 300}


def language_model(device="cpu", dtype=torch.float32, **changes):
    args = tiny_args(**{
        "decoder_input_dim": 32, "decoder_output_dim": 32, "max_target_positions": 300,
        "share_decoder_input_output_embed": True, **changes,
    })  # fmt: skip
    base_lm_architecture(args)
    return randomised(TransformerLanguageModel.build_model(args, Task)).to(device, dtype)


Task.dictionary = Task.source_dictionary


def model_of(device="cpu", dtype=torch.float32, **changes):
    """A translation model whose hypotheses end early and late."""
    model = tiny_model(device, dtype, **changes)
    with torch.no_grad():
        model.decoder.output_projection.weight[EOS] *= -2.5
    return model


def sample_of(lengths, device, side="left", seed=1):
    source = batch(lengths, side, device, seed)
    given = {"src_tokens": source, "src_lengths": torch.tensor(lengths, device=device)}
    return {"net_input": given, "id": torch.arange(len(lengths), device=device)}


def generator_of(model, cls=SequenceGenerator, **options):
    options = {"beam_size": 4, "max_len_b": 20} | options
    return cls([model], Task.target_dictionary, **options)


def run(model, sample, prefix=None, cls=SequenceGenerator, strategy=None, bos=None, **options):
    if strategy is not None:
        options["search_strategy"] = strategy(Task.target_dictionary)
    generator = generator_of(model, cls, **options)
    with torch.no_grad():
        return generator.generate([model], sample, prefix_tokens=prefix, bos_token=bos)


def assert_same(out, own, names=("score", "positional_scores", "attention", "alignment")):
    assert len(out) == len(own)
    for mine, theirs in zip(out, own, strict=True):
        assert [h["tokens"].tolist() for h in mine] == [h["tokens"].tolist() for h in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            for name in names:
                assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype, name
                assert a[name].device == b[name].device, name
                torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-4, msg=name)


def compare(model, sample, *args, compared=None, **options):
    """Both, and the search ran our code; returns the patched one's hypotheses."""
    torch.manual_seed(0)
    own = run(model, sample, *args, **options)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with patched(SEARCH):
        out = run(model, sample, *args, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(out, own, *([] if compared is None else [compared]))
    return out


MODELS = {
    "pre_norm": PRE,
    "post_norm": {},
    "gelu": {"activation_fn": "gelu"},
    "gelu_accurate": {"activation_fn": "gelu_accurate", **PRE},
    "linear": {"activation_fn": "linear", **PRE},
    "learned_positions": {"encoder_learned_pos": True, "decoder_learned_pos": True, **PRE},
    "no_positions": {"no_token_positional_embeddings": True, **PRE},
    "wider_encoder": {"encoder_embed_dim": 48, "encoder_ffn_embed_dim": 64},
    "norm_of_embeddings": {"layernorm_embedding": True, "no_scale_embedding": True},
    "no_final_norm": {"no_decoder_final_norm": True, **PRE},
    "own_head": {"share_decoder_input_output_embed": False},
    "projections": {"decoder_input_dim": 24, "decoder_output_dim": 40, **PRE},
    "no_cross_attention": {"no_cross_attention": True, **PRE},
    "one_layer": {"decoder_layers": 1},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_models(device, changes):
    compare(model_of(device, **changes), sample_of([9, 4, 7], device))


@pytest.mark.parametrize("beams", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("side", ["left", "right"])
def test_beams(device, beams, side):
    """Left padding is fairseq's own way; beyond 32 beams the search runs step by step."""
    compare(model_of(device), sample_of([9, 3, 9, 1], device, side), beam_size=min(beams, 29))
    if beams > 29:
        compare(model_of(device), sample_of([5, 3], device), beam_size=beams)


OPTIONS = {
    "unnormalized": {"normalize_scores": False},
    "len_penalty": {"len_penalty": 0.3},
    "negative_len_penalty": {"len_penalty": -1.0},
    "min_len": {"min_len": 12},
    "min_len_0": {"min_len": 0},
    "one_token": {"max_len_b": 1},
    "by_source": {"max_len_a": 1.5, "max_len_b": 2},
    "unk_penalty": {"unk_penalty": -2.0},
    "temperature": {"temperature": 1.9},
    "suppressed": {"tokens_to_suppress": ("w3", "w7")},
    "match_source_len": {"match_source_len": True},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "another_end": {"eos": 9},
    "another_begin": {"bos": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(device, options):
    compare(model_of(device, **PRE), sample_of([9, 4, 7], device), **options)


STRATEGIES = {
    "sampling": lambda words: search.Sampling(words),
    "top_k": lambda words: search.Sampling(words, sampling_topk=5),
    "top_p": lambda words: search.Sampling(words, sampling_topp=0.7),
    "siblings": lambda words: search.DiverseSiblingsSearch(words, 0.5),
    "groups": lambda words: search.DiverseBeamSearch(words, 2, 0.5),
    "lengths": lambda words: search.LengthConstrainedBeamSearch(words, 1, 0, 1, 2),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_the_hosts_own_searches(device, strategy):
    """They run as they are over our step, and draw what they would have drawn."""
    compare(model_of(device), sample_of([9, 4, 7, 2], device), strategy=strategy)


PREFIXES = {
    "one": [[5], [6], [7]],
    "several": [[5, 9, 11], [6, 8, 8], [7, 4, 30]],
    "of_different_lengths": [[5, 9, 11, 4], [6, PAD, PAD, PAD], [7, 4, PAD, PAD]],
    "none_for_one": [[5, 9], [PAD, PAD], [7, 4]],
    "that_end": [[5, 9, EOS], [6, 8, 4], [7, EOS, PAD]],
}


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_prefixes(device, prefix, beams):
    prefix = torch.tensor(prefix, device=device)
    sample = sample_of([9, 4, 7], device)
    # Of a prefix that ends fairseq files all beams with the first one's tokens and scores, and each
    # with the attention of what it was before.
    compared = ("score", "positional_scores") if (prefix == EOS).any() else None
    compare(model_of(device), sample, prefix, beam_size=beams, compared=compared)
    model = language_model(device)
    compare(model, sample_of([4, 4, 4], device), prefix, beam_size=beams)


@pytest.mark.parametrize(
    "changes", [{}, PRE, {"decoder_input_dim": 24, "decoder_output_dim": 24}], ids=str
)
def test_a_language_model(device, changes):
    """Its prefix runs in one pass: the decoder's own layers are not called at all."""
    model = language_model(device, **changes)
    prefix = torch.randint(4, 60, (3, 40), generator=torch.Generator().manual_seed(3)).to(device)
    sample = sample_of([40] * 3, device)
    for options in ({"beam_size": 1}, {"beam_size": 3}, {"temperature": 1.5}):
        compare(model, sample, prefix, max_len_b=70, min_len=50, **options)
    assert eet_patch.report()[DECODER].replaced == 0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_alignments(device, kind):
    options = {"cls": SequenceGeneratorWithAlignment, "print_alignment": kind}
    sample = sample_of([9, 4, 7], device)
    model = model_of(device)
    torch.manual_seed(0)
    own = run(model, sample, **options)
    with patched(SEARCH):
        out = run(model, sample, **options)
    for mine, theirs in zip(out, own, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if kind == "hard":
                assert a["alignment"] == b["alignment"] != []
                continue
            weights = [
                torch.tensor([[float(w) for w in row] for row in h["alignment"]]) for h in (a, b)
            ]
            torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 20])
def test_through_torchs_products(device, monkeypatch, batch_size):
    """Rows that are too many for the kernels of a step; here on any device."""
    monkeypatch.setattr(sentence_step.decode, "best_rows", lambda like: 0)
    monkeypatch.setattr(blocks, "uses_our_products", lambda tensor, rows: False)
    lengths = [3 + n % 7 for n in range(batch_size)]
    for changes in (PRE, {}, {"activation_fn": "gelu", "layernorm_embedding": True}):
        compare(model_of(device, **changes), sample_of(lengths, device))
    compare(model_of(device, decoder_input_dim=24, **PRE), sample_of(lengths, device))


def test_many_rows(device):
    """More than 64, of which fewer and fewer go on."""
    lengths = [2 + n % 9 for n in range(30)]
    model = model_of(device)
    out = compare(model, sample_of(lengths, device), beam_size=5, max_len_b=40)
    assert len({len(h["tokens"]) for sentence in out for h in sentence}) > 5


@pytest.mark.parametrize("batch_size", [1, 5, 13, 30])
def test_looks_that_come_late(device, monkeypatch, batch_size):
    """On CUDA the host looks some steps later which sentences are done, and fills batches up to
    sizes that graphs are there for; here on any device.
    """
    monkeypatch.setattr(sentence_search, "runs_behind", lambda device: True)
    model = model_of(device)
    with torch.no_grad():
        model.decoder.output_projection.weight[EOS] *= 0.6
    lengths = [2 + n % 9 for n in range(batch_size)]
    for beams in (1, 5):
        compare(model, sample_of(lengths, device), beam_size=beams, max_len_b=40)
    prefix = torch.full((batch_size, 2), 7, device=device)
    compare(model, sample_of(lengths, device), prefix, max_len_b=40)
    prefix = torch.full((batch_size, 9), 7, device=device)
    compare(language_model(device), sample_of(lengths, device), prefix, max_len_b=30)
    sampling = STRATEGIES["top_k"]
    compare(model, sample_of(lengths, device), strategy=sampling, max_len_b=20)


def test_many_steps_between_looks(device, monkeypatch):
    """Late in a search more steps pass; hypotheses end at any of them."""
    monkeypatch.setattr(sentence_search, "runs_behind", lambda device: True)
    taken = []
    run_plain = sentence_search.Search.run_plain
    monkeypatch.setattr(
        sentence_search.Search,
        "run_plain",
        lambda self, steps: taken.append(steps) or run_plain(self, steps),
    )
    model = model_of(device, max_source_positions=400, max_target_positions=400)
    sample = sample_of([2 + n % 9 for n in range(6)], device)
    ends = set()
    for min_len, max_len in ((129, 150), (129, 163), (129, 166), (129, 170), (258, 340)):
        out = compare(model, sample, beam_size=2, min_len=min_len, max_len_b=max_len)
        ends |= {len(h["tokens"]) for sentence in out for h in sentence}
    assert set(taken) == {1, *sentence_search.STEPS}
    assert len(ends) > 4


class RecordedCalls:
    """Stands for a CUDA graph: the calls of a step, with the tensors that they had when it was
    captured.
    """

    def __init__(self, launch):
        self.calls = []
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (sentence_step.SentenceStep, "_embed"),
                (sentence_step.decode, "launch_decode_layers"),
                (sentence_search.beam_selection, "launch_top_candidates"),
                (sentence_search, "launch_hypothesis_step"),
            ):
                patch.setattr(owner, name, self.recorder(getattr(owner, name)))
            launch()
        assert len(self.calls) in (2, 4, 8)  # with the logits alone, or all, or two steps

    def recorder(self, function):
        return lambda *args, **kwargs: self.calls.append((function, args, kwargs))

    def replay(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def test_what_a_graph_bakes_in(monkeypatch):
    """A step that was captured once serves batches of other sentences, of any size, and goes on to
    do so when some of them have left, or the buffers have grown.
    """
    captured = []
    allocate = sentence_step.SentenceStep._allocate

    def with_graphs(self, *args):
        allocate(self, *args)
        self._graphs_work = True

    def capture(self, launch):
        captured.append(RecordedCalls(launch))
        return captured[-1]

    monkeypatch.setattr(sentence_step.SentenceStep, "_allocate", with_graphs)
    monkeypatch.setattr(sentence_step.SentenceStep, "_captured", capture)
    monkeypatch.setattr(sentence_search, "runs_behind", lambda device: True)
    model = model_of(**LONG)
    with torch.no_grad():
        model.decoder.output_projection.weight[EOS] *= 0.6
    with eet_patch.enabled():
        for _ in range(2):
            for seed, batch_size in enumerate((13, 12, 5, 13, 1, 9)):
                sample = sample_of([2 + n % 9 for n in range(batch_size)], "cpu", seed=seed)
                for options in ({}, {"beam_size": 2}, {"min_len": 3, "max_len_b": 90}):
                    out = run(model, sample, **options)
                    with eet_patch.enabled(exclude=SEARCH):
                        own = run(model, sample, **options)
                    assert_same(out, own)
        few = len(captured)
        run(model, sample, **options)
        assert len(captured) == few > 5  # all that the last call needs was there


def test_buffers_grow(device):
    """Hypotheses that outgrow the first buffers, several times."""
    model = model_of(device, **LONG)
    sample = sample_of([3, 2], device)
    compare(model, sample, min_len=180, max_len_b=200)
    compare(model, sample, min_len=180, max_len_b=200, unk_penalty=0.5)


def test_a_step_serves_batches_of_any_size(device):
    model = model_of(device)
    for lengths in ([9] * 6, [4, 3], [9, 5, 5, 2], [30] * 2, [2]):
        for beams in (4, 2):
            compare(model, sample_of(lengths, device), beam_size=beams)
    with eet_patch.enabled():
        run(model, sample_of([4, 3], device))
        assert sum(eet_patch.report().memory.values()) > 0
    assert sentence_pool.held_bytes() == 0


def test_early_ending_rows(device):
    """Sentences that end at different steps leave the batch; the others don't notice."""
    model = model_of(device)
    with torch.no_grad():
        model.decoder.output_projection.weight[EOS] *= 0.6
    lengths = [1, 9, 2, 8, 3, 7, 4]
    together = compare(model, sample_of(lengths, device), max_len_b=30)
    ends = {max(len(h["tokens"]) for h in sentence) for sentence in together}
    assert len(ends) > 2
    for number in (0, 3):
        sample = sample_of(lengths, device)
        width = lengths[number]
        alone = sample["net_input"]["src_tokens"][number : number + 1, -width:]
        given = {"src_tokens": alone, "src_lengths": torch.tensor([width], device=device)}
        with patched(SEARCH):
            out = run(model, {"net_input": given}, max_len_b=30)
        assert [h["tokens"].tolist() for h in out[0]] == [
            h["tokens"].tolist() for h in together[number]
        ]


def test_beams_with_one_parent(device):
    """All beams of a sentence go on from one, which must not lose its own past by it."""
    model = model_of(device)
    parents = []
    original = sentence_search.torch_hypothesis_step

    def watched(state, scores, tokens, chosen, eos):
        parents.append(chosen[:, : state.ended_scores.shape[1]])
        original(state, scores, tokens, chosen, eos)

    sentence_search.torch_hypothesis_step = watched
    try:
        compare(model, sample_of([9, 4, 7], device), unk_penalty=1e-3, beam_size=3)
    finally:
        sentence_search.torch_hypothesis_step = original
    assert any((p == p[:, :1]).all(1).any() for p in parents[1:])


def test_the_encoder_is_honoured(device):
    """Another source, another hypothesis: with the same lengths, and after the step was used."""
    model = model_of(device)
    first = compare(model, sample_of([9, 9], device, seed=1))
    second = compare(model, sample_of([9, 9], device, seed=2))
    assert [h["tokens"].tolist() for h in first[0]] != [h["tokens"].tolist() for h in second[0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    """What the patched model finds, the unpatched one scores alike."""
    model, sample = model_of(device, dtype), sample_of([9, 4, 7], device)
    with patched(SEARCH):
        out = run(model, sample)
    own = run(model, sample)
    bound = 0.02 if dtype is torch.float16 else 0.15
    for mine, theirs in zip(out, own, strict=True):
        assert abs(float(mine[0]["score"]) - float(theirs[0]["score"])) < bound
    for number, sentence in enumerate(out):
        tokens = torch.stack([sentence[0]["tokens"]])
        fed = torch.cat([torch.full_like(tokens[:, :1], EOS), tokens[:, :-1]], 1)
        source = {k: v[number : number + 1] for k, v in sample["net_input"].items()}
        with torch.no_grad():
            logits = model(source["src_tokens"], source["src_lengths"], fed)[0]
        scores = logits.float().log_softmax(-1).gather(2, tokens[:, :, None])[0, :, 0]
        got = sentence[0]["positional_scores"]
        torch.testing.assert_close(got, scores, rtol=0, atol=10 * bound)


def test_updates_are_seen_by_the_next_call(device):
    model, sample = model_of(device), sample_of([9, 4], device)
    compare(model, sample)
    with torch.no_grad():
        model.decoder.layers[0].fc1.weight.mul_(1.2)
    compare(model, sample)
    model.load_state_dict(model_of(device, decoder_normalize_before=False).state_dict())
    compare(model, sample)


def test_in_inference_mode(device):
    model, sample = model_of(device), sample_of([9, 4], device)
    own = run(model, sample)
    with patched(SEARCH):
        with torch.inference_mode():
            assert_same(run(model, sample), own)
        assert_same(run(model, sample), own)


# --- what runs the original ----------------------------------------------------------------------


def with_hook(model):
    model.decoder.layers[1].fc2.register_forward_hook(lambda *args: None)


def with_decoder_hook(model):
    model.decoder.register_forward_hook(lambda *args: None)


def with_other_layer(model):
    class Layer(type(model.decoder.layers[0])):
        pass

    model.decoder.layers[0].__class__ = Layer


def with_other_norm(model):
    model.decoder.layers[0].final_layer_norm.eps = 1e-3


def with_double_positions(model):
    model.decoder.embed_positions.weights = model.decoder.embed_positions.weights.double()


MODEL_REASONS = {
    "hook": (with_hook, "a submodule (Linear) has hooks, which fusion would skip"),
    "decoder_hook": (
        with_decoder_hook,
        "TransformerDecoderBase has hooks, which the step would skip",
    ),
    "layer": (with_other_layer, "a layer is a Layer"),
    "eps": (with_other_norm, "the norms of the decoder differ in eps"),
    "positions": (
        with_double_positions,
        "a parameter is torch.float64 and the input torch.float32",
    ),
}


@pytest.mark.parametrize(("change", "reason"), MODEL_REASONS.values(), ids=MODEL_REASONS)
def test_models_that_fall_back(change, reason):
    model, sample = model_of(), sample_of([9, 4], "cpu")
    change(model)
    own = run(model, sample)
    with eet_patch.enabled():
        assert_same(run(model, sample), own)
    assert_fell_back(SEARCH, reason)


def of_prefixes(words):
    return search.PrefixConstrainedBeamSearch(words, lambda batch, tokens: list(range(2, 40)))


class OwnSearch(search.BeamSearch):
    pass


def test_searches_that_fall_back():
    model, sample = model_of(), sample_of([9, 4], "cpu")
    for strategy, name in (
        (of_prefixes, "PrefixConstrainedBeamSearch"),
        (OwnSearch, "OwnSearch"),
    ):
        own = run(model, sample, strategy=strategy)
        eet_patch.reset_report()
        with eet_patch.enabled():
            assert_same(run(model, sample, strategy=strategy), own)
        assert_fell_back(SEARCH, f"the search is a {name}")
        assert eet_patch.report()[DECODER].replaced > 0  # the layers are ours all the same


def test_generators_that_fall_back():
    model, sample = model_of(), sample_of([9, 4], "cpu")

    class Own(SequenceGenerator):
        pass

    def reason_of(expected, change=lambda generator: None, cls=SequenceGenerator, **given):
        generator = generator_of(model, cls)
        change(generator)
        with torch.no_grad():
            own = generator.generate([model], given.get("sample", sample))
            eet_patch.reset_report()
            with eet_patch.enabled():
                assert_same(generator.generate([model], given.get("sample", sample)), own)
        assert_fell_back(SEARCH, expected)

    reason_of("Own is a subclass of SequenceGenerator", cls=Own)

    def own_end(generator):
        generator.is_finished = lambda *args: SequenceGenerator.is_finished(generator, *args)

    reason_of("is_finished of SequenceGenerator was replaced", own_end)

    def own_step(generator):
        generator.search.step = generator.search.step

    reason_of("step of BeamSearch was replaced", own_step)
    holes = copy.deepcopy(sample)
    holes["net_input"]["src_tokens"][0, 4] = PAD
    reason_of("a source has padding within it, or on both sides", sample=holes)

    def fused(generator):
        generator.lm_model, generator.lm_weight = language_model(), 0.1

    reason_of("a language model is fused", fused)


def test_an_ensemble_falls_back():
    models, sample = [model_of(), model_of(**PRE)], sample_of([9, 4], "cpu")

    def both():
        generator = SequenceGenerator(models, Task.target_dictionary, beam_size=3, max_len_b=10)
        with torch.no_grad():
            return generator.generate(models, sample)

    own = both()
    with eet_patch.enabled():
        assert_same(both(), own)
    assert_fell_back(SEARCH, "an ensemble of 2 models is searched")


def test_a_replaced_method_of_a_class_is_respected(monkeypatch):
    model, sample = model_of(), sample_of([9, 4], "cpu")
    own = run(model, sample)
    calls = []
    original = SequenceGenerator.finalize_hypos

    def finalize_hypos(self, *args):
        calls.append(1)
        return original(self, *args)

    with eet_patch.enabled():
        monkeypatch.setattr(SequenceGenerator, "finalize_hypos", finalize_hypos)
        assert_same(run(model, sample), own)
    assert calls
    assert_fell_back(SEARCH, "finalize_hypos of SequenceGenerator was replaced")


def test_out_of_memory_runs_the_original(monkeypatch):
    model, sample = model_of(), sample_of([9, 4], "cpu")
    own = run(model, sample)
    calls = []
    original = sentence_step.SentenceStep.run

    def runs_out(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("made up")
        return original(self, *args)

    monkeypatch.setattr(sentence_step.SentenceStep, "run", runs_out)
    from eet_patch import patching

    patching._warned.discard("out of memory")
    with pytest.warns(eet_patch.PatchWarning), eet_patch.enabled():
        assert_same(run(model, sample), own)
        assert sentence_pool.held_bytes() == 0
    assert_fell_back(SEARCH, "out of memory")


def test_disable_gives_the_very_object_back():
    before = vars(SequenceGenerator)["_generate"]
    with eet_patch.enabled():
        assert vars(SequenceGenerator)["_generate"] is not before
    assert vars(SequenceGenerator)["_generate"] is before


@pytest.mark.parametrize("when", ["never", "enabled", "disabled"])
def test_torchscript(when):
    """A generator scripts whether the patch is enabled or not, and the script is the original's."""
    model, sample = model_of(), sample_of([5, 3], "cpu")
    del sample["id"]
    own = run(model, sample)
    # What was scripted before is forgotten, or it would serve here.
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
    if when != "never":
        eet_patch.enable()
    if when == "disabled":
        eet_patch.disable()
    out = torch.jit.script(generator_of(model))(sample, None, None)
    assert eet_patch.report()[SEARCH].replaced == 0
    assert_same(out, own)


def test_a_decoder_whose_layers_are_dropped(device):
    decoder = model_of(device).decoder
    layers = LayerDropModuleList(0.5)
    layers.extend(decoder.layers)
    decoder.layers = layers.eval()
    assert len(decoder_of(decoder, True).layers) == 2
    layers.training = True
    reason = "layers are dropped (training mode); call model.eval() for inference"
    assert decoder_of(decoder, True) == reason


def test_what_is_noted_of_a_decoder_holds_no_weights(device):
    """But for the parameters themselves: a slice of one would keep what it held before."""
    layer = decoder_of(model_of(device).decoder, True).layers[0]
    for cache in (layer.key_cache, layer.value_cache, layer.cross.keys, layer.cross.values):
        assert cache.untyped_storage().nbytes() == 0
