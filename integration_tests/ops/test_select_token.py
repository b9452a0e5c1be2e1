"""select_token: every processor and their combinations against transformers' own, draws against
torch.multinomial, and what a step writes.
"""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eet_patch.ops.selection import seen_tokens, select_token, select_token_workspace

INF = float("inf")
LENGTH = 6  # position of the last token
CAPACITY = 16
VOCAB_SIZES = [1, 31, 257, 50257, 262144]


def logits_of(rows, vocab_size, dtype, device, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocab_size, generator=generator)).to(device, dtype)


def noise_of(rows, vocab_size, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rows, vocab_size).exponential_(generator=generator).to(device)


def state_of(num_slots, vocab_size, device, rows=None, length=LENGTH):
    """A step's buffers: prompts of length + 1 tokens, and nothing finished."""
    rows = num_slots if rows is None else rows
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab_size, (num_slots, CAPACITY), generator=generator)
    return {
        "tokens": tokens.to(device),
        "input_ids": torch.full((rows,), -1, device=device),
        "position_ids": torch.arange(rows, device=device) + length,
        "lengths": torch.full((rows,), length, dtype=torch.int32, device=device),
        "finished": torch.zeros(num_slots, dtype=torch.bool, device=device),
        "unfinished_count": torch.tensor([num_slots], dtype=torch.int32, device=device),
    }


def chosen(logits, **options):
    """The tokens that select_token writes for these rows."""
    state = state_of(*logits.shape, logits.device)
    select_token(logits, **state, **options)
    return state["input_ids"]


def processors_of(options, device):
    """transformers' own, in the order of its generate()."""
    eos, suppressed = options.get("eos_token_ids"), options.get("suppressed_tokens")
    processors = LogitsProcessorList()
    if options.get("repetition_penalty", 1.0) != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if suppressed is not None:
        processors.append(SuppressTokensLogitsProcessor(suppressed.tolist(), device=device))
    if options.get("min_len", 0) > 0:
        processors.append(MinLengthLogitsProcessor(options["min_len"], eos.tolist(), device=device))
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in options:
            processors.append(warper(options[name]))
    return processors


def host_choice(logits, history, options):
    scores = processors_of(options, logits.device)(history, logits.float())
    if "noise" not in options:
        return scores.argmax(-1)
    return (scores.softmax(-1) / options["noise"]).argmax(-1)


def assert_chosen_as_by_host(logits, **options):
    state = state_of(*logits.shape, logits.device)
    history = state["tokens"][:, : LENGTH + 1].clone()
    expected = host_choice(logits, history, options)
    options["seen"] = seen_tokens(history, logits.shape[1])
    select_token(logits, **state, **options)
    assert state["input_ids"].tolist() == expected.tolist()


def ids(*tokens, device):
    return torch.tensor(tokens, dtype=torch.int64, device=device)


@pytest.mark.sanitize
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy(device, dtype, vocab_size):
    logits = logits_of(3, vocab_size, dtype, device)
    assert_chosen_as_by_host(logits)


SAMPLING = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_large": {"top_k": 3000},
    "top_p": {"top_p": 0.6},
    "top_p_most": {"top_p": 0.99},
    "top_p_least": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p_1": {"min_p": 1.0},
    "top_k_top_p": {"top_k": 50, "top_p": 0.8, "temperature": 0.8},
    "top_p_min_p": {"top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
}


@pytest.mark.sanitize
@pytest.mark.parametrize("vocab_size", [1, 31, 257, 50257])
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
def test_sampling(device, vocab_size, options):
    logits = logits_of(4, vocab_size, torch.float32, device)
    assert_chosen_as_by_host(logits, noise=noise_of(4, vocab_size, device), **options)


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
def test_sampling_with_the_processors_of_all_searches(device, dtype, options):
    """Rows with ties, as half precision makes them, and scores that the processors changed."""
    vocab_size = 5003
    logits = logits_of(4, vocab_size, dtype, device)
    best = logits.argmax(-1)
    assert_chosen_as_by_host(
        logits,
        noise=noise_of(4, vocab_size, device),
        repetition_penalty=1.7,
        suppressed_tokens=best[:1],
        eos_token_ids=best[1:3],
        min_len=LENGTH + 2,
        **options,
    )


@pytest.mark.parametrize("options", [{"top_k": 50, "top_p": 0.95}, {"top_p": 0.95}, {}])
def test_sampling_from_the_largest_vocabulary(device, options):
    logits = logits_of(2, 262144, torch.bfloat16, device)
    assert_chosen_as_by_host(logits, noise=noise_of(2, 262144, device), **options)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 20.0])
def test_repetition_penalty(device, dtype, penalty):
    """Seen tokens above and below zero, and the largest one among them."""
    logits = logits_of(4, 257, dtype, device)
    prompt = state_of(4, 257, device)["tokens"]
    rows = torch.arange(4, device=device)
    logits[rows, prompt[:, 0]] = 9.0
    logits[rows, prompt[:, 1]] = -9.0
    assert_chosen_as_by_host(logits, repetition_penalty=penalty)


@pytest.mark.parametrize("with_noise", [False, True])
def test_suppressed_tokens(device, dtype, with_noise):
    logits = logits_of(3, 5003, dtype, device)
    suppressed = logits[0].topk(40).indices
    options = {"noise": noise_of(3, 5003, device)} if with_noise else {}
    assert_chosen_as_by_host(logits, suppressed_tokens=suppressed, **options)
    token = chosen(logits, suppressed_tokens=suppressed, **options)[0]
    assert token not in suppressed


@pytest.mark.parametrize("kept", [0, 4095, 4096, 5002])
@pytest.mark.parametrize(
    "options", [None, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "min_p": 1.0}]
)
def test_all_but_one_suppressed(device, kept, options):
    logits = logits_of(2, 5003, torch.float32, device)
    others = torch.arange(5003, device=device)
    others = others[others != kept]
    if options is not None:
        options = {"noise": noise_of(2, 5003, device), **options}
    assert chosen(logits, suppressed_tokens=others, **(options or {})).tolist() == [kept, kept]


def test_ids_outside_the_vocabulary_are_ignored(device):
    logits = logits_of(2, 31, torch.float32, device)
    far = ids(31, 4096, -1, 1 << 40, device=device)
    expected = logits.argmax(-1).tolist()
    assert chosen(logits, suppressed_tokens=far, eos_token_ids=far, min_len=99).tolist() == expected


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_min_len(device, ahead):
    """eos is suppressed while the sequence, without the new token, is shorter."""
    logits = logits_of(2, 257, torch.float32, device)
    eos = logits.argmax(-1)
    options = {"eos_token_ids": eos, "min_len": LENGTH + ahead}
    assert_chosen_as_by_host(logits, **options)
    assert (chosen(logits, **options) == eos).all() == (ahead <= 1)


def test_min_len_by_row(device):
    logits = logits_of(2, 257, torch.float32, device)[:1].repeat(2, 1)
    best = logits[0].topk(2).indices
    state = state_of(2, 257, device)
    state["lengths"][1] -= 1
    select_token(logits, **state, eos_token_ids=best[:1].clone(), min_len=LENGTH + 1)
    assert state["input_ids"].tolist() == best.tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.7, "temperature": 0.9}])
def test_draws_of_multinomial(device, options):
    """Noise of a seeded generator gives the tokens, and leaves the state, of torch.multinomial."""
    vocab_size, seed = 1009, 5
    for step in range(20):
        logits = logits_of(4, vocab_size, torch.float32, device, seed=step)
        theirs = torch.Generator(device).manual_seed(seed + step)
        ours = torch.Generator(device).manual_seed(seed + step)
        scores = processors_of(options, device)(None, logits)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=theirs).squeeze(1)
        noise = torch.empty(4, vocab_size, device=device).exponential_(generator=ours)
        assert chosen(logits, noise=noise, **options).tolist() == drawn.tolist()
        assert torch.equal(theirs.get_state(), ours.get_state())


def test_draws_follow_the_distribution(device):
    """Over many draws tokens come as often as softmax says, within 5 standard deviations."""
    rows, logits = 20000, torch.tensor([2.0, 0.0, 1.0, -INF, 0.5], device=device)
    noise = noise_of(rows, 5, device)
    counts = chosen(logits.repeat(rows, 1), noise=noise).bincount(minlength=5)
    probs = logits.softmax(-1)
    deviation = (rows * probs * (1 - probs)).sqrt()
    assert ((counts - rows * probs).abs() <= 5 * deviation).all()


# --- ties and what is not finite -----------------------------------------------------------------


def only(token, vocab_size, device, rows=1):
    """Noise by which any token that has a probability loses to this one, if it has one."""
    noise = torch.full((rows, vocab_size), 1e6, device=device)
    noise[:, token] = 1e-6
    return noise


@pytest.mark.parametrize("vocab_size", [31, 5003, 50257])
def test_greedy_takes_the_lowest_of_equal_scores(device, dtype, vocab_size):
    logits = torch.zeros(2, vocab_size, dtype=dtype, device=device)
    assert chosen(logits).tolist() == [0, 0]
    logits[:, [vocab_size - 2, vocab_size - 5]] = 1.0
    assert chosen(logits).tolist() == [vocab_size - 5] * 2


def test_minus_zero_is_zero(device):
    logits = torch.tensor([[-0.0, 0.0, -1.0], [-1.0, 0.0, -0.0]], device=device)
    assert chosen(logits).tolist() == [0, 1]


@pytest.mark.parametrize("vocab_size", [100, 50257])
def test_top_k_keeps_the_ties_of_the_last(device, vocab_size):
    logits = torch.zeros(1, vocab_size, device=device)
    logits[0, 3] = 2.0
    logits[0, 10:90] = 1.0
    for token in (3, 10, 50, 89):
        assert chosen(logits, noise=only(token, vocab_size, device), top_k=2).item() == token
    for token in (2, 90):
        assert chosen(logits, noise=only(token, vocab_size, device), top_k=2).item() != token


@pytest.mark.parametrize("vocab_size", [100, 50257])
@pytest.mark.parametrize("top_k", [0, 80])
def test_top_p_removes_the_lower_of_equal_tokens(device, vocab_size, top_k):
    """80 equal tokens hold all of the probability: half of them stay, those of higher number."""
    logits = torch.full((1, vocab_size), -INF, device=device)
    logits[0, 10:90] = 1.0
    options = {"top_p": 0.503, "top_k": top_k}
    for token in (49, 50, 89):
        assert chosen(logits, noise=only(token, vocab_size, device), **options).item() == token
    for token in (10, 48):
        assert chosen(logits, noise=only(token, vocab_size, device), **options).item() != token


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_p_of_a_row_of_equal_scores(device, top_k):
    """More ties than the kernel's list of candidates holds."""
    vocab_size = 50257
    logits = torch.full((1, vocab_size), 0.25, device=device)
    first_kept = vocab_size - int(vocab_size * 0.4001)
    for token in (vocab_size - 1, first_kept + 20):
        noise = only(token, vocab_size, device)
        assert chosen(logits, noise=noise, top_p=0.4, top_k=top_k).item() == token
    for token in (0, first_kept - 20):
        noise = only(token, vocab_size, device)
        assert chosen(logits, noise=noise, top_p=0.4, top_k=top_k).item() != token


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
@pytest.mark.parametrize("top_k", [0, 9])
def test_top_p_keeps_the_largest(device, top_p, top_k):
    logits = logits_of(3, 257, torch.float32, device)
    options = {"noise": noise_of(3, 257, device), "top_p": top_p, "top_k": top_k}
    assert chosen(logits, **options).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
def test_minus_infinity_is_never_drawn(device, options):
    logits = logits_of(2, 5003, torch.float32, device)
    logits[:, ::2] = -INF
    token = torch.tensor([4], device=device)
    assert chosen(logits, noise=only(token, 5003, device, 2), **options).remainder(2).all()


@pytest.mark.parametrize("options", [None, *SAMPLING.values()], ids=["greedy", *SAMPLING.keys()])
def test_rows_without_a_distribution(device, dtype, options):
    """NaN is above all, as in torch.argmax; and one such row does not change the next."""
    logits = logits_of(5, 5003, dtype, device)
    logits[0, [4500, 700]] = float("nan")
    logits[1] = -INF
    logits[2, [4096, 4200]] = INF
    logits[3] = float("nan")
    if options is not None:
        options = {"noise": noise_of(5, 5003, device), **options}
    tokens = chosen(logits, **(options or {}))
    assert tokens[:4].tolist() == [700, 0, 4096, 0]
    if options is not None:
        options["noise"] = options["noise"][4:]
    expected = host_choice(logits[4:], None, options or {})
    assert tokens[4:].tolist() == expected.tolist()


# --- the state -----------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("options", [None, {}, {"top_k": 5}, {"top_p": 0.9}])
@pytest.mark.parametrize("finished_dtype", [torch.bool, torch.uint8])
def test_state(device, options, finished_dtype):
    """Slots in another order than rows, lengths that differ, a finished row, two eos tokens."""
    num_slots, rows, vocab_size, pad = 6, 4, 257, 11
    slots = torch.tensor([4, 0, 5, 2], dtype=torch.int32, device=device)
    logits = torch.full((rows, vocab_size), -INF, device=device)
    wanted = [31, 32, 200, 63]
    for row, token in enumerate(wanted):
        logits[row, token] = 1.0
    state = state_of(num_slots, vocab_size, device, rows)
    state["finished"] = state["finished"].to(finished_dtype)
    state["lengths"].copy_(torch.tensor([6, 3, 14, 0]))
    state["finished"][[0, 3]] = 1
    state["unfinished_count"].fill_(4)
    seen = torch.zeros(num_slots, 9, dtype=torch.int32, device=device)
    before = {name: value.clone() for name, value in state.items()}
    if options is not None:
        options = {"noise": noise_of(num_slots, vocab_size, device), **options}
    select_token(
        logits,
        **state,
        slots=slots,
        seen=seen,
        eos_token_ids=ids(63, 200, device=device),
        pad_token_id=pad,
        **(options or {}),
    )
    written = [31, pad, 200, 63]
    assert state["input_ids"].tolist() == written
    expected = before["tokens"].clone()
    for slot, position, token in zip([4, 0, 5, 2], [7, 4, 15, 1], written, strict=True):
        expected[slot, position] = token
    assert torch.equal(state["tokens"], expected)
    assert torch.equal(state["position_ids"], before["position_ids"] + 1)
    assert torch.equal(state["lengths"], before["lengths"] + 1)
    assert state["finished"].tolist() == [1, 0, 1, 1, 0, 1]
    assert state["unfinished_count"].item() == 2
    bits = torch.zeros(num_slots, vocab_size, dtype=torch.bool)
    bits[[4, 5, 2], [31, 200, 63]] = True
    assert torch.equal(unpacked(seen, vocab_size), bits)


def unpacked(seen, vocab_size):
    words = seen.cpu().long()
    return torch.stack([words[:, t // 32] >> t % 32 & 1 for t in range(vocab_size)], 1).bool()


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 257])
def test_seen_tokens(device, vocab_size):
    token_ids = torch.randint(0, vocab_size, (3, 40)).to(device)
    expected = torch.zeros(3, vocab_size, dtype=torch.bool).scatter_(1, token_ids.cpu(), True)
    seen = seen_tokens(token_ids, vocab_size)
    assert seen.dtype == torch.int32 and seen.device == token_ids.device
    assert torch.equal(unpacked(seen, vocab_size), expected)


def test_noise_and_seen_are_taken_by_slot(device):
    vocab_size = 257
    logits = logits_of(1, vocab_size, torch.float32, device).repeat(2, 1)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    noise = only(5, vocab_size, device, rows=3)
    noise[2] = only(9, vocab_size, device)[0]
    state = state_of(3, vocab_size, device, rows=2)
    select_token(logits, **state, slots=slots, noise=noise)
    assert state["input_ids"].tolist() == [9, 5]

    best = logits[0].topk(2).indices
    seen = seen_tokens(torch.stack([best[:1], best[:1] * 0, best[:1] * 0]), vocab_size)
    state = state_of(3, vocab_size, device, rows=2)
    select_token(logits, **state, slots=slots, seen=seen, repetition_penalty=50.0)
    assert state["input_ids"].tolist() == best.tolist()


WAYS = [{}, {"top_k": 3}, {"top_k": 3000}, {"top_p": 0.9}, {"temperature": 0.5}]


def test_steps_in_one_workspace(device):
    """Ways that leave different things in the workspace, in turn, and fewer rows from step to step;
    seen tokens add up.
    """
    vocab_size, rows = 5003, 5
    workspace = select_token_workspace(torch.empty(rows, vocab_size, device=device))
    state = state_of(rows, vocab_size, device, length=0)
    history = state["tokens"][:, :1].clone()
    seen = seen_tokens(history, vocab_size)
    step = 0
    for live in (5, 3, 3):
        for way in (None, *WAYS)[: CAPACITY // 4]:
            logits = logits_of(rows, vocab_size, torch.float32, device, scale=0.5, seed=step)
            noise = noise_of(rows, vocab_size, device, seed=step)
            options = {} if way is None else {"noise": noise, **way}
            taken = {
                name: value[:live] if name in ("input_ids", "position_ids", "lengths") else value
                for name, value in state.items()
            }
            select_token(
                logits[:live],
                **taken,
                seen=seen,
                repetition_penalty=3.0,
                workspace=workspace,
                **options,
            )
            if way is not None:
                options["noise"] = noise[:live]
            options["repetition_penalty"] = 3.0
            expected = host_choice(logits[:live], history[:live], options)
            assert state["input_ids"][:live].tolist() == expected.tolist(), f"step {step}"
            new = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            new[:live, 0] = expected
            new[live:] = history[live:, :1]
            history = torch.cat([history, new], 1)
            step += 1
    assert torch.equal(state["tokens"][:3, : step + 1], history[:3])


def test_again_gives_the_same(device):
    logits = logits_of(3, 50257, torch.float16, device, scale=0.1)
    for way in WAYS:
        options = {"noise": noise_of(3, 50257, device), **way}
        first = chosen(logits, **options).tolist()
        assert all(chosen(logits, **options).tolist() == first for _ in range(5))


@pytest.mark.parametrize("options", [None, {"top_k": 9}, {"top_p": 0.9}])
def test_strided_rows(device, dtype, options):
    """Rows that lie in a larger buffer and start at any address, with larger logits around them."""
    buffer = torch.full((4, 1021), 50.0, dtype=dtype, device=device)
    logits = buffer[1:, 3:1000]
    logits.copy_(logits_of(3, 997, dtype, device))
    if options is not None:
        options = {"noise": noise_of(3, 997, device), **options}
    expected = host_choice(logits, None, options or {})
    assert chosen(logits, **(options or {})).tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [0, 1024])
@pytest.mark.parametrize("options", [None, {"top_k": 3}, {"top_p": 0.5}])
def test_numbers_of_rows(device, rows, options):
    logits = logits_of(rows, 65, torch.float32, device)
    if options is not None:
        options = {"noise": noise_of(rows, 65, device), **options}
    expected = host_choice(logits, None, options or {}) if rows else logits[:, 0]
    assert chosen(logits, **(options or {})).tolist() == expected.tolist()


def test_captured_steps(device):
    """A graph of one step, replayed, goes on from step to step."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    logits = logits_of(3, 50257, torch.float16, device)
    for way in (None, *WAYS):
        options = {} if way is None else {"noise": noise_of(3, 50257, device), **way}
        options |= {"seen": torch.zeros(3, 1571, dtype=torch.int32, device=device)}
        options |= {"repetition_penalty": 5.0, "workspace": select_token_workspace(logits)}
        runs = []
        for captured in (False, True):
            options["seen"].zero_()
            state = state_of(3, 50257, device)
            graph = torch.cuda.CUDAGraph()
            if captured:
                with torch.cuda.graph(graph):
                    select_token(logits, **state, **options)
            for _ in range(5):
                graph.replay() if captured else select_token(logits, **state, **options)
            runs.append(state)
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0]), way


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor"),
        ({"logits": torch.zeros(2, 40).double()}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(40)}, ValueError, "logits must have 2 dimensions"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have a vocabulary"),
        ({"logits": torch.zeros(40, 2).t()}, ValueError, "logits must have contiguous rows"),
        ({"tokens": torch.zeros(2, 16)}, TypeError, "tokens must have dtype torch.int64"),
        ({"tokens": torch.zeros(16).long()}, ValueError, "tokens must have 2 dimensions"),
        ({"tokens": torch.zeros(16, 2).long().t()}, ValueError, "tokens must have contiguous"),
        ({"tokens": torch.zeros(1, 16).long()}, ValueError, "tokens must have at least 2 rows"),
        ({"input_ids": torch.zeros(2, 1).long()}, ValueError, r"input_ids must have shape \(2,\)"),
        ({"input_ids": torch.zeros(2).int()}, TypeError, "input_ids must have dtype"),
        ({"position_ids": torch.zeros(3).long()}, ValueError, "position_ids must have shape"),
        ({"position_ids": torch.zeros(4).long()[::2]}, ValueError, "position_ids must be contig"),
        ({"lengths": torch.zeros(2).long()}, TypeError, "lengths must have dtype torch.int32"),
        ({"lengths": torch.zeros(2).int().to("meta")}, ValueError, "lengths must be on cpu"),
        ({"finished": torch.zeros(2).int()}, TypeError, "finished must have dtype torch.bool or"),
        ({"finished": torch.zeros(3).bool()}, ValueError, r"finished must have shape \(2,\)"),
        ({"unfinished_count": torch.tensor(2).int()}, ValueError, "unfinished_count must have sh"),
        ({"slots": torch.zeros(2).long()}, TypeError, "slots must have dtype torch.int32"),
        ({"slots": torch.zeros(3).int()}, ValueError, r"slots must have shape \(2,\)"),
        ({"seen": torch.zeros(2, 1).int()}, ValueError, r"seen must have shape \(2, 2\)"),
        ({"seen": torch.zeros(2, 40).bool()}, TypeError, "seen must have dtype torch.int32"),
        ({"repetition_penalty": 1.2}, ValueError, "seen must be given with repetition_penalty"),
        ({"repetition_penalty": 0.0}, ValueError, "seen must be given|repetition_penalty must be"),
        ({"eos_token_ids": torch.zeros(1).int()}, TypeError, "eos_token_ids must have dtype"),
        ({"eos_token_ids": torch.tensor(1)}, ValueError, "eos_token_ids must have 1 dim"),
        ({"suppressed_tokens": [1]}, TypeError, "suppressed_tokens must be a torch.Tensor"),
        ({"noise": torch.ones(2, 39)}, ValueError, r"noise must have shape \(2, 40\)"),
        ({"noise": torch.ones(2, 40).half()}, TypeError, "noise must have dtype torch.float32"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0"),
        ({"min_len": -1}, ValueError, "min_len must be at least 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be above 0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \[0, 1\]"),
        ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\]"),
        ({"workspace": torch.zeros(8)}, TypeError, "workspace must have dtype torch.uint8"),
    ],
)
def test_select_token_refuses(change, error, message):
    given = {"logits": torch.zeros(2, 40)} | state_of(2, 40, "cpu") | change
    before = given["tokens"].clone()
    with pytest.raises(error, match=message):
        select_token(**given)
    assert torch.equal(given["tokens"], before)


def test_select_token_refuses_a_penalty_that_is_not_above_0():
    given = {"logits": torch.zeros(2, 40)} | state_of(2, 40, "cpu")
    seen = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="repetition_penalty must be above 0, got -1"):
        select_token(**given, seen=seen, repetition_penalty=-1.0)


def test_select_token_refuses_a_small_workspace(device):
    if device.type != "cuda":
        pytest.skip("the CPU needs no workspace")
    logits = torch.zeros(2, 40, device=device)
    small = torch.zeros(256, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="select_token: these sizes are not supported"):
        select_token(logits, **state_of(2, 40, device), workspace=small)
