"""Memory of generate()'s loops: the context is written where the steps read it, what idles gives
way to what is used, and the report tells what is held.
"""

import contextlib
import weakref

import pytest
import torch
from helpers import (
    CACHES_TELL_WHOSE,
    assert_same_cache,
    assert_same_tokens,
    batch_of,
    patched,
    tiny_decoder,
    tiny_gpt2,
    token_ids,
)
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import eet_patch
from eet_patch.adapters import beam_search, kv_cache, sample
from eet_patch.generation import pool
from eet_patch.generation import step as step_module

PROMPT, LENGTHS = 9, (9, 5, 7)
STEPS, ROOM = "decode steps (KV buffers, logits, scratch)", "room behind KV caches"
SETTINGS = [
    {},
    {"do_sample": True, "top_k": 9, "repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},  # the host chooses
    {"num_beams": 3},
]
WAYS = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def target_of(settings, prefix="gpt2"):
    return f"{prefix}_{'beam_search' if 'num_beams' in settings else 'sample'}"


def generated(model, inputs, **settings):
    torch.manual_seed(7)
    wanted = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **wanted | settings)


def filled_cache(model, inputs, length):
    """A cache that holds the first `length` tokens of the inputs."""
    mask, cache = inputs["attention_mask"][:, :length], DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            inputs["input_ids"][:, :length],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
    return cache


def inside(tensor, buffer):
    begin = buffer.untyped_storage().data_ptr()
    return begin <= tensor.data_ptr() < begin + buffer.untyped_storage().nbytes()


@pytest.fixture
def contexts(monkeypatch):
    """For each loop that ran, whether each layer's context was written to the step's buffers."""
    found = []

    def note(past, keys, values):
        pairs = zip(past.layers, keys, values, strict=True)
        found.append([inside(x.keys, k) and inside(x.values, v) for x, k, v in pairs])

    def watch(module, name, look):
        original = getattr(module, name)

        def watched(*arguments):
            look(*arguments)
            return original(*arguments)

        monkeypatch.setattr(module, name, watched)

    def own_context(model, context, arguments, keys, values, *repeats):
        found.append("own")

    watch(sample, "_take_cache", lambda step, past, _: note(past, step.keys, step.values))
    watch(
        beam_search,
        "_take_context",
        lambda past, keys, values, _, written: written or note(past, keys, values),
    )
    for module in (sample, beam_search):
        watch(module, "own_context", own_context)
    return found


def has_own_pass(settings):
    """Whether the context of a plain call runs without the host: all but what the host chooses."""
    return "no_repeat_ngram_size" not in settings


@pytest.fixture
def copies(monkeypatch):
    """Appends that found no room and took buffers of their own."""
    made = []
    remember = kv_cache._remember

    def count(keys, room):
        if not room.lent:
            made.append(room)
        remember(keys, room)

    monkeypatch.setattr(kv_cache, "_remember", count)
    return made


# --- the context goes to the step's buffers ------------------------------------------------------


@WAYS
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("inference", [False, True])
def test_the_context_is_written_to_the_step(device, contexts, copies, settings, side, inference):
    model, inputs = tiny_gpt2(device), batch_of(side, device, LENGTHS, vocab_size=500)
    own = generated(model, inputs, **settings)
    layers = () if has_own_pass(settings) else ("gpt2_block",)
    with patched(target_of(settings), *layers):
        for _ in range(2):  # new buffers, and used ones
            with torch.inference_mode() if inference else contextlib.nullcontext():
                assert torch.equal(generated(model, inputs, **settings), own)
    written = "own" if has_own_pass(settings) else [True, True]
    assert contexts == [written] * 2 and copies == []


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_in_every_dtype(device, dtype, contexts, settings):
    model, inputs = tiny_gpt2(device, dtype), batch_of("left", device, LENGTHS, vocab_size=500)
    own = generated(model, inputs, **settings)
    with patched(target_of(settings)):
        out = generated(model, inputs, **settings)
    if "num_beams" not in settings or dtype == torch.float32:  # else near ties reorder beams
        assert_same_tokens(model, PROMPT, own, out, attention_mask=inputs["attention_mask"])
    assert contexts == ["own"]


@WAYS
@pytest.mark.parametrize("kind", ["opt", "gpt_neo_within_window"])
def test_of_other_models(device, contexts, kind, settings):
    model, inputs = tiny_decoder(kind, device), batch_of("left", device, LENGTHS, vocab_size=500)
    own = generated(model, inputs, **settings)
    with patched(target_of(settings, kind.removesuffix("_within_window"))):
        assert torch.equal(generated(model, inputs, **settings), own)
    assert contexts == ["own" if has_own_pass(settings) else [True, True]]


def test_a_long_context(device, contexts):
    """Enough rows for torch's products, which the keys are copied from."""
    model = tiny_gpt2(device)
    ids = token_ids(3, 150, device, vocab_size=500)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for settings in ({}, {"num_beams": 3}):
        own = generated(model, inputs, **settings)
        with patched(target_of(settings)):
            assert torch.equal(generated(model, inputs, **settings), own)
    assert contexts == ["own"] * 2


@WAYS
def test_unpatched_layers_bring_a_copy(device, contexts, settings):
    """The host concatenates to what it was lent, and the loop takes what it finds. It runs the
    context where it chooses, or where padding is in a cache that is shown.
    """
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)
    settings = settings | {"return_dict_in_generate": True}
    own = generated(model, inputs, **settings).sequences
    with patched(target_of(settings), only=target_of(settings)):
        assert torch.equal(generated(model, inputs, **settings).sequences, own)
    assert contexts == [[False, False]]


def test_a_layer_that_falls_back_brings_a_copy(device, contexts, monkeypatch):
    """One that failed after it had taken its room, as when memory runs out in it."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)
    settings = {"no_repeat_ngram_size": 2}
    own = generated(model, inputs, **settings)
    ffn, calls = eet_patch.ops.blocks.ffn, []

    def fail_once(*arguments, **more):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return ffn(*arguments, **more)

    monkeypatch.setattr(eet_patch.ops.blocks, "ffn", fail_once)
    with patched("gpt2_sample"):
        assert torch.equal(generated(model, inputs, **settings), own)
        assert eet_patch.report()["gpt2_block"].fallbacks == {"out of memory": 1}
    assert contexts == [[False, True]]


# --- the user's caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 4, PROMPT - 1])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("layers", [True, False], ids=["patched", "unpatched"])
def test_a_users_cache(device, contexts, length, settings, layers):
    """Empty or filled by the unpatched model: the same answers, the same keys, and what it held
    before is as it was.
    """
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)

    def run():
        cache = filled_cache(model, inputs, length) if length else DynamicCache()
        before = [(layer.keys, layer.values) for layer in cache.layers]
        copied = [tuple(None if t is None else t.clone() for t in pair) for pair in before]
        with patched("gpt2_sample", **options) if options is not None else contextlib.nullcontext():
            tokens = generated(model, inputs, past_key_values=cache, **settings)
        for pair, kept in zip(before, copied, strict=True):
            for tensor, copy in zip(pair, kept, strict=True):
                assert tensor is None or torch.equal(tensor, copy)
        return tokens, cache

    options = None
    own, own_cache = run()
    options = {} if layers else {"only": "gpt2_sample"}
    out, cache = run()
    assert torch.equal(out, own) and cache.get_seq_length() == own_cache.get_seq_length()
    for mine, theirs in zip(cache.layers, own_cache.layers, strict=True):
        for tensors in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert_same_cache(*tensors, None if length else inputs["attention_mask"])
    own = has_own_pass(settings) and not length and not CACHES_TELL_WHOSE
    assert contexts == (["own"] if own else [[layers, layers]])


def test_a_users_cache_through_several_calls(device, contexts):
    """Each goes on from the last one's cache, other calls run between, and nobody writes to it."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)

    def run():
        cache, sequences, mask = DynamicCache(), inputs["input_ids"], inputs["attention_mask"]
        for _ in range(3):
            given = {"input_ids": sequences, "attention_mask": mask}
            sequences = generated(model, given, max_new_tokens=10, past_key_values=cache)
            more = mask.new_ones(3, sequences.shape[1] - mask.shape[1])
            mask = torch.cat([mask, more], 1)
            before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            generated(model, inputs, do_sample=True)  # like the first call, in other buffers
            for layer, (keys, values) in zip(cache.layers, before, strict=True):
                assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        return sequences

    own = run()
    with patched("gpt2_sample"):
        assert torch.equal(run(), own)
    assert contexts.count("own") in (3, 4) and contexts.count([True, True]) == 6 - contexts.count(
        "own"
    )


def test_a_cache_whose_call_failed(device):
    """It holds views of a step's buffers with room behind them; nobody else is lent these."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)

    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise ValueError("enough")

    def fail_at_once(*_):
        raise ValueError("enough")

    for way in ("in the loop", "in the context"):
        cache = DynamicCache()
        with eet_patch.enabled():
            with pytest.raises(ValueError, match="enough"):
                if way == "in the loop":
                    criteria = StoppingCriteriaList([Fails()])
                    generated(model, inputs, past_key_values=cache, stopping_criteria=criteria)
                else:
                    with pytest.MonkeyPatch.context() as patch:
                        for name in ("_first_token", "_own_first_token"):
                            patch.setattr(sample, name, fail_at_once)
                        generated(model, inputs, past_key_values=cache)
            length = cache.get_seq_length()
            assert length == (PROMPT if way == "in the loop" else 0)
            before = [layer.keys.clone() for layer in cache.layers]
            generated(model, inputs, do_sample=True)
            assert all(map(torch.equal, [x.keys for x in cache.layers], before))
            if length == 0:
                own = generated(model, inputs)
                assert torch.equal(generated(model, inputs, past_key_values=cache), own)


# --- buffers that grow ---------------------------------------------------------------------------


@pytest.fixture
def growth(monkeypatch):
    """Calls begin with room for few tokens; returns the capacities that steps grew to."""
    grown, original = [], pool.DecodeStep.grow

    def grow(step, model, capacity, moved):
        grown.append(capacity)
        original(step, model, capacity, moved)

    monkeypatch.setattr(pool.DecodeStep, "grow", grow)
    monkeypatch.setattr(pool, "GROWTH", 8)
    return grown


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(
    "settings",
    [*SETTINGS[:3], {"do_sample": True}, {"no_repeat_ngram_size": 2, "do_sample": True}],
    ids=str,
)
def test_growing(device, growth, settings, side):
    model, inputs = tiny_gpt2(device), batch_of(side, device, LENGTHS, vocab_size=500)
    own = generated(model, inputs, max_new_tokens=230, **settings)
    drawn = torch.rand(3, device=device)
    with patched("gpt2_sample"):
        assert torch.equal(generated(model, inputs, max_new_tokens=230, **settings), own)
        assert torch.equal(torch.rand(3, device=device), drawn)
        assert growth == [128, 192, 256]  # by half, in blocks of 64, and no further than needed
        # What has grown serves the next call, and a shorter one gets what it needs.
        assert torch.equal(generated(model, inputs, max_new_tokens=230, **settings), own)
        assert len(growth) == 3
        out = generated(model, inputs, max_new_tokens=20, **settings)
        assert torch.equal(out, own[:, : out.shape[1]]) and len(growth) == 3


def test_growing_for_rows_that_end(device, growth):
    """Some are dropped before, and show padding in what comes after; none needs all that it may."""
    model = tiny_gpt2(device)
    inputs = batch_of("left", device, [3 + row % 7 for row in range(16)], vocab_size=500)
    plain = generated(model, inputs, max_new_tokens=230)
    for step in (4, 90, 200):
        ends = plain[:12, PROMPT + step].unique().tolist()
        growth.clear()
        settings = {"eos_token_id": ends, "max_new_tokens": 230, "pad_token_id": 3}
        own = generated(model, inputs, **settings)
        with patched("gpt2_sample"):
            assert torch.equal(generated(model, inputs, **settings), own)
        assert not growth or growth[-1] <= own.shape[1] * 1.5 + 64


def test_a_cache_that_grew(device, growth):
    """What is returned, and a user's own cache, show what was computed before and after."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)

    def run(length):
        cache = filled_cache(model, inputs, length) if length else DynamicCache()
        generated(model, inputs, past_key_values=cache, max_new_tokens=100)
        result = generated(model, inputs, return_dict_in_generate=True, max_new_tokens=100)
        return *cache.layers, *result.past_key_values.layers

    for length in (0, 4):
        own = run(length)
        with patched("gpt2_sample"):
            out = run(length)
        for mine, theirs in zip(out, own, strict=True):
            assert_same_cache(mine.keys, theirs.keys, inputs["attention_mask"])
            assert_same_cache(mine.values, theirs.values, inputs["attention_mask"])
    assert growth


def test_beams_after_a_step_that_grew(device, growth):
    """Its buffers for beams are of another capacity then."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)
    settings = {"num_beams": 3, "max_new_tokens": 40, "num_return_sequences": 3}
    long = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    own, own_long = generated(model, inputs, **settings), generated(model, long, max_new_tokens=90)
    with patched("gpt2_sample", "gpt2_beam_search"):
        for _ in range(2):
            assert torch.equal(generated(model, inputs, **settings), own)
            assert torch.equal(generated(model, long, max_new_tokens=90), own_long)
    assert growth == [128]


def test_growing_holds_one_layer_twice(device, growth, monkeypatch):
    """Neither the host's cache nor the step keeps an old buffer."""
    model, inputs = tiny_gpt2(device, n_layer=4), batch_of("left", device, LENGTHS, vocab_size=500)
    seen, original = [], pool.DecodeStep.grow

    def grow(step, described, capacity, moved):
        layers = range(len(step.keys))
        tensors = [held[layer] for layer in layers for held in (step.keys, step.values)]
        old = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        del tensors

        def look(layer_idx):
            moved(layer_idx)
            seen.append([reference.expired() for reference in old])

        original(step, described, capacity, look)

    monkeypatch.setattr(pool.DecodeStep, "grow", grow)
    with patched("gpt2_sample"):
        generated(model, inputs, max_new_tokens=60)
    assert seen == [[True] * n + [False] * (8 - n) for n in (2, 4, 6, 8)]


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_growing_without_memory_runs_the_original(device, growth, monkeypatch, settings):
    """From the cache and the generator that the call began with; nobody is lent what is left."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)
    wanted = settings | {"max_new_tokens": 100}

    def run():
        cache = filled_cache(model, inputs, 4)
        return generated(model, inputs, past_key_values=cache, **wanted), cache.get_seq_length()

    own, own_length = run()
    longer, calls = step_module._longer, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no room")
        return longer(*arguments)

    monkeypatch.setattr(step_module, "_longer", fail)
    with eet_patch.enabled():
        out, length = run()
        assert eet_patch.report()["gpt2_sample"].fallbacks == {"out of memory": 1}
        assert torch.equal(out, own) and length == own_length
        assert eet_patch.report().memory[STEPS] == 0
        out, length = run()
        assert torch.equal(out, own) and length == own_length
        assert eet_patch.report()["gpt2_sample"].replaced == 1


# --- what is held --------------------------------------------------------------------------------


@WAYS
def test_the_report_while_a_loop_runs(device, monkeypatch, settings):
    """The host's cache and the step are told once, and as large as they are."""
    model, inputs = tiny_gpt2(device), batch_of("left", device, LENGTHS, vocab_size=500)
    told = []
    original = pool.DecodeStep.run

    def run(step, *arguments, **more):
        memory = eet_patch.report().memory
        told.append((memory[STEPS], memory[ROOM], step.nbytes()))
        original(step, *arguments, **more)

    monkeypatch.setattr(pool.DecodeStep, "run", run)
    with patched(target_of(settings)):
        generated(model, inputs, **settings)
        assert eet_patch.report().memory[ROOM] == 0
    assert told and all(steps == held and room == 0 for steps, room, held in told)
    rows = 3 * settings.get("num_beams", 1)
    cache = 2 * 2 * rows * 64 * 48 * 4  # layers, keys and values; 33 tokens take a block
    assert all(cache < steps for steps, _, _ in told)
    if device.type == "cpu":  # a GPU's scratch is larger than so small a cache
        assert all(steps < 2 * cache + 2**16 for steps, _, _ in told)


def test_peak_is_the_cache_and_a_bounded_rest(device):
    """A call's peak by torch's allocator: model, KV cache and little more. Only a GPU tells."""
    if device.type != "cuda":
        pytest.skip("torch counts no memory on a CPU")
    model = tiny_gpt2(device, n_embd=512, n_head=8, n_layer=16, n_positions=512)
    ids = token_ids(4, 500, device, vocab_size=500)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = 2 * 16 * 4 * 512 * 512 * 4  # layers, rows, positions, hidden size, bytes
    with patched("gpt2_sample"):
        generated(model, inputs, max_new_tokens=12)  # what cuBLAS takes stays; the step is freed
    with patched("gpt2_sample"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        generated(model, inputs, max_new_tokens=12)
        beyond = torch.cuda.max_memory_allocated(device) - before - cache
    # Activations of the context, of one layer at a time; a second cache would be as large.
    assert beyond < 0.75 * cache


def test_what_idles_gives_way_to_a_new_step(device, monkeypatch):
    """Idle steps and a new one together stay within the bound, at any time."""
    model = tiny_gpt2(device)
    most = []
    made = pool.DecodeStep.__init__

    def make(step, *arguments):
        made(step, *arguments)
        idle = sum(one.nbytes() for one in pool._idle.get(model, []))
        most.append((idle, sum(t.nbytes for t in (*step.keys, *step.values))))

    monkeypatch.setattr(pool.DecodeStep, "__init__", make)
    monkeypatch.setattr(pool, "IDLE_SHARE", 0.0)
    position = 2 * 2 * 4 * 48 * 4  # layers, keys and values, rows, hidden size, bytes
    with eet_patch.enabled():
        for length in (5, 60, 100, 150, 5, 230, 60):
            ids = token_ids(4, length, device, vocab_size=500)
            model.generate(ids, max_new_tokens=3, do_sample=False)
            if len(most) == 1:  # room for the first step and 150 positions more
                bytes_now = eet_patch.report().memory[STEPS] + 150 * position
                monkeypatch.setattr(pool, "IDLE_BYTES", bytes_now)
            assert eet_patch.report().memory[STEPS] <= pool.IDLE_BYTES
    assert any(idle for idle, _ in most)
    for idle, new in most:
        assert idle == 0 or idle + new <= pool.IDLE_BYTES


def test_like_calls_share_buffers_that_are_not_much_larger(device, monkeypatch):
    model = tiny_gpt2(device)
    made, original = [], pool.DecodeStep.__init__

    def make(step, described, batch_size, capacity):
        made.append(capacity)
        original(step, described, batch_size, capacity)

    monkeypatch.setattr(pool.DecodeStep, "__init__", make)
    with eet_patch.enabled():
        for length in (70, 90, 120, 65, 40, 130, 180, 20):
            ids = token_ids(2, length, device, vocab_size=500)
            model.generate(ids, max_new_tokens=5, do_sample=False)
    assert made == [128, 192, 64]


def test_no_idle_step_outlives_the_making_of_another(device, monkeypatch):
    """One whose weights have moved is freed before the next one is allocated."""
    model, inputs = tiny_gpt2(device), batch_of("none", device, LENGTHS, vocab_size=500)
    gone, original = [], pool.DecodeStep.__init__

    def make(step, *arguments):
        gone.append([reference() is None for reference in references])
        original(step, *arguments)

    references = []
    monkeypatch.setattr(pool.DecodeStep, "__init__", make)
    with eet_patch.enabled():
        generated(model, inputs)
        references = [weakref.ref(step) for step in pool._idle[model]]
        model.double().float()
        generated(model, inputs)
    assert gone == [[], [True]]


def test_idle_steps_are_freed_when_memory_runs_out(device, monkeypatch):
    """For a new step, which is then tried again; and for the original, after one."""
    model, other = tiny_gpt2(device), tiny_gpt2(device, seed=1)
    inputs = batch_of("left", device, LENGTHS, vocab_size=500)
    own = generated(model, inputs)
    original, idle = pool.DecodeStep.__init__, []

    def make(step, *arguments):
        idle.append(sum(map(len, pool._idle.values())))
        if idle[-1]:
            raise torch.OutOfMemoryError("no room")
        original(step, *arguments)

    with patched("gpt2_sample"):
        generated(other, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(pool.DecodeStep, "__init__", make)
            assert torch.equal(generated(model, inputs), own)
        assert idle == [1, 0]
    with eet_patch.enabled(), monkeypatch.context() as patch:
        generated(other, inputs)

        def no_room(*_):
            raise torch.OutOfMemoryError("no room")

        patch.setattr(sample, "decode_on_device", no_room)
        assert torch.equal(generated(model, inputs), own)
        assert eet_patch.report().memory[STEPS] == 0
