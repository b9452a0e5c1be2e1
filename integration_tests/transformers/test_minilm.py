"""A real BERT with trained weights, all-MiniLM-L6-v2, through the interfaces that its users use."""

import pytest
import torch
import transformers
from helpers import assert_replaced, minilm_path, patched, tiny_bert
from transformers import AutoModel, AutoTokenizer

import eet_patch

NUM_LAYERS = 6
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Berlin.",
    "Kernels are fused so that activations stay in the cache, and no weight is copied anywhere.",
    "How many people live in the largest city of the southern hemisphere, and since when?",
    "",
]


@pytest.fixture(scope="module")
def path():
    return minilm_path()


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def loaded(path):
    return AutoModel.from_pretrained(path).eval()


@pytest.fixture
def model(loaded, device):
    yield loaded.to(device)
    loaded.to("cpu", torch.float32)


@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_of_sentences(model, tokenizer, device, side):
    """fp32, real positions, every layer: no element differs by more than 2e-5."""
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt", padding_side=side).to(device)
    keep = inputs["attention_mask"].bool()
    assert not keep.all()
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True)
        with patched("bert_layer", calls=NUM_LAYERS):
            out = model(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == len(own.hidden_states) == NUM_LAYERS + 1
    for mine, theirs in zip(out.hidden_states, own.hidden_states, strict=True):
        assert (mine - theirs)[keep].abs().max() <= 2e-5
    if side == "right":
        assert (out.pooler_output - own.pooler_output).abs().max() <= 2e-5


@pytest.mark.parametrize("sentence", SENTENCES)
def test_one_sentence(model, tokenizer, device, sentence):
    inputs = tokenizer(sentence, return_tensors="pt").to(device)
    with torch.no_grad():
        own = model(**inputs).last_hidden_state
        with patched("bert_layer", calls=NUM_LAYERS):
            out = model(**inputs).last_hidden_state
    assert (out - own).abs().max() <= 2e-5


def test_padding_does_not_change_a_sentence(model, tokenizer, device):
    """The same sentence alone and in a padded batch."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device)
    with torch.no_grad(), patched("bert_layer"):
        together = model(**batch).last_hidden_state
        for row, sentence in enumerate(SENTENCES):
            alone = model(**tokenizer(sentence, return_tensors="pt").to(device)).last_hidden_state
            length = alone.shape[1]
            assert (together[row, :length] - alone[0]).abs().max() <= 2e-5


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings(model, tokenizer, device, half):
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device)
    mask = inputs["attention_mask"][..., None]

    def embed(m):
        out = m(**inputs).last_hidden_state
        return torch.nn.functional.normalize((out * mask).sum(1).double(), dim=-1)

    with torch.no_grad():
        exact = embed(model)
        model.to(half)
        own = embed(model)
        with patched("bert_model", calls=1):
            out = embed(model)
    assert (out - exact).norm() <= 1.5 * (own - exact).norm() + 1e-6


def test_pipeline_feature_extraction(path, tokenizer, device):
    pipe = transformers.pipeline("feature-extraction", model=path, device=device)
    own = pipe(SENTENCES, batch_size=2)
    eet_patch.enable()
    out = pipe(SENTENCES, batch_size=2)
    assert_replaced("bert_model", calls=3)
    for sentence, mine, theirs in zip(SENTENCES, out, own, strict=True):
        real = len(tokenizer(sentence)["input_ids"])  # the pipeline returns padded positions too
        mine, theirs = torch.tensor(mine), torch.tensor(theirs)
        assert mine.shape == theirs.shape and mine.shape[-1] == 384
        assert (mine - theirs)[:, :real].abs().max() <= 2e-5


def test_sentence_transformers_encode(path, device):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(path, device=str(device))
    own = encoder.encode(SENTENCES, convert_to_tensor=True, batch_size=3)
    with patched("bert_model", calls=2):
        out = encoder.encode(SENTENCES, convert_to_tensor=True, batch_size=3)
    assert (out - own).abs().max() <= 2e-5
    similar = encoder.similarity(out[:1], out[1:])
    assert torch.allclose(similar, encoder.similarity(own[:1], own[1:]), atol=1e-5)


def test_pipeline_fill_mask(path, tokenizer, device):
    """A masked language model with random weights and the real tokenizer."""
    model = tiny_bert("bert", head="ForMaskedLM", vocab_size=len(tokenizer))
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device=device)
    texts = ["The capital of France is [MASK].", "[MASK] is a planet."]
    own = pipe(texts)
    with patched("bert_layer"):
        out = pipe(texts)
    for mine, theirs in zip(out, own, strict=True):
        assert [guess["token"] for guess in mine] == [guess["token"] for guess in theirs]
        for guess, other in zip(mine, theirs, strict=True):
            assert abs(guess["score"] - other["score"]) <= 1e-5
