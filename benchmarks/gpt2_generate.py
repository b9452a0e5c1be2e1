"""GPT-2 decoding through `model.generate()`: milliseconds a token, the whole call / new tokens.

    python benchmarks/gpt2_generate.py                       # on a GPU if there is one, else a CPU
    python benchmarks/gpt2_generate.py --models small,xl,8b  # GPU: more sizes
    python benchmarks/gpt2_generate.py --models 10b --providers eet_patch --compile

floor: layer weights and output embedding, and the KV cache at its mean length, read once a token.
check: the unpatched model reads each provider's tokens in one pass; every token must be its best
one, or closer to it than the two may differ by rounding.
On a GPU cuDNN's attention is off for all: it plans anew for each length of the cache.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator

import harness
import torch
from harness import BASELINE, Case, Provider
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

SEED = 0
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
CPU_SHAPES = ((1, 64, 64), (4, 64, 64))  # batch, tokens of the prompt, new tokens
GPU_SHAPES = ((4, 512, 512), (16, 512, 512))


@functools.lru_cache(maxsize=1)
def build_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    layers, hidden_size, heads = MODELS[name.removeprefix("gpt2-")]
    config = GPT2Config(n_layer=layers, n_embd=hidden_size, n_head=heads, n_positions=1024)
    model = harness.random_model(AutoModelForCausalLM, config, dtype, device)
    model.generation_config.eos_token_id = (
        None  # every run makes as many tokens as it was asked for
    )
    return model


def largest_gap(logits: Tensor, tokens: Tensor) -> float:
    """How far below the best logit a chosen token's stands at most, as a share of the largest."""
    gap, largest = 0.0, float(logits.abs().max())
    for row in range(tokens.shape[0]):  # a row at a time: all of them in fp32 fill a small GPU
        scores = logits[row].float()
        chosen = scores.gather(1, tokens[row, :, None])[:, 0]
        gap = max(gap, float((scores.amax(1) - chosen).max()) / largest)
    return gap


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    model = build_model(case.model, case.dtype, args.device)
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.batch_size, case.seq_len)
    prompt = torch.randint(0, 50257, shape, generator=generator).to(args.device)
    tolerance = harness.TOLERANCE[case.dtype]

    def generate(**options: object) -> Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=case.new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    def logits_of(tokens: Tensor) -> Tensor:
        """Of every position that chose a new token."""
        with torch.no_grad():
            return model(tokens, use_cache=False, logits_to_keep=case.new_tokens + 1).logits[:, :-1]

    def compare(provider: Provider, tokens: Tensor) -> tuple[float, bool]:
        shape_is_right = tokens.shape == (case.batch_size, case.seq_len + case.new_tokens)
        expected = logits_of(tokens)
        with provider.scope():
            error = harness.relative_error(logits_of(tokens)[:1], expected[:1])
        gap = largest_gap(expected, tokens[:, case.seq_len :])
        if gap > tolerance:
            print(
                f"  {provider.name}: a token stands {gap:.1e} of the largest logit below the best"
            )
        return error, shape_is_right and error <= tolerance and gap <= tolerance

    providers = [Provider(BASELINE, generate), harness.patched_provider(generate)]
    if args.compile:  # transformers compiles the step itself when the cache is static
        static = functools.partial(generate, cache_implementation="static")
        providers.append(Provider("transformers-static-compile", static))
    if args.providers:
        providers = [p for p in providers if p.name in args.providers.split(",")]
    found = harness.measure(providers, compare, args)

    layers, hidden_size, _ = MODELS[case.model.removeprefix("gpt2-")]
    weights = [*harness.layer_parameters(model.transformer.h), model.lm_head.weight]
    mean_length = case.seq_len + case.new_tokens / 2
    itemsize = model.lm_head.weight.itemsize
    cache_bytes = 2 * layers * hidden_size * case.batch_size * mean_length * itemsize
    read_bytes = sum(weight.nbytes for weight in weights) + cache_bytes
    operations = 2 * sum(weight.numel() for weight in weights) * case.batch_size
    floor_ms = rates.floor_ms(case.dtype, read_bytes, operations)
    return harness.make_rows(case, found, floor_ms, args.device, per=case.new_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser)
    parser.add_argument("--models", default="small", help=f"comma-separated: {', '.join(MODELS)}")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--providers", default="", help="comma-separated; default: all")
    args = parser.parse_args()
    harness.prepare(args)
    on_gpu = args.device != "cpu"
    dtype = getattr(torch, args.dtype or ("float16" if on_gpu else "float32"))
    names = args.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"--models knows {', '.join(MODELS)}, not {', '.join(sorted(unknown))}")
    cases = [
        Case("gpt2_generate", f"gpt2-{name}", batch_size, seq_len, dtype, new_tokens)
        for name in names
        for batch_size, seq_len, new_tokens in (GPU_SHAPES if on_gpu else CPU_SHAPES)
    ]
    cases = harness.selected(cases, args.only)
    rates = harness.measure_rates(args.device, [dtype])
    rows = []
    for case in cases:
        print(harness.title(case), flush=True)
        with without_cudnn_attention() if on_gpu else contextlib.nullcontext():
            found = run_case(case, rates, args)
        harness.record(found, args)
        rows += found
    harness.print_rows(rows)
    return harness.exit_status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
