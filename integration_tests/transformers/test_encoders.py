"""Encoders run whole, over the real tokens alone, patched against unpatched: every family, mask,
output, and each reason why the layers are run one by one instead.
"""

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from helpers import (
    BEFORE_5,
    ENCODERS,
    FAMILY,
    assert_as_accurate,
    assert_fell_back,
    batch_of,
    compare,
    in_double,
    patched,
    randomised,
    tiny_bert,
    tiny_encoder,
    token_ids,
)

import eet_patch
from eet_patch.targets import TARGETS

SIDES = ["none", "right", "left", "interior"]
# Families whose embeddings are BertEmbeddings' too: these are replaced from the ids on.
WHOLE = ["bert", "roberta", "xlm_roberta", "camembert", "data2vec"]
MORE = "the attention mask says more than which tokens are padding"
KEPT = "padded positions are computed too (enable(keep_padding=True))"
DROPOUT = "dropout is active (the layer is in training mode); call model.eval() for inference"


def family_model(folder, device, dtype=torch.float32, **changes):
    for implementation in ("sdpa", "eager"):
        try:
            settings = {"attn_implementation": implementation} | changes
            return tiny_bert(folder, device, dtype, **settings)
        except ValueError as error:
            if "scaled_dot_product" not in str(error) and "sdpa" not in str(error):
                raise
    raise AssertionError(folder)


def bert_target(folder):
    return f"{folder}_model" if folder in WHOLE else f"{folder}_encoder"


def assert_zeros_at_padding(out, mask):
    assert not out[mask == 0].any()


@pytest.mark.parametrize("folder", FAMILY)
@pytest.mark.parametrize("side", SIDES)
def test_every_family_and_padding(device, folder, side):
    model, inputs = family_model(folder, device), batch_of(side, device)
    mask = inputs["attention_mask"]
    out = compare(
        model,
        lambda m: m(**inputs).last_hidden_state,
        bert_target(folder),
        keep=mask,
        calls=1,
        strict=True,
    )
    assert_zeros_at_padding(out, mask)


@pytest.mark.parametrize("folder", FAMILY)
def test_every_family_in_every_dtype(device, dtype, folder):
    model, inputs = family_model(folder, device, dtype), batch_of("right", device)
    keep = inputs["attention_mask"]
    compare(model, lambda m: m(**inputs).last_hidden_state, bert_target(folder), keep=keep)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", SIDES)
def test_encoders_under_names_of_their_own(device, kind, implementation, side):
    model = tiny_encoder(kind, device, attn_implementation=implementation)
    inputs = batch_of(side, device)
    mask = inputs["attention_mask"]

    def run(m):
        out = m(**inputs, output_hidden_states=True)
        return (
            *out.hidden_states,
            m(**inputs).last_hidden_state,
            m(**inputs, return_dict=False)[0],
        )

    outs = compare(model, run, f"{kind}_encoder", keep=mask, calls=3, strict=True)
    assert_zeros_at_padding(outs[-1], mask)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_under_names_of_their_own_in_every_dtype(device, dtype, kind):
    inputs = batch_of("right", device)
    for head in ("Model", "ForMaskedLM", "ForQuestionAnswering"):
        model = tiny_encoder(kind, device, dtype, head)
        keep = inputs["attention_mask"]
        compare(model, lambda m: m(**inputs)[0], f"{kind}_encoder", keep=keep)


def part(model, path):
    return model.get_submodule(path)


NAMED = [  # kind, change, reason
    ("distilbert", lambda m: m.train(), DROPOUT),
    ("albert", lambda m: m.train(), None),  # its dropouts are 0
    (
        "distilbert",
        lambda m: part(m, "transformer.layer.1.ffn").register_forward_hook(lambda m, a, o: o),
        "a submodule (FFN) has hooks, which fusion would skip",
    ),
    (
        "albert",
        lambda m: part(m, "encoder.albert_layer_groups.1").register_forward_hook(lambda m, a, o: o),
        "a submodule (AlbertLayerGroup) has hooks, which fusion would skip",
    ),
    (
        "albert",
        lambda m: setattr(
            part(m, "encoder.albert_layer_groups.0.albert_layers.0"), "activation", torch.nn.Tanh()
        ),
        "there is no kernel for the activation Tanh",
    ),
    (
        "distilbert",
        lambda m: setattr(part(m, "transformer.layer.0"), "sa_layer_norm", torch.nn.Identity()),
        "a submodule is a Identity, not a LayerNorm",
    ),
]


@pytest.mark.parametrize("kind, change, reason", NAMED)
def test_reasons_of_encoders_under_names_of_their_own(device, kind, change, reason):
    model, ids = tiny_encoder(kind, device), token_ids(2, 6, device)
    change(model)
    with torch.no_grad():
        torch.manual_seed(0)
        own = model(ids)[0]
        eet_patch.reset_report()
        with eet_patch.enabled():
            torch.manual_seed(0)
            out = model(ids)[0]
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
    if reason is None:
        assert eet_patch.report()[f"{kind}_encoder"].replaced == 1
    else:
        assert_fell_back(f"{kind}_encoder", reason, calls=1)


@pytest.mark.parametrize("folder", WHOLE)
@pytest.mark.parametrize("side", SIDES)
def test_the_encoder_beneath_a_model_of_the_users_own(device, folder, side):
    model, inputs = family_model(folder, device), batch_of(side, device)
    only = f"{folder}_encoder"
    compare(
        model,
        lambda m: m(**inputs).last_hidden_state,
        only,
        keep=inputs["attention_mask"],
        only=only,
        calls=1,
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_batches_of_every_shape_one_after_the_other(device, dtype, implementation):
    """What is kept from call to call (on a GPU graphs and buffers) serves the next shape too."""
    model = tiny_bert("bert", device, dtype, attn_implementation=implementation)
    double = in_double(model)
    lengths = [(5, 3), (11, 4, 7), (1,), (64, 64, 2, 33), (5, 3), (40,) * 8, (64, 64, 2, 33)]
    with torch.no_grad():
        for sizes in (*lengths, *lengths):
            inputs = batch_of("right", device, sizes)
            keep = inputs["attention_mask"].bool()
            own, truth = model(**inputs)[0], double(**inputs)[0]
            with patched("bert_model", calls=2):
                out, again = (model(**inputs)[0] for _ in range(2))
            assert torch.equal(out, again)
            assert_as_accurate(out[keep], own[keep], truth[keep])


def test_ids_of_types_and_positions(device):
    model, inputs = tiny_bert("bert", device), batch_of("left", device)
    shape = inputs["input_ids"].shape
    types = token_ids(*shape, device, seed=5) % 2
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for extra in (
        {"token_type_ids": types},
        {"position_ids": positions},
        {"position_ids": positions[:1]},
        {"position_ids": positions, "token_type_ids": types},
    ):
        compare(
            model,
            lambda m, extra=extra: m(**inputs, **extra).last_hidden_state,
            "bert_model",
            keep=inputs["attention_mask"],
        )


@pytest.mark.parametrize("entry", ["bert_model", "bert_encoder"])
def test_a_row_without_a_real_token_is_zeros(device, entry):
    model, inputs = tiny_bert("bert", device), batch_of("right", device)
    inputs["attention_mask"][1] = 0
    with torch.no_grad(), eet_patch.enabled(only=entry):
        for _ in range(3):
            out = model(**inputs).last_hidden_state
            assert out.isfinite().all() and not out[1].any() and out[0].any()
        inputs["attention_mask"][:] = 0
        assert not model(**inputs).last_hidden_state.any()
    assert eet_patch.report()[entry].replaced == 4


# --- masks of four dimensions --------------------------------------------------------------------


def four_dimensional(model, keep, kind):
    """`keep` (batch, seq_len) as a user's own mask over queries and keys."""
    mask = keep[:, None, None, :].expand(-1, 1, keep.shape[1], -1)
    if kind == "pairs":
        mask = mask & keep[:, None, :, None]
    elif kind == "causal":
        mask = mask.tril()
    if kind == "bool":
        return mask.contiguous()
    value = -3.0 if kind == "bias" else torch.finfo(model.dtype).min
    zeros = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return zeros.masked_fill(~mask, value)


@pytest.mark.parametrize("kind", ["keys", "pairs", "bool", "causal", "bias"])
def test_masks_of_four_dimensions(device, kind):
    implementation = "sdpa" if kind == "bool" else "eager"
    model = tiny_bert("bert", device, attn_implementation=implementation)
    keep = batch_of("right", device)["attention_mask"].bool()
    hidden = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1)).to(device)

    def run(m):
        return m.encoder(hidden.to(m.dtype), four_dimensional(m, keep, kind))[0]

    if kind in ("causal", "bias"):
        compare(model, run, "bert_layer", keep=keep)
        eet_patch.reset_report()
        with torch.no_grad(), eet_patch.enabled():
            run(model)
        assert_fell_back("bert_encoder", MORE, calls=1)
    else:
        out = compare(model, run, "bert_encoder", keep=keep)
        assert_zeros_at_padding(out, keep)


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states(device, side, return_dict):
    model, inputs = tiny_bert("bert", device, num_hidden_layers=3), batch_of(side, device)
    keep = inputs["attention_mask"].bool()

    def run(m):
        out = m(**inputs, output_hidden_states=True, return_dict=return_dict)
        states = out.hidden_states if return_dict else out[2]
        assert len(states) == 4
        return tuple(states)

    compare(model, run, "bert_encoder", keep=keep)
    with torch.no_grad(), eet_patch.enabled():
        out = model(**inputs, output_hidden_states=True)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert model(**inputs).hidden_states is None


def test_tuples_and_defaults_of_the_config(device):
    model, inputs = tiny_bert("bert", device), batch_of("right", device)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        own = model(**inputs, return_dict=False)
        with patched("bert_encoder", calls=1):
            out = model(**inputs, return_dict=False)
        assert type(out) is type(own) and len(out) == len(own)
        torch.testing.assert_close(out[0][keep], own[0][keep], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[1], own[1], rtol=1e-4, atol=1e-4)
        with eet_patch.enabled():
            whole = model(**inputs)
        assert type(whole) is type(model(**inputs)) and whole.keys() == model(**inputs).keys()
        model.config.output_hidden_states = True
        with eet_patch.enabled():
            assert len(model(**inputs).hidden_states) == 3


HEADS = [
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForNextSentencePrediction",
]


@pytest.mark.parametrize("head", HEADS)
def test_heads(device, head):
    model, inputs = tiny_bert("bert", device, head=head), batch_of("right", device)
    keep = inputs["attention_mask"]
    if head in ("ForSequenceClassification", "ForNextSentencePrediction"):
        keep = None
    compare(model, lambda m: m(**inputs)[0], "bert_model", keep=keep)


def test_keep_padding(device):
    """Every position as the unpatched model computes it."""
    model, inputs = tiny_bert("bert", device), batch_of("right", device)
    with torch.no_grad():
        own = model(**inputs)[0]
        with eet_patch.enabled(keep_padding=True):
            out = model(**inputs)[0]
        torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
        assert_fell_back("bert_model", KEPT, calls=1)
        assert_fell_back("bert_encoder", KEPT, calls=1)
        full = batch_of("none", device)
        eet_patch.reset_report()
        with eet_patch.enabled(keep_padding=True, strict=True):
            out = model(**full)[0]
        torch.testing.assert_close(out, model(**full)[0], rtol=1e-4, atol=1e-4)
    assert eet_patch.report()["bert_model"].replaced == 1


# --- whatever changes between two calls ----------------------------------------------------------


def test_changes_are_seen_by_the_next_call(device):
    model, inputs = tiny_bert("bert", device), batch_of("right", device)
    keep = inputs["attention_mask"].bool()
    other = randomised(copy.deepcopy(model).cpu(), seed=9)
    layer = model.encoder.layer[1]

    def swap():
        layer.output.dense.weight.data = layer.output.dense.weight.data.clone().mul_(1.1)

    def half_the_norm():
        with torch.no_grad():
            model.embeddings.LayerNorm.weight.mul_(0.5)

    hook = []
    changes = [
        lambda: None,
        lambda: model.load_state_dict(other.state_dict()),
        swap,
        half_the_norm,
        lambda: setattr(layer.attention.self.query, "weight", model.pooler.dense.weight),
        lambda: hook.append(layer.output.register_forward_hook(lambda m, a, out: out * 1.5)),
        lambda: hook.pop().remove(),
        lambda: setattr(model.embeddings, "dropout", torch.nn.Identity()),
    ]
    for change in changes:
        with torch.no_grad(), eet_patch.enabled():
            for _ in range(3):
                model(**inputs)
        change()
        with torch.no_grad():
            own = model(**inputs)[0]
            eet_patch.enable()
            for _ in range(4):
                out = model(**inputs)[0]
                torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)
            eet_patch.disable()


@pytest.mark.parametrize(
    "path", ["encoder", "embeddings", "embeddings.LayerNorm", "encoder.layer.0"]
)
def test_hooks_that_come_later_are_called(device, path):
    model, ids, called = tiny_bert("bert", device), token_ids(2, 6, device), []
    with torch.no_grad(), eet_patch.enabled():
        for _ in range(3):
            model(ids)
        hook = model.get_submodule(path).register_forward_hook(lambda *_: called.append(1))
        for _ in range(3):
            model(ids)
        assert len(called) == 3
        hook.remove()
        eet_patch.reset_report()
        for _ in range(3):
            model(ids)
        assert len(called) == 3 and eet_patch.report()["bert_model"].replaced == 3


@pytest.mark.parametrize("layer", [0, 1, 2, 5])
def test_parameters_that_move_between_calls(device, layer):
    """Of the layers that are launched ahead, and of the others."""
    model, inputs = tiny_bert("bert", device, num_hidden_layers=6), batch_of("right", device)
    keep = inputs["attention_mask"].bool()
    changed = model.encoder.layer[layer].output.LayerNorm
    with torch.no_grad():
        for round in range(3):
            with eet_patch.enabled():
                for _ in range(4):
                    out = model(**inputs)[0]
                if round < 2:
                    changed.weight.data = changed.weight * 1.5
                    out = model(**inputs)[0]
            own = model(**inputs)[0]
            torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)
    row = eet_patch.report()["bert_model"]
    assert row.fallbacks == {} and row.replaced == 14


def replace_words(embeddings):
    weight = embeddings.word_embeddings.weight
    embeddings.word_embeddings.weight = torch.nn.Parameter(weight * 0.5)


def move_positions(embeddings):
    table = embeddings.position_embeddings
    table.weight.data = table.weight * 2.0


def other_norm(embeddings):
    norm = torch.nn.LayerNorm(32, eps=0.1, device=embeddings.LayerNorm.weight.device)
    embeddings.LayerNorm = norm.eval()


CHANGES = {
    "in place": lambda e: e.word_embeddings.weight.mul_(0.5),
    "parameter": replace_words,
    "data": move_positions,
    "module": other_norm,
    "eps": lambda e: setattr(e.LayerNorm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_embeddings_that_change_between_calls(device, change):
    """Although they are launched before the model was looked at."""
    model, inputs = tiny_bert("bert", device, num_hidden_layers=6), batch_of("right", device)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        with eet_patch.enabled():
            for _ in range(4):
                before = model(**inputs)[0]
            CHANGES[change](model.embeddings)
            outs = [model(**inputs)[0] for _ in range(3)]
        own = model(**inputs)[0]
    assert (before - own)[keep].abs().max() > 1e-2
    for out in outs:
        torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)
    row = eet_patch.report()["bert_model"]
    assert row.fallbacks == {} and row.replaced == 7


def test_an_encoder_that_is_replaced_between_calls(device):
    """The old one is not kept alive, and the new one is launched ahead as soon as it has run."""
    model, inputs = tiny_bert("bert", device, num_hidden_layers=6), batch_of("right", device)
    other = tiny_bert("bert", device, num_hidden_layers=6, seed=1)
    keep = inputs["attention_mask"].bool()
    old = weakref.ref(model.encoder.layer[3])
    with torch.no_grad(), eet_patch.enabled():
        for _ in range(4):
            model(**inputs)
        model.encoder = other.encoder
        gc.collect()
        assert old() is None
        outs = [model(**inputs)[0] for _ in range(4)]
    with torch.no_grad():
        own = model(**inputs)[0]
    for out in outs:
        torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)
    row = eet_patch.report()["bert_model"]
    assert row.fallbacks == {} and row.replaced == 8


def test_calls_that_are_refused_after_they_were_launched(device):
    """They leave nothing behind: the next call goes through, and so does one beside them."""
    model, inputs = tiny_bert("bert", device, num_hidden_layers=6), batch_of("right", device)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        own = model(**inputs)[0]
        with eet_patch.enabled():
            for _ in range(3):
                for _ in range(3):
                    out = model(**inputs)[0]
                    torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)
                states = model(**inputs, output_hidden_states=True).hidden_states
                torch.testing.assert_close(states[-1][keep], own[keep], rtol=1e-4, atol=1e-4)
            with torch.enable_grad():
                assert model(**inputs)[0].requires_grad
            out = model(**inputs)[0]
    torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)
    assert eet_patch.report()["bert_model"].replaced == 10


def test_threads(device):
    model = tiny_bert("bert", device)
    batches = [batch_of("right", device, (size, 5, 9)) for size in (11, 30, 64, 80)]
    with torch.no_grad():
        owns = [model(**inputs)[0] for inputs in batches]
    errors = []

    def work(index):
        inputs, own = batches[index], owns[index]
        keep = inputs["attention_mask"].bool()
        try:
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(
                        model(**inputs)[0][keep], own[keep], rtol=1e-4, atol=1e-4
                    )
        except BaseException as error:
            errors.append(error)

    with patched("bert_model", calls=80):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
def test_graphs_are_bounded_reported_and_freed():
    from eet_patch.encoding import pool

    device = torch.device("cuda", 0)
    model = tiny_bert("bert", device)
    eet_patch.enable()
    with torch.no_grad():
        for length in range(1, 90):
            for _ in range(2):
                model(**batch_of("right", device, (length, 5, 3)))
        assert 0 < pool.num_graphs() <= pool.MAX_GRAPHS
        memory = "encoder steps (packed tokens, scratch of graphs)"
        assert 0 < eet_patch.report().memory[memory] <= 2 * pool.MAX_BYTES
        side = torch.cuda.Stream()
        inputs = batch_of("right", device)
        with torch.cuda.stream(side):
            out = [model(**inputs)[0] for _ in range(3)]
        side.synchronize()
        assert torch.equal(out[0], out[2])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(input_ids=inputs["input_ids"])
        del model
        assert pool.num_graphs() == 0
    eet_patch.disable()
    assert eet_patch.report().memory[memory] == 0


# --- reasons -------------------------------------------------------------------------------------


def plain(model, inputs):
    return model(**inputs)


REASONS = {
    # reason of the model's target, of the encoder's (None: it ran), the model, and the call
    "a tuple is to be returned": (None, {}, lambda m, i: m(**i, return_dict=False)),
    "outputs of the layers are recorded": (
        None,
        {},
        lambda m, i: m(**i, output_hidden_states=True),
    ),
    "the model is a decoder": ("a layer is a decoder's", {"is_decoder": True}, plain),
    "input_ids is a NoneType": (None, {}, None),
    "attention_mask is torch.float32": (
        None,
        {},
        lambda m, i: m(i["input_ids"], attention_mask=i["attention_mask"].float()),
    ),
    "input_ids is torch.int32": (None, {}, lambda m, i: m(i["input_ids"].int())),
    "input_ids is not contiguous": (
        None,
        {},
        lambda m, i: m(i["input_ids"].t().contiguous().t()),
    ),
    "token_type_ids has shape (1, 11)": (
        None,
        {},
        lambda m, i: m(**i, token_type_ids=torch.zeros_like(i["input_ids"][:1])),
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_of_a_model(device, reason):
    beneath, changes, call = REASONS[reason]
    model, inputs = tiny_bert("bert", device, **changes), batch_of("right", device)
    keep = inputs["attention_mask"].bool()
    if reason == "input_ids is a NoneType":
        reason = "the argument inputs_embeds is given, which the kernels don't know"
        embeds = model.embeddings.word_embeddings(inputs["input_ids"]).detach()

        def call(m, i):
            return m(inputs_embeds=embeds, attention_mask=i["attention_mask"])

    with torch.no_grad():
        own = call(model, inputs)[0]
        eet_patch.reset_report()
        with eet_patch.enabled():
            out = call(model, inputs)[0]
    assert_fell_back("bert_model", reason, calls=1)
    row = eet_patch.report()["bert_encoder"]
    if beneath is None:
        assert row.replaced == 1 and not row.fallbacks
    elif not changes:
        assert_fell_back("bert_encoder", beneath, calls=1)
    torch.testing.assert_close(out[keep], own[keep], rtol=1e-4, atol=1e-4)


def replaced_linear(model):
    model.encoder.layer[0].intermediate.dense = torch.nn.Identity()


def trained(model):
    model.train()


def hooked(model):
    model.encoder.layer[0].output.register_forward_hook(lambda m, a, out: out)


def hooked_layer(model):
    model.encoder.layer[0].register_forward_hook(lambda m, a, out: out)


def hooked_embeddings(model):
    model.embeddings.register_forward_hook(lambda m, a, out: out)


def hooked_encoder(model):
    model.encoder.register_forward_hook(lambda m, a, out: out)


def chunked(model):
    model.encoder.layer[0].feed_forward_chunk = lambda x: x


def renormalised(model):
    model.embeddings.word_embeddings.max_norm = 1.0


CHANGED = [
    (trained, DROPOUT, DROPOUT),
    (hooked, None, "a submodule (BertOutput) has hooks, which fusion would skip"),
    (hooked_layer, None, "a submodule (BertLayer) has hooks, which fusion would skip"),
    (hooked_embeddings, "a submodule (BertEmbeddings) has hooks, which fusion would skip", None),
    (hooked_encoder, "a submodule (BertEncoder) has hooks, which fusion would skip", None),
    (renormalised, "an embedding has a max_norm", None),
]


@pytest.mark.parametrize("change, of_model, of_encoder", CHANGED)
def test_reasons_of_modules(device, change, of_model, of_encoder):
    model, ids = tiny_bert("bert", device), token_ids(2, 6, device)
    change(model)
    eet_patch.reset_report()
    with torch.no_grad(), eet_patch.enabled():
        torch.manual_seed(0)
        out = model(ids)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        own = model(ids)[0]
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
    assert_fell_back("bert_model", of_model or of_encoder, calls=1)
    if of_encoder is not None:
        assert_fell_back("bert_encoder", of_encoder, calls=1)
    else:
        assert eet_patch.report()["bert_encoder"].replaced == 1


def test_reasons_of_calls(device):
    model, ids = tiny_bert("bert", device, num_hidden_layers=1), token_ids(2, 6, device)
    hidden = torch.randn(2, 6, 32, device=device)
    encoder, decoder = model.encoder, tiny_bert("bert", device, is_decoder=True)
    more = torch.zeros(2, 4, 6, 6, device=device, dtype=torch.float64)
    cases = [
        ("the input has shape (0, 6, 32)", lambda: encoder(hidden[:0])),
        ("attention_mask must be bool, float32 or torch.float32", lambda: encoder(hidden, more)),
        ("the input is not contiguous", lambda: encoder(hidden.transpose(0, 1))),
        ("a layer is a decoder's", lambda: decoder.encoder(hidden)),
        ("autocast is on", None),
        ("gradients are needed", None),
    ]
    for reason, call in cases:
        eet_patch.reset_report()
        with torch.no_grad(), eet_patch.enabled(only="bert_encoder"):
            if reason == "autocast is on":
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    model(ids)
            elif reason == "gradients are needed":
                with torch.enable_grad():
                    model(ids)
            else:
                try:
                    call()
                except (RuntimeError, TypeError):  # also of the original
                    pass
        (found,) = eet_patch.report()["bert_encoder"].fallbacks
        assert found.startswith(reason), (found, reason)


@pytest.mark.skipif(BEFORE_5, reason="these have other signatures before 5.0")
def test_attentions_are_complete(device):
    model = tiny_bert("bert", device, attn_implementation="eager")
    inputs = batch_of("right", device)
    with torch.no_grad(), eet_patch.enabled():
        out = model(**inputs, output_attentions=True)
    assert len(out.attentions) == 2
    assert eet_patch.report()["bert_encoder"].replaced == 0


def test_every_step_target_is_of_the_step_level():
    names = [t.name for t in TARGETS if t.level == "step"]
    assert {bert_target(folder) for folder in FAMILY} <= set(names)
    assert transformers.__version__
