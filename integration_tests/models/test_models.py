"""The model-level API against transformers' own classes: the same answers, the same parameters."""

import inspect

import pytest
import torch
from helpers import (
    assert_as_accurate,
    batch_of,
    in_double,
    minilm_path,
    run_python,
    tiny_bert,
    tiny_gpt2,
    token_ids,
)

from eet_patch import models
from eet_patch.models import KVCache

BATCH, LENGTH = 3, 11


@pytest.fixture
def bert(device, dtype):
    return tiny_bert(device=device, dtype=dtype)


@pytest.fixture
def gpt2(device, dtype):
    return tiny_gpt2(device=device, dtype=dtype)


def hidden(module, size, rows=BATCH, length=LENGTH, seed=3):
    generator = torch.Generator().manual_seed(seed)
    like = next(module.parameters())
    return torch.randn(rows, length, size, generator=generator).to(like)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def check(own, ours, run_own, run_ours=None, keep=None, name="output"):
    """`run(module)` of our class is as near to fp64 as the host's own."""
    with torch.no_grad():
        truth, expected = run_own(in_double(own)), run_own(own)
        out = (run_ours or run_own)(ours)
    if keep is not None:
        truth, expected, out = truth[keep], expected[keep], out[keep]
    assert_as_accurate(out, expected, truth, name)
    return out


def addresses(module):
    return {id(p): p.data_ptr() for p in module.parameters()}


def assert_shares(ours, own):
    """Ours has no parameter of its own: the very objects of the host's, where they lay."""
    mine, theirs = addresses(ours), addresses(own)
    assert mine and mine.keys() <= theirs.keys()
    assert all(theirs[key] == address for key, address in mine.items())


# --- names ---------------------------------------------------------------------------------------


def test_every_class_says_what_it_takes_and_raises():
    for name in models.__all__:
        cls = getattr(models, name)
        assert cls.__doc__
        if name.startswith("EET"):
            assert cls.from_torch.__doc__ and "Raises:" in cls.from_torch.__doc__
            forward = inspect.getdoc(cls.forward)
            assert forward and ("Raises" in forward), name


def test_no_host_library_is_imported():
    code = (
        "import sys, eet_patch.models\n"
        "print([m for m in ('transformers', 'fairseq', 'torch._dynamo') if m in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


# --- BERT ----------------------------------------------------------------------------------------


def test_bert_parts(bert):
    size = bert.config.hidden_size
    x, layer = hidden(bert, size), bert.encoder.layer[0]
    ids = batch_of("none", x.device)["input_ids"]
    ours = models.EETBertEmbedding.from_torch(bert.embeddings)
    check(bert.embeddings, ours, lambda m: m(ids))
    assert_shares(ours, bert.embeddings)
    types = (ids % 2).contiguous()
    check(
        bert.embeddings,
        ours,
        lambda m: m(ids, types, torch.arange(3, 3 + ids.shape[1])[None].to(ids)),
    )

    ours = models.EETBertAttention.from_torch(layer.attention)
    check(layer.attention, ours, lambda m: first(m(x.to(next(m.parameters())))))
    assert_shares(ours, layer.attention)

    ours = models.EETBertFeedforward.from_torch(layer)
    check(layer, ours, lambda m: m.feed_forward_chunk(x.to(next(m.parameters()))), lambda m: m(x))
    both = models.EETBertFeedforward.from_torch(layer.intermediate, layer.output)
    with torch.no_grad():
        assert torch.equal(both(x), ours(x))
    assert_shares(ours, layer)

    ours = models.EETBertEncoderLayer.from_torch(layer)
    mask = torch.ones(BATCH, LENGTH, device=x.device)
    mask[0, 4:] = 0
    wide = (mask != 0)[:, None, None]
    check(
        layer,
        ours,
        lambda m: first(m(x.to(next(m.parameters())), additive(wide, next(m.parameters())))),
        lambda m: m(x, mask),
        keep=mask.bool(),
    )
    with torch.no_grad():
        assert torch.equal(ours(x, mask), ours(x, wide))

    ours = models.EETBertEncoder.from_torch(bert.encoder)
    check(
        bert.encoder,
        ours,
        lambda m: m(x.to(next(m.parameters()))).last_hidden_state,
        lambda m: m(x),
    )


def additive(keep, like):
    mask = torch.zeros(keep.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~keep, torch.finfo(like.dtype).min)


@pytest.mark.parametrize("side", ["none", "right", "left", "interior"])
def test_bert_model(bert, side):
    batch = batch_of(side, bert.device)
    ours = models.EETBertModel.from_torch(bert)
    assert_shares(ours, bert)
    assert addresses(ours).keys() == addresses(bert).keys()
    keep = batch["attention_mask"].bool()
    check(bert, ours, lambda m: m(**batch).last_hidden_state, keep=keep)
    if side in ("none", "right"):
        check(bert, ours, lambda m: m(**batch).pooler_output)
    with torch.no_grad():
        as_tuple = ours(**batch, return_dict=False)
        assert torch.equal(as_tuple[0], ours(**batch).last_hidden_state)


@pytest.mark.parametrize("folder", ["roberta", "camembert", "electra"])
def test_the_family_of_bert(device, folder):
    changes = {}
    if folder == "electra":  # which has no sdpa before transformers 5
        changes = {"embedding_size": 32, "attn_implementation": "eager"}
    model = tiny_bert(folder, device, **changes)
    batch = batch_of("right", device)
    ours = models.EETBertModel.from_torch(model)
    keep = batch["attention_mask"].bool()
    check(model, ours, lambda m: m(**batch).last_hidden_state, keep=keep)


def test_bert_from_pretrained(device):
    from transformers import AutoModel

    own = AutoModel.from_pretrained(minilm_path()).to(device).eval()
    ours = models.EETBertModel.from_pretrained(minilm_path()).to(device)
    batch = batch_of("right", device, vocab_size=30000)
    check(own, ours, lambda m: m(**batch).last_hidden_state, keep=batch["attention_mask"].bool())


def test_what_changes_the_host_changes_ours(bert):
    """And the other way round: there is one set of weights."""
    ours = models.EETBertModel.from_torch(bert)
    ids = batch_of("none", bert.device)["input_ids"]
    with torch.no_grad():
        before = ours(ids).last_hidden_state
        bert.encoder.layer[0].output.dense.weight.mul_(1.5)
        assert not torch.equal(ours(ids).last_hidden_state, before)
    state = {name: torch.zeros_like(value) for name, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    assert not bert.encoder.layer[0].output.dense.weight.any()


def test_conversions_reach_both(device):
    bert = tiny_bert(device=device)
    ours = models.EETBertModel.from_torch(bert).to(torch.bfloat16)
    assert bert.dtype == torch.bfloat16
    assert_shares(ours, bert)


# --- GPT-2 ---------------------------------------------------------------------------------------


def test_gpt2_parts(gpt2):
    beneath = gpt2.transformer
    size = gpt2.config.n_embd
    x, block = hidden(gpt2, size), beneath.h[0]

    def at(m):
        return x.to(next(m.parameters()))

    ours = models.EETLayerNorm.from_torch(block.ln_1)
    check(block.ln_1, ours, lambda m: m(at(m)))
    assert_shares(ours, block.ln_1)

    ids = token_ids(BATCH, LENGTH, x.device)
    ours = models.EETGPT2Embedding.from_torch(beneath)
    places = torch.arange(LENGTH, device=x.device)
    check(beneath, ours, lambda m: m.wte(ids) + m.wpe(places), lambda m: m(ids))
    check(beneath, ours, lambda m: m.wte(ids) + m.wpe(places) + m.wte(ids), lambda m: m(ids, ids))

    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).tril()[None, None]
    ours = models.EETGPT2Attention.from_torch(block.attn)
    check(
        block.attn,
        ours,
        lambda m: first(m(at(m), attention_mask=additive(causal, at(m)))),
        lambda m: m(x),
    )
    assert_shares(ours, block.attn)

    ours = models.EETGPT2Feedforward.from_torch(block.mlp)
    check(block.mlp, ours, lambda m: m(at(m)))
    assert_shares(ours, block.mlp)

    ours = models.EETGPT2DecoderLayer.from_torch(block)
    check(
        block,
        ours,
        lambda m: first(m(at(m), attention_mask=additive(causal, at(m)))),
        lambda m: m(x),
    )

    ours = models.EETGPT2Decoder.from_torch(beneath)
    check(
        beneath,
        ours,
        lambda m: m(inputs_embeds=at(m) - m.wpe(places)).last_hidden_state,
        lambda m: m(x - beneath.wpe(places) + beneath.wpe(places)),
    )


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_gpt2_model(gpt2, side):
    batch = batch_of(side, gpt2.device)
    ours = models.EETGPT2Model.from_torch(gpt2)
    assert_shares(ours, gpt2)
    assert addresses(ours).keys() == addresses(gpt2).keys()
    keep = batch["attention_mask"].bool()
    check(
        gpt2,
        ours,
        lambda m: m.transformer(**batch).last_hidden_state,
        lambda m: m(**batch).last_hidden_state,
        keep=keep,
    )
    check(gpt2, ours, lambda m: m(**batch).logits, lambda m: m.logits(m(**batch)[0]), keep=keep)
    bare = models.EETGPT2Model.from_torch(gpt2.transformer)
    with torch.no_grad():
        assert torch.equal(bare(**batch)[0], ours(**batch)[0])


def test_gpt2_goes_on_behind_a_cache(gpt2):
    """Prompt, two tokens, one token: as one pass over all, left padding or not."""
    batch = batch_of("left", gpt2.device, lengths=(20, 9, 14))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    ours = models.EETGPT2Model.from_torch(gpt2)

    def in_parts(model):
        cache, outs, start = None, [], 0
        for end in (17, 19, 20):
            out = model(
                ids[:, start:end],
                past_key_values=cache,
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                use_cache=True,
            )
            cache, start = out.past_key_values, end
            outs.append(out.last_hidden_state)
        assert cache.get_seq_length() == 20
        return torch.cat(outs, 1)

    check(gpt2, ours, lambda m: in_parts(getattr(m, "transformer", m)), keep=mask.bool())


def test_a_batch_may_shrink_and_change_its_order(gpt2):
    ids = token_ids(4, 9, gpt2.device)
    ours = models.EETGPT2Model.from_torch(gpt2)
    rows = torch.tensor([3, 1], device=gpt2.device)
    with torch.no_grad():
        cache = ours(ids[:, :6], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="call reorder"):
            ours(ids[:2, 6:], past_key_values=cache)
        cache.reorder(rows)
        out = ours(ids[rows, 6:], past_key_values=cache).last_hidden_state
    check(
        gpt2,
        out,
        lambda m: m.transformer(ids[rows]).last_hidden_state[:, 6:],
        lambda ready: ready,
    )


def test_a_cache_grows(device):
    gpt2 = tiny_gpt2(device=device)
    ids = token_ids(2, 200, device)
    ours = models.EETGPT2Model.from_torch(gpt2)
    cache = KVCache()
    with torch.no_grad():
        outs = [ours(ids[:, i : i + 1], past_key_values=cache)[0] for i in range(200)]
        expected = gpt2.transformer(ids).last_hidden_state
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 200


def test_gpt2_with_cross_attention(device, dtype):
    gpt2 = tiny_gpt2(device=device, dtype=dtype, add_cross_attention=True)
    batch = batch_of("none", device)
    encoder = hidden(gpt2, gpt2.config.n_embd, length=7, seed=8)
    encoder_mask = torch.ones(BATCH, 7, dtype=torch.int64, device=device)
    encoder_mask[1, 4:] = 0
    ours = models.EETGPT2Model.from_torch(gpt2)
    assert addresses(ours).keys() == addresses(gpt2).keys()

    def run(model):
        model = getattr(model, "transformer", model)
        states = encoder.to(next(model.parameters()))
        given = {"encoder_hidden_states": states, "encoder_attention_mask": encoder_mask}
        ids = batch["input_ids"]
        out = model(ids[:, :6], use_cache=True, **given)
        then = model(ids[:, 6:], past_key_values=out.past_key_values, **given)
        return torch.cat([out.last_hidden_state, then.last_hidden_state], 1)

    check(gpt2, ours, run)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 9}])
def test_gpt2_generates_what_the_host_does(device, options):
    gpt2 = tiny_gpt2(device=device)
    ours = models.EETGPT2Model.from_torch(gpt2)
    batch = batch_of("left", device)
    torch.manual_seed(5)
    expected = gpt2.generate(**batch, max_new_tokens=12, **options)
    torch.manual_seed(5)
    assert torch.equal(ours.generate(**batch, max_new_tokens=12, **options), expected)


def test_gpt2_from_pretrained(device, tmp_path):
    gpt2 = tiny_gpt2(device=device)
    gpt2.save_pretrained(tmp_path)
    ours = models.EETGPT2Model.from_pretrained(str(tmp_path)).to(device)
    ids = token_ids(2, 7, device)
    check(
        gpt2,
        ours,
        lambda m: m.transformer(ids).last_hidden_state,
        lambda m: m(ids).last_hidden_state,
    )
    assert torch.equal(ours.generate(ids, max_new_tokens=5), gpt2.generate(ids, max_new_tokens=5))


# --- what is refused -----------------------------------------------------------------------------


def test_bad_arguments():
    bert, gpt2 = tiny_bert(), tiny_gpt2()
    ids = token_ids(2, 5)
    mine, decoder = models.EETBertModel.from_torch(bert), models.EETGPT2Model.from_torch(gpt2)
    with torch.no_grad():
        for call, error, message in (
            (lambda: models.EETBertModel.from_torch(gpt2), TypeError, "EETBert.* can't be made"),
            (lambda: models.EETBertModel.from_torch("bert"), TypeError, "module must be"),
            (lambda: models.EETGPT2Model.from_torch(bert), TypeError, "EETGPT2.* can't be made"),
            (lambda: models.EETGPT2Attention.from_torch(gpt2), TypeError, "can't be made from"),
            (lambda: mine(ids[0]), ValueError, "input_ids must be a tensor"),
            (lambda: mine(ids.float()), TypeError, "input_ids must be int64"),
            (lambda: mine(ids + 1000), IndexError, "out of range"),
            (lambda: mine(ids, torch.ones(2, 4)), ValueError, "attention_mask must broadcast"),
            (lambda: mine(ids, torch.ones(2, 5, 5)), ValueError, "must have 2 or 4 dimensions"),
            (lambda: mine(ids, output_attentions=True), ValueError, "output_attentions is not"),
            (lambda: mine(ids, head_mask=torch.ones(2)), ValueError, "head_mask is not supported"),
            (lambda: decoder(ids, past_key_values=()), TypeError, "must be a KVCache"),
            (
                lambda: models.EETGPT2Model.from_torch(gpt2.transformer).generate(ids),
                ValueError,
                "no head",
            ),
            (lambda: KVCache().reorder([0]), TypeError, "index must be an int64 tensor"),
        ):
            with pytest.raises(error, match=message):
                call()
    relu6 = tiny_bert()
    relu6.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU6()
    with pytest.raises(ValueError, match="no kernel for the activation ReLU6"):
        models.EETBertModel.from_torch(relu6)


def test_gradients_are_refused_and_not_forgotten():
    ours = models.EETBertModel.from_torch(tiny_bert())
    out = ours(token_ids(2, 5)).last_hidden_state
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
