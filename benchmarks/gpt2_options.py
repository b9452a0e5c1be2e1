"""What sampling, beams and rows that end cost against greedy search, all patched and in one run.

    python benchmarks/gpt2_options.py --models small,xl
    python benchmarks/gpt2_options.py --models xl --only ending

sampling: temperature 0.8, top-k 50, top-p 0.95 at batch 4, beside greedy at batch 4.
beam 4: at batch 4, beside greedy at batch 16, which steps as many rows.
ending: 16 rows that end after 1/16, 2/16, ... of the new tokens, beside 16 rows that all go on to
    the end, each against its own floor. The model counts: its output embedding is its input
    embedding moved by one row, so that token n is followed by n + 1, and a row ends where its
    prompt's last token says. It is an ordinary greedy call with one eos_token_id, and every layer
    does its work.
A time is a whole call / new tokens, those of the longest row.

check: greedy and ending rows as gpt2_common.py says, and the ends must be where they were put.
    Sampled tokens: the unpatched model reads them in one pass, and each must be what it draws
    with the same generator, but for MAX_PARTED of them, which rounding at the cut of top-k and
    top-p may move. Beams: the score of the best sequence, read by the unpatched model, must be no
    worse than that of its own search by more than the tolerance, or than MAX_APART times what lies
    between its own searches with sdpa and with eager attention: with random weights a search parts
    at near ties, and ends elsewhere.
floor: as gpt2_common.py says; of rows that have ended nothing is read, and what the beams of a
    prompt have in common, at least the best one's past, is read once.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import gpt2_common
import harness
import torch
from gpt2_common import MODELS, SEED, VOCAB_SIZE
from harness import PATCHED, Case, Provider
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95
SAMPLING = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}
MAX_PARTED = 0.02
MAX_APART = 1.5
BEAMS = 4
SMALL_BATCH, LARGE_BATCH = 4, 16
GPU_TOKENS, CPU_TOKENS = (512, 512), (32, 32)
END = 40000  # the token that ends a row of a counting model
GROUPS = {
    "sampling": ("sampling", "greedy 4"),
    "beams": ("beam 4", "greedy 16"),
    "ending": ("ending rows", "full rows"),
}


@dataclass(frozen=True)
class Option:
    """One way of calling generate(), and how it is judged. `cached`: keys that a step reads on
    average, of all rows together."""

    batch_size: int
    call: Callable[[], Tensor]
    compare: Callable[[Provider, Tensor], tuple[float, bool]]
    cached: float
    fill: float = 1.0


def sampling_check(case: Case, model: nn.Module) -> gpt2_common.Compare:
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)]
    )

    def compare(provider: Provider, tokens: Tensor) -> tuple[float, bool]:
        if tokens.shape != (case.batch_size, case.seq_len + case.new_tokens):
            return float("inf"), False
        logits = gpt2_common.logits_after(model, tokens, case.new_tokens)
        slack = harness.TOLERANCE[case.dtype] * float(logits.abs().max())
        torch.manual_seed(SEED)
        parted = torch.zeros((), dtype=torch.int64, device=tokens.device)
        lowest = torch.zeros((), device=tokens.device)
        for step in range(case.new_tokens):
            raw = logits[:, step].float()
            chosen = tokens[:, case.seq_len + step, None]
            scores = warpers(tokens[:, : case.seq_len + step], raw.clone())
            drawn = torch.multinomial(scores.softmax(-1), num_samples=1)
            parted += (drawn != chosen).sum()
            kept = torch.where(scores.isfinite(), raw, float("inf")).amin(1, keepdim=True)
            lowest = torch.maximum(lowest, (kept - raw.gather(1, chosen)).amax())
        share = float(parted) / (case.batch_size * case.new_tokens)
        if share:
            print(f"  {provider.name}: {share:.2%} of the tokens are not those drawn by the host")
        if lowest > slack:
            print(f"  {provider.name}: a token stands {float(lowest):.1e} below those kept")
        return share, share <= MAX_PARTED and float(lowest) <= slack

    return compare


def beam_check(
    case: Case, model: nn.Module, call: Callable[[], Tensor]
) -> Callable[[Provider, Tensor], tuple[float, bool]]:
    def scores_of(tokens: Tensor) -> Tensor:
        """Of whole sequences by the unpatched model: mean log-probability of the new tokens."""
        logits = gpt2_common.logits_after(model, tokens, case.new_tokens)
        new = tokens[:, case.seq_len :, None]
        rows = [
            row.float().log_softmax(-1).gather(1, ids) for row, ids in zip(logits, new, strict=True)
        ]
        return torch.stack(rows).mean((1, 2))

    def compare(provider: Provider, tokens: Tensor) -> tuple[float, bool]:
        own = call()
        if tokens.shape != own.shape:
            return float("inf"), False
        with gpt2_common.attention_of(model, "eager"):
            rounded_otherwise = call()
        expected = scores_of(own)
        apart = float(((expected - scores_of(rounded_otherwise)) / expected.abs()).abs().max())
        worse = float(((expected - scores_of(tokens)) / expected.abs()).max())
        equal = int((own == tokens).all(1).sum())
        print(
            f"  {provider.name}: {equal} of {case.batch_size} sequences are those of the host; the "
            f"host's two attentions lead {apart:.1e} apart"
        )
        return max(worse, 0.0), worse <= max(harness.TOLERANCE[case.dtype], MAX_APART * apart)

    return compare


def counting_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Its token n is followed by n + 1: the embeddings outweigh what the layers add."""
    model = gpt2_common.build_model(MODELS[name], dtype, device, tied=False)
    with torch.no_grad():
        embedding = model.transformer.wte.weight.normal_()
        model.lm_head.weight.copy_(embedding.roll(1, 0)).mul_(0.02)
    return model


def ending_options(case: Case, device: str) -> dict[str, Option]:
    model = counting_model(case.model, case.dtype, device)
    steps = torch.arange(1, LARGE_BATCH + 1, device=device) * (case.new_tokens // LARGE_BATCH)
    options = {}
    for name in GROUPS["ending"]:
        lengths = steps if name == "ending rows" else torch.full_like(steps, case.new_tokens)
        prompt = gpt2_common.prompt_of(LARGE_BATCH, case.seq_len, device)
        # Full rows come near no end; they look for one all the same.
        prompt[:, -1] = END - lengths if name == "ending rows" else steps
        at = torch.arange(1, case.new_tokens + 1, device=device)
        real = at <= lengths[:, None]
        expected = torch.where(real, prompt[:, -1:] + at, 0)

        def compare(
            provider: Provider,
            tokens: Tensor,
            expected: Tensor = expected,
            real: Tensor = real,
        ) -> tuple[float, bool]:
            new = tokens[:, case.seq_len :]
            if new.shape != expected.shape or not torch.equal(new, expected):
                print(f"  {provider.name}: rows don't count to their ends")
                return float("inf"), False
            logits = gpt2_common.logits_after(model, tokens, case.new_tokens)
            gap = gpt2_common.largest_gap(logits, new, real)
            return gap, gap <= harness.TOLERANCE[case.dtype]

        def call(prompt: Tensor = prompt) -> Tensor:
            return gpt2_common.generate(model, prompt, case.new_tokens, eos_token_id=END)

        generated = lengths.double()
        read = float((generated * case.seq_len + generated * generated / 2).sum())
        fill = float(generated.mean()) / case.new_tokens
        options[name] = Option(LARGE_BATCH, call, compare, read / case.new_tokens, fill)
    return options


def search_options(case: Case, device: str, group: str) -> dict[str, Option]:
    model = gpt2_common.build_model(MODELS[case.model], case.dtype, device)
    mean_length = case.seq_len + case.new_tokens / 2

    def greedy(batch_size: int) -> Option:
        prompt = gpt2_common.prompt_of(batch_size, case.seq_len, device)
        whole = replace(case, batch_size=batch_size)
        return Option(
            batch_size,
            lambda: gpt2_common.generate(model, prompt, case.new_tokens),
            gpt2_common.greedy_check(whole, model),
            batch_size * mean_length,
        )

    prompt = gpt2_common.prompt_of(SMALL_BATCH, case.seq_len, device)
    small = replace(case, batch_size=SMALL_BATCH)

    def sample() -> Tensor:
        torch.manual_seed(SEED)
        return gpt2_common.generate(model, prompt, case.new_tokens, **SAMPLING)

    def search() -> Tensor:
        return gpt2_common.generate(model, prompt, case.new_tokens, num_beams=BEAMS)

    cached = SMALL_BATCH * mean_length
    if group == "sampling":
        option = Option(SMALL_BATCH, sample, sampling_check(small, model), cached)
        return {"sampling": option, "greedy 4": greedy(SMALL_BATCH)}
    option = Option(SMALL_BATCH, search, beam_check(small, model, search), cached)
    return {"beam 4": option, "greedy 16": greedy(LARGE_BATCH)}


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    name, group = case.model.split(", ")
    case = replace(case, model=name)
    options = (
        ending_options(case, args.device)
        if group == "ending"
        else search_options(case, args.device, group)
    )
    providers = [harness.patched_provider(option.call, label) for label, option in options.items()]

    def compare(provider: Provider, tokens: Tensor) -> tuple[float, bool]:
        return options[provider.name].compare(provider, tokens)

    found = harness.measure(providers, compare, args)
    tied = group != "ending"
    model = gpt2_common.build_model(MODELS[name], case.dtype, args.device, tied=tied)
    rows = []
    for label, option in options.items():
        work = replace(
            case,
            model=f"{name}, {'greedy' if label.startswith('greedy') else label}",
            batch_size=option.batch_size,
            fill=option.fill,
        )
        alive = option.batch_size * option.fill
        floor_ms = gpt2_common.floor_ms(rates, model, case.dtype, alive, option.cached)
        measured = {PATCHED: found[label]}
        rows += harness.make_rows(work, measured, floor_ms, args.device, per=case.new_tokens)
    first, second = rows
    column = "ratio_to_floor" if group == "ending" else "median_ms"
    ratio = float(first[column]) / float(second[column])
    print(f"  {first['model']} / {second['model']}, {column}: {ratio:.3f}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpt2_common.add_arguments(parser)
    parser.add_argument("--models", default="small", help=f"comma-separated: {', '.join(MODELS)}")
    args = parser.parse_args()
    harness.prepare(args)
    dtype = gpt2_common.dtype_of(args)
    seq_len, new_tokens = CPU_TOKENS if args.device == "cpu" else GPU_TOKENS
    cases = [
        Case("gpt2_options", f"{name}, {group}", SMALL_BATCH, seq_len, dtype, new_tokens)
        for name in gpt2_common.names_of(args, parser)
        for group in GROUPS
    ]
    assert END + new_tokens < VOCAB_SIZE
    return gpt2_common.run_cases(harness.selected(cases, args.only), run_case, args)


if __name__ == "__main__":
    raise SystemExit(main())
