"""What the GPT-2 benchmarks share: models, prompts, providers, the check of tokens, the floor.

check: the unpatched model reads each provider's tokens in one pass; every token must be its best
one, or closer to it than the two may differ by rounding. So each provider can be run alone.
floor: layer weights and output embedding, and the KV cache at its mean length, read once a token.
On a GPU cuDNN's attention is off for all: it plans anew for each length of the cache.
"""

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import harness
import torch
from harness import Case, Provider
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, GPT2Config

SEED = 0
VOCAB_SIZE = 50257
MODELS = {  # layers, hidden size, heads
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (24, 1536, 16),
    "xl": (24, 2048, 16),
    "2.7b": (32, 2560, 32),
    "5b": (45, 3072, 24),
    "8b": (40, 4096, 32),
    "10b": (36, 5120, 40),
}
STATIC = "transformers-static-compile"
EAGER = "transformers-eager"
Compare = Callable[[Provider, Tensor], tuple[float, bool]]
_built: dict[tuple[object, ...], nn.Module] = {}


def build_model(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    n_positions: int = 1024,
    tied: bool = True,
) -> nn.Module:
    """One model of (layers, hidden size, heads) at a time: the last one is freed before the next is
    built, with what was compiled for it. No token ends a row."""
    key = (shape, dtype, device, n_positions, tied)
    if key not in _built:
        release()
        layers, hidden_size, heads = shape
        config = GPT2Config(
            n_layer=layers,
            n_embd=hidden_size,
            n_head=heads,
            n_positions=n_positions,
            tie_word_embeddings=tied,
        )
        model = harness.random_model(AutoModelForCausalLM, config, dtype, device)
        model.generation_config.eos_token_id = None
        _built[key] = model
    return _built[key]


def release() -> None:
    _built.clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prompt_of(batch_size: int, length: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, VOCAB_SIZE, (batch_size, length), generator=generator).to(device)


def generate(model: nn.Module, prompt: Tensor, new_tokens: int, **options: object) -> Tensor:
    settings = {"do_sample": False, "pad_token_id": 0} | options
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, **settings
    )


@contextlib.contextmanager
def without_cudnn_attention(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def attention_of(model: nn.Module, implementation: str) -> Iterator[None]:
    """transformers' own switch, on the same weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def static_options(device: str) -> dict[str, object]:
    """transformers compiles the step itself where the cache is static; on a CPU only if told to."""
    options: dict[str, object] = {"cache_implementation": "static"}
    if device == "cpu":
        options["compile_config"] = CompileConfig(mode="default")
        options["compile_config"]._compile_all_devices = True
    return options


def providers_of(case: Case, model: nn.Module, prompt: Tensor, device: str) -> dict[str, Provider]:
    """Every way to run generate() on the same weights. The static cache stays behind on the model,
    so that its provider is the last: else the others' peak of memory would count it."""

    def call(**options: object) -> Callable[[], Tensor]:
        return lambda: generate(model, prompt, case.new_tokens, **options)

    def eager() -> AbstractContextManager[None]:
        return attention_of(model, "eager")

    known = (
        Provider(harness.BASELINE, call(), one_call_warms=True),
        Provider(EAGER, call(), eager, one_call_warms=True),
        harness.patched_provider(call()),
        Provider(STATIC, call(**static_options(device)), one_call_warms=True),
    )
    return {provider.name: provider for provider in known}


def chosen(
    providers: dict[str, Provider], named: str, default: tuple[str, ...]
) -> tuple[Provider, ...]:
    names = [name.strip() for name in named.split(",") if name.strip()] or default
    if unknown := set(names) - set(providers):
        raise SystemExit(
            f"--providers knows {', '.join(providers)}, not {', '.join(sorted(unknown))}"
        )
    return tuple(provider for name, provider in providers.items() if name in names)


def logits_after(model: nn.Module, tokens: Tensor, new_tokens: int) -> Tensor:
    """In one pass, of every position that chose a new token: (batch_size, new_tokens, vocab)."""
    with torch.no_grad():
        return model(tokens, use_cache=False, logits_to_keep=new_tokens + 1).logits[:, :-1]


def largest_gap(logits: Tensor, tokens: Tensor, real: Tensor | None = None) -> float:
    """How far below the best logit a chosen token's stands at most, as a share of the largest.
    `real` (batch_size, new tokens) leaves the others out."""
    gap, largest = 0.0, float(logits.abs().max())
    for row in range(tokens.shape[0]):  # a row at a time: all of them in fp32 fill a small GPU
        scores = logits[row].float()
        below = scores.amax(1) - scores.gather(1, tokens[row, :, None])[:, 0]
        if real is not None:
            below = below[real[row]]
        gap = max(gap, float(below.max()) / largest)
    return gap


def greedy_check(case: Case, model: nn.Module) -> Compare:
    """The error is that of the logits of the patched model over the first row's tokens, or, for a
    provider that doesn't change the model's forward, the largest gap."""
    tolerance = harness.TOLERANCE[case.dtype]

    def compare(provider: Provider, tokens: Tensor) -> tuple[float, bool]:
        if tokens.shape != (case.batch_size, case.seq_len + case.new_tokens):
            return float("inf"), False
        expected = logits_after(model, tokens, case.new_tokens)
        error = gap = largest_gap(expected, tokens[:, case.seq_len :])
        if provider.patched:
            with provider.scope():
                patched = logits_after(model, tokens[:1], case.new_tokens)
            error = harness.relative_error(patched, expected[:1])
        if gap > tolerance:
            print(
                f"  {provider.name}: a token stands {gap:.1e} of the largest logit below the best"
            )
        return error, error <= tolerance and gap <= tolerance

    return compare


def floor_ms(
    rates: harness.Rates,
    model: nn.Module,
    dtype: torch.dtype,
    rows: float,
    cached_tokens: float,
) -> float:
    """Of one step, of `rows` on average. `cached_tokens`: keys that it reads on average, of all
    rows together."""
    weights = [*harness.layer_parameters(model.transformer.h), model.lm_head.weight]
    config = model.config
    cache_bytes = 2 * config.n_layer * config.n_embd * cached_tokens * dtype.itemsize
    read_bytes = sum(weight.nbytes for weight in weights) + cache_bytes
    operations = 2 * sum(weight.numel() for weight in weights) * rows
    return rates.floor_ms(dtype, read_bytes, operations)


def generation_floor(case: Case, rates: harness.Rates, model: nn.Module) -> float:
    mean_length = case.seq_len + case.new_tokens / 2
    return floor_ms(rates, model, case.dtype, case.batch_size, case.batch_size * mean_length)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_arguments(parser)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--providers", default="", help="comma-separated, each is checked alone")


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "float16"))


def names_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    names = args.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"--models knows {', '.join(MODELS)}, not {', '.join(sorted(unknown))}")
    return names


def run_cases(
    cases: Sequence[Case],
    run_case: Callable[[Case, harness.Rates, argparse.Namespace], list[harness.Row]],
    args: argparse.Namespace,
) -> int:
    """Run, record and print them; returns the exit status."""
    rates = harness.measure_rates(args.device, [case.dtype for case in cases])
    rows = []
    for case in cases:
        print(harness.title(case), flush=True)
        with without_cudnn_attention(args.device):
            found = run_case(case, rates, args)
        harness.record(found, args)
        rows += found
    harness.print_rows(rows)
    return harness.exit_status(rows)
