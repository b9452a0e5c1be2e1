"""Promise 1 over many prompts: greedy search, beams and seeded sampling against the unpatched
model, in every dtype, on a GPU with a model of GPT-2 small's size.

Environment:
    EET_TEST_PROMPTS    prompts of each test; default: 200 on a GPU, 24 on a CPU with a tiny model
"""

import functools
import math
import os

import torch
from helpers import batch_of, in_double, patched, tiny_gpt2
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eet_patch.testing import MAX_ERROR_RATIO

BATCH, BEAM_BATCH, BEAMS = 40, 16, 4
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


@functools.lru_cache(maxsize=1)
def models(device, dtype):
    """The model, and the same weights in float64."""
    if device.type == "cpu":
        model = tiny_gpt2(device, dtype)
    else:
        sizes = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
        # At this size a tied head, and positions of helpers' weight, repeat few tokens for ever.
        model = tiny_gpt2(device, dtype, tie_word_embeddings=False, **sizes)
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(6.0)
    return model, in_double(model)


def batches(device, vocab_size, size):
    """Left-padded batches of prompts of mixed length."""
    left = int(os.environ.get("EET_TEST_PROMPTS", 200 if device.type == "cuda" else 24))
    seed = 0
    while left > 0:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 60, (min(size, left),), generator=generator).tolist()
        yield seed, batch_of("left", device, lengths, vocab_size=vocab_size)
        left, seed = left - size, seed + 1


def new_tokens(device):
    return 24 if device.type == "cuda" else 12


def run(model, inputs, seed, **settings):
    """Tokens, and where the generator is then."""
    torch.manual_seed(seed)
    wanted = {"max_new_tokens": new_tokens(model.device), "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**inputs, **wanted | settings)
    on_gpu = model.device.type == "cuda"
    return tokens, torch.cuda.get_rng_state(model.device) if on_gpu else torch.get_rng_state()


def forward(model, tokens, mask):
    """Logits (batch, length, vocab) of left-padded rows whose new tokens are all real."""
    more = mask.new_ones(mask.shape[0], tokens.shape[1] - mask.shape[1])
    mask = torch.cat([mask, more], 1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(tokens, attention_mask=mask, position_ids=positions).logits


def partings(own, out):
    """(row, position) of the first difference of each row that has one."""
    different = own != out
    rows = different.any(1).nonzero()[:, 0].tolist()
    return [(row, int(different[row].int().argmax())) for row in rows]


def at_parting(pair, inputs, own, row, position):
    """The unpatched model's logits there, and how far two runs may stand apart in one of them."""
    model, double = pair
    prefix, mask = own[row : row + 1, :position], inputs["attention_mask"][row : row + 1]
    logits = forward(model, prefix, mask)[0, -1].double()
    error = (logits - forward(double, prefix, mask)[0, -1]).abs().max().item()
    return logits, (1 + MAX_ERROR_RATIO) * error


def assert_most_equal(equal, total, dtype):
    """In fp32 a near tie is rare; in half precision each one is judged, and there may be many."""
    assert total and (dtype != torch.float32 or equal >= 0.95 * total), f"{equal} of {total} equal"


def test_greedy(device, dtype):
    pair = models(device, dtype)
    model, equal, total = pair[0], 0, 0
    for seed, inputs in batches(device, model.config.vocab_size, BATCH):
        own, _ = run(model, inputs, seed)
        width = inputs["input_ids"].shape[1]
        assert len(own[:, width:].unique()) > new_tokens(device), "tokens that repeat show little"
        with patched("gpt2_sample"):
            out, _ = run(model, inputs, seed)
        assert own.shape == out.shape
        parted = partings(own, out)
        equal, total = equal + len(own) - len(parted), total + len(own)
        for row, position in parted:
            logits, apart = at_parting(pair, inputs, own, row, position)
            theirs, ours = own[row, position], out[row, position]
            gap = float(logits.max() - torch.minimum(logits[theirs], logits[ours]))
            assert gap <= 2 * apart, (
                f"batch {seed}, row {row}: parts at {position} by {gap:.2e}, {apart:.2e} allowed"
            )
    assert_most_equal(equal, total, dtype)


def test_sampling(device, dtype):
    """The generator too. Tokens may part where the two best, or one and the cut of top-k or top-p,
    are closer than rounding; `multinomial` takes the largest of p / noise, which is drawn again
    here.
    """
    pair = models(device, dtype)
    model, equal, total = pair[0], 0, 0
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)]
    )
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
    tokens_seen = set()
    for seed, inputs in batches(device, model.config.vocab_size, BATCH):
        own, own_state = run(model, inputs, seed, **settings)
        with patched("gpt2_sample"):
            out, state = run(model, inputs, seed, **settings)
        assert torch.equal(state, own_state), "the generator is elsewhere"
        tokens_seen.update(out[:, -1].tolist())
        parted = partings(own, out)
        equal, total = equal + len(own) - len(parted), total + len(own)
        width = inputs["input_ids"].shape[1]
        torch.manual_seed(seed)
        noise = []
        for _ in range(max((position - width + 1 for _, position in parted), default=0)):
            noise.append(torch.empty(len(own), model.config.vocab_size, device=device))
            noise[-1].exponential_()
        for row, position in parted:
            logits, apart = at_parting(pair, inputs, own, row, position)
            scores = warpers(own[row : row + 1, :position], logits[None].clone())[0]
            chance = scores.log_softmax(-1) - noise[position - width][row].double().log()
            theirs, ours = own[row, position], out[row, position]
            far = float((chance[theirs] - chance[ours]).abs())
            cut = distance_to_cut(logits, (theirs, ours), 2 * apart)
            assert far <= 2 * apart / TEMPERATURE or cut, (
                f"batch {seed}, row {row}: parts at {position}, {far:.2e} from the host's choice, "
                f"{2 * apart / TEMPERATURE:.2e} allowed"
            )
    assert len(tokens_seen) > total / 8  # it does sample
    assert_most_equal(equal, total, dtype)


def distance_to_cut(logits, tokens, apart):
    """Whether logits that move by `apart` may take one of the tokens in or out."""
    best = logits.topk(TOP_K).values
    mass = (best / TEMPERATURE).softmax(0).cumsum(0)
    near_mass = math.expm1(apart / TEMPERATURE)
    for token in tokens:
        logit = logits[token]
        if abs(float(logit - best[-1])) <= apart:
            return True
        rank = int((best > logit).sum())
        before = float(mass[rank - 1]) if rank else 0.0
        if rank < TOP_K and before - near_mass <= TOP_P <= float(mass[rank]) + near_mass:
            return True
    return False


def test_beams(device, dtype):
    """A search that parts at a near tie goes elsewhere, and is judged by where it ends: in fp32 by
    its score, row by row, in half precision by the mean of all scores.
    """
    model, double = models(device, dtype)
    equal, total, differences = 0, 0, []
    worst_error = 0.0
    for seed, inputs in batches(device, model.config.vocab_size, BEAM_BATCH):
        settings = {"num_beams": BEAMS}
        own, _ = run(model, inputs, seed, **settings)
        with patched("gpt2_beam_search"):
            out, _ = run(model, inputs, seed, **settings)
        assert own.shape == out.shape
        parted = [row for row, _ in partings(own, out)]
        equal, total = equal + len(own) - len(parted), total + len(own)
        width, mask = inputs["input_ids"].shape[1], inputs["attention_mask"]
        scores = {}
        for name, run_by, tokens in (
            ("own", double, own),
            ("out", double, out),
            ("rounded", model, own),
        ):
            log = forward(run_by, tokens, mask)[:, width - 1 : -1].double().log_softmax(-1)
            scores[name] = log.gather(2, tokens[:, width:, None])[..., 0]
        worst_error = max(worst_error, float((scores["rounded"] - scores["own"]).abs().max()))
        differences.append((scores["out"] - scores["own"]).mean(1))
    found = torch.cat(differences)
    slack = (1 + MAX_ERROR_RATIO) * worst_error
    if dtype == torch.float32:
        assert float(found.abs().max()) <= 2 * slack + 1e-6, "another search, not another rounding"
    spread = float(found.std()) / math.sqrt(total)
    assert abs(float(found.mean())) <= slack + 3 * spread
    assert_most_equal(equal, total, dtype)
