"""Random calls from several threads on one model: no wrong token, no leak, no deadlock.

Environment:
    EET_TEST_CALLS      calls of the stress test; default: 1000 on a GPU, 80 on a CPU
    EET_TEST_SECONDS    after which threads that still run count as deadlocked; default: 240
"""

import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
from helpers import batch_of, patched, tiny_gpt2
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import eet_patch
from eet_patch.generation import pool, step
from eet_patch.ops.decode import Graph

NUM_THREADS = 4
KINDS = 48  # different calls; each thread makes them in an order of its own
# Of the GPU, not by torch's allocator: graphs, kernels. Those of one round of calls may differ
# from those of the next, but they must not grow with the calls.
OUTSIDE_BYTES = 256 * 2**20


def random_call(model, number):
    """Inputs and settings of a call whose answer no generator changes."""
    pick = random.Random(number)
    lengths = [pick.choice((1, 3, 8, 17, 30)) for _ in range(pick.choice((1, 2, 4, 7, 12)))]
    inputs = batch_of(pick.choice(("none", "left")), model.device, lengths, vocab_size=500)
    settings = {
        "max_new_tokens": pick.choice((2, 3, 9, 20, 33)),
        "do_sample": False,
        "pad_token_id": 0,
        "repetition_penalty": pick.choice((1.0, 1.2)),
        "eos_token_id": pick.choice((None, [3, 50, 77], list(range(10, 60)))),
        "min_new_tokens": pick.choice((None, 4)),
        "suppress_tokens": pick.choice((None, [5, 17])),
        "no_repeat_ngram_size": pick.choice((0, 0, 0, 2)),  # the host's own processor
    }
    way = pick.choice(("greedy", "greedy", "greedy", "beams", "one of one"))
    if way == "beams":
        settings |= {"num_beams": pick.choice((2, 4)), "no_repeat_ngram_size": 0}
    elif way == "one of one":  # draws from the generator that all threads share, and can't differ
        settings |= {"do_sample": True, "top_k": 1}
    cache = pick.choice(("none", "none", "dynamic", "static", "continued"))
    if way == "beams" or cache == "static":
        settings["disable_compile"] = True
    if way == "beams":
        cache = "none"
    return inputs, settings, cache


def make_call(model, call):
    inputs, settings, cache = call
    if cache == "dynamic":
        settings = settings | {"past_key_values": DynamicCache(config=model.config)}
    elif cache == "static":
        length = inputs["input_ids"].shape[1] + settings["max_new_tokens"]
        static = StaticCache(config=model.config, max_cache_len=length)
        settings = settings | {"past_key_values": static}
    if cache != "continued":
        return model.generate(**inputs, **settings)
    first = model.generate(**inputs, **settings | {"return_dict_in_generate": True})
    sequences, past = first.sequences, first.past_key_values
    mask = inputs["attention_mask"]
    more = mask.new_ones(mask.shape[0], sequences.shape[1] - mask.shape[1])
    return model.generate(
        sequences,
        attention_mask=torch.cat([mask, more], 1),
        past_key_values=past,
        **settings | {"min_new_tokens": None, "max_new_tokens": 5},
    )


def alive(kind):
    """Objects of exactly this type that something still holds."""
    return sum(type(thing) is kind for thing in gc.get_objects())


def memory(device):
    """Bytes that torch's allocator lends out, and bytes of the GPU that are not torch's."""
    gc.collect()
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # one a thread and stream, whoever makes products
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), total - free - torch.cuda.memory_reserved(device)


def run_in_threads(model, calls, expected, count, seconds):
    """`count` calls from NUM_THREADS threads; returns what went wrong."""
    wrong = []
    numbers = iter(range(count))
    lock = threading.Lock()

    def work(index):
        order = random.Random(1000 + index)
        while not wrong:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            kind = order.randrange(len(calls))
            try:
                out = make_call(model, calls[kind])
            except Exception as error:
                wrong.append(f"call {number} of kind {kind} raised {error!r}: {calls[kind][1:]}")
                return
            if not torch.equal(out, expected[kind]):
                wrong.append(f"call {number} of kind {kind} is wrong: {calls[kind][1:]}")

    threads = [
        threading.Thread(target=work, args=(index,), daemon=True) for index in range(NUM_THREADS)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(file=sys.__stderr__)
        wrong.append(f"threads still ran after {seconds:.0f} s; their stacks are on stderr")
    return wrong


def test_random_calls_from_threads(device):
    count = int(os.environ.get("EET_TEST_CALLS", 1000 if device.type == "cuda" else 80))
    seconds = float(os.environ.get("EET_TEST_SECONDS", 240))
    model = tiny_gpt2(device)
    calls = [random_call(model, number) for number in range(KINDS)]
    expected = [make_call(model, call) for call in calls]
    steps_before, graphs_before = alive(step.DecodeStep), alive(Graph)
    allocated_before, _ = memory(device)
    with patched():
        # Half of the calls first: kernels are loaded, idle steps are as many as there may be.
        assert run_in_threads(model, calls, expected, count // 2, seconds) == []
        allocated_then, outside_then = memory(device)
        assert run_in_threads(model, calls, expected, count - count // 2, seconds) == []
        allocated, outside = memory(device)
        report = eet_patch.report()
        assert report["gpt2_sample"].replaced > count / 4
        assert report["gpt2_beam_search"].replaced > 0
        assert "out of memory" not in report["gpt2_sample"].fallbacks
        # Idle steps are bounded, whatever was called.
        assert not pool._lent and len(pool._idle[model]) <= pool.MAX_IDLE
        assert alive(step.DecodeStep) - steps_before <= pool.MAX_IDLE
        assert alive(Graph) - graphs_before <= pool.MAX_IDLE * step.MAX_GRAPHS
        held = sum(report.memory.values())
        assert held <= pool.IDLE_BYTES
        assert allocated - allocated_before <= 2 * held + 2**20
        assert outside - outside_then <= OUTSIDE_BYTES
    assert alive(step.DecodeStep) == steps_before and alive(Graph) == graphs_before
    assert sum(eet_patch.report().memory.values()) == 0
    assert memory(device)[0] - allocated_before <= 2**20
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- out of memory -------------------------------------------------------------------------------


def enough_for_the_host_alone(device):
    """A call that may make very many tokens and ends after a few: the loop's buffers, which begin
    with room for hundreds, need far more memory than the host, whose cache grows.
    """
    model = tiny_gpt2(device, n_positions=16384, n_embd=512, n_head=8)
    inputs = batch_of("left", device, [3 + row % 7 for row in range(48)], vocab_size=500)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ends = plain[:, inputs["input_ids"].shape[1] + 5].unique().tolist()
    settings = {"max_new_tokens": 16000, "eos_token_id": ends, "do_sample": False}
    return model, inputs, settings | {"pad_token_id": 0}


def no_room(*_, **__):
    raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("cache", [None, "the user's", "filled"])
@pytest.mark.parametrize(
    ("settings", "target", "place"),
    [
        ({}, "gpt2_sample", "own_context"),
        ({"no_repeat_ngram_size": 2}, "gpt2_sample", "_take_cache"),
        ({}, "gpt2_sample", "decode_on_device"),
        ({"do_sample": True}, "gpt2_sample", "decode_on_device"),
        ({"do_sample": True, "no_repeat_ngram_size": 2}, "gpt2_sample", "decode_with_host"),
        ({"num_beams": 3}, "gpt2_beam_search", "_take_context"),
        ({"num_beams": 3}, "gpt2_beam_search", "search"),
    ],
    ids=str,
)
def test_out_of_memory_on_the_way(device, monkeypatch, settings, target, place, cache):
    """The original runs the whole call, from the cache and the generator that it began with."""
    if cache is not None and "num_beams" in settings:
        pytest.skip("a beam search from the user's cache is the original's anyway")
    if cache is not None and place == "own_context":
        pytest.skip("the context of the user's cache is the host's, where there is padding")
    model = tiny_gpt2(device)
    inputs = batch_of("left", device, (9, 5, 7), vocab_size=500)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | settings

    def run():
        past = None if cache is None else DynamicCache(config=model.config)
        if cache == "filled":
            shorter = {name: value[:, :-2] for name, value in inputs.items()}
            positions = (shorter["attention_mask"].cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                model(**shorter, position_ids=positions, past_key_values=past, use_cache=True)
        torch.manual_seed(3)
        tokens = model.generate(**inputs, **settings, past_key_values=past)
        drawn = torch.rand(4, device=device)  # from where the generator is then
        return tokens, drawn, past and past.get_seq_length()

    own, own_drawn, own_length = run()
    module = "beam_search" if target == "gpt2_beam_search" else "sample"
    monkeypatch.setattr(f"eet_patch.adapters.{module}.{place}", no_room)
    with eet_patch.enabled():
        out, drawn, length = run()
        assert eet_patch.report()[target].fallbacks == {"out of memory": 1}
    assert torch.equal(out, own) and torch.equal(drawn, own_drawn) and length == own_length


def test_out_of_memory_behind_a_streamer_is_raised(device, monkeypatch):
    """What a streamer has got can't be taken back: nothing must come twice."""
    model, got = tiny_gpt2(device), []

    class Streamer(BaseStreamer):
        def put(self, value):
            got.append(value)

        def end(self):
            pass

    monkeypatch.setattr("eet_patch.adapters.sample.decode_on_device", no_room)
    inputs = batch_of("none", device, (9,), vocab_size=500)
    with eet_patch.enabled(), pytest.raises(torch.OutOfMemoryError, match="no room"):
        model.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=Streamer())
    assert len(got) == 2  # the prompt and one token


def test_a_kernel_without_memory_runs_the_original(device, monkeypatch):
    """Kernels are loaded at their first launch, which may fail for want of memory."""
    model = tiny_gpt2(device)
    inputs = batch_of("left", device, (9, 5, 7), vocab_size=500)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    own = model.generate(**inputs, **settings)
    launch, launches = step.DecodeStep._launch, []

    def fail_at_third(*arguments):
        launches.append(1)
        if len(launches) == 3:
            raise RuntimeError("CUDA error 2 (cudaErrorMemoryAllocation): out of memory")
        launch(*arguments)

    monkeypatch.setattr(step.DecodeStep, "_launch", fail_at_third)
    made = step.DecodeStep.__init__

    def without_graphs(self, *arguments):
        made(self, *arguments)
        self._graphs_work = False

    monkeypatch.setattr(step.DecodeStep, "__init__", without_graphs)
    with eet_patch.enabled():
        assert torch.equal(model.generate(**inputs, **settings), own)
        assert eet_patch.report()["gpt2_sample"].fallbacks == {"out of memory": 1}


def test_buffers_that_find_no_memory(device):
    """torch's allocator refuses what the loop asks for: the original runs, and the report tells."""
    if device.type != "cuda":
        pytest.skip("torch has no limit on a CPU's memory")
    model, inputs, settings = enough_for_the_host_alone(device)
    own = model.generate(**inputs, **settings)
    memory(device)
    total = torch.cuda.get_device_properties(device).total_memory
    room = torch.cuda.memory_reserved(device) + 128 * 2**20  # the buffers are 226 MB
    with eet_patch.enabled():
        torch.cuda.set_per_process_memory_fraction(room / total, device)
        try:
            assert torch.equal(model.generate(**inputs, **settings), own)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        row = eet_patch.report()["gpt2_sample"]
        assert row.fallbacks == {"out of memory": 1} and row.replaced == 0
        assert sum(eet_patch.report().memory.values()) == 0  # what was taken is free again
        assert torch.equal(model.generate(**inputs, **settings), own)
        assert eet_patch.report()["gpt2_sample"].replaced == 1


@contextlib.contextmanager
def no_memory_of_the_driver():
    """Takes all that the driver would still give. Torch keeps the blocks that it has."""
    driver = ctypes.CDLL("libcuda.so.1")
    taken, size = [], 2**36
    while size >= 4096:
        address = ctypes.c_uint64()
        if driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0:
            taken.append(address)
        else:
            size //= 2
    try:
        yield
    finally:
        for address in taken:
            driver.cuMemFree_v2(address)


def test_capture_without_memory(device):
    """A graph that the driver has no memory for: the steps run without it, or the original does,
    and somebody says so.
    """
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    model = tiny_gpt2(device)
    inputs = batch_of("left", device, (9, 5, 7, 3, 8), vocab_size=500)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    own = model.generate(**inputs, **settings)
    with eet_patch.enabled():  # torch has blocks for this call from now on, the driver the kernels
        assert torch.equal(model.generate(**inputs, **settings), own)
    before = alive(Graph)
    with eet_patch.enabled(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with no_memory_of_the_driver():
            out = model.generate(**inputs, **settings)
        assert torch.equal(out, own)
        row = eet_patch.report()["gpt2_sample"]
        told = [str(one.message) for one in said if "eet_patch could not" in str(one.message)]
        captured = alive(Graph) > before
        assert captured or told or row.fallbacks == {"out of memory": 1}
        assert torch.equal(model.generate(**inputs, **settings), own)


@pytest.mark.parametrize("method", ["__enter__", "__exit__", "replay"])
def test_a_graph_that_fails_says_so(device, monkeypatch, method):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    model = tiny_gpt2(device)
    inputs = batch_of("left", device, (9, 5, 7), vocab_size=500)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    own = model.generate(**inputs, **settings)
    original = getattr(Graph, method)

    def fail(graph, *arguments):
        if method == "__exit__":  # the stream must not stay in capture
            original(graph, *arguments)
        raise RuntimeError("CUDA error 2 (cudaErrorMemoryAllocation): out of memory")

    monkeypatch.setattr(Graph, method, fail)
    with patched("gpt2_sample"), pytest.warns(UserWarning, match="could not .* out of memory"):
        assert torch.equal(model.generate(**inputs, **settings), own)
