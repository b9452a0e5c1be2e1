"""The context of generate(): a forward of 4 x 512 tokens into an empty cache, ms a call.

    python benchmarks/gpt2_prefill.py                      # GPU: every size, one after the other
    python benchmarks/gpt2_prefill.py --models small,10b --providers eet_patch,transformers

The providers are transformers' own attention implementations on the same weights: `transformers` is
sdpa as torch chooses without cuDNN, -flash and -cudnn are sdpa held to that backend, -eager is
transformers' own.
floor: products of all tokens with the layers' weights, causal attention, and the last token's head.
check: the last logits, and all keys and values, against the unpatched model's.
"""

import argparse
import contextlib
from collections.abc import Iterator

import gpt2_common
import harness
import torch
from gpt2_common import EAGER, MODELS
from harness import BASELINE, PATCHED, Case, Provider
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

GPU_SHAPE = (4, 512)
CPU_SHAPE = (2, 64)
FLASH, CUDNN = "transformers-flash", "transformers-cudnn"


@contextlib.contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    with sdpa_kernel([backend]):
        yield


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    model = gpt2_common.build_model(MODELS[case.model], case.dtype, args.device)
    prompt = gpt2_common.prompt_of(case.batch_size, case.seq_len, args.device)
    mask = torch.ones_like(prompt)
    positions = torch.arange(case.seq_len, device=prompt.device)[None].expand_as(prompt)
    caches = []

    @torch.no_grad()
    def forward() -> Tensor:
        caches[:] = [DynamicCache(config=model.config)]
        return model(
            input_ids=prompt,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=caches[0],
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def kept() -> list[Tensor]:
        return [t for layer in caches[0].layers for t in (layer.keys, layer.values)]

    expected_logits = forward()
    expected_kept = [tensor.clone() for tensor in kept()]

    def compare(provider: Provider, logits: Tensor) -> tuple[float, bool]:
        error = harness.relative_error(logits, expected_logits)
        for tensor, expected in zip(kept(), expected_kept, strict=True):
            error = max(error, harness.relative_error(tensor, expected))
        return error, error <= harness.TOLERANCE[case.dtype]

    known = {
        BASELINE: Provider(BASELINE, forward),
        EAGER: Provider(EAGER, forward, lambda: gpt2_common.attention_of(model, "eager")),
        FLASH: Provider(FLASH, forward, lambda: only(SDPBackend.FLASH_ATTENTION)),
    }
    if args.device != "cpu":
        known[CUDNN] = Provider(CUDNN, forward, lambda: only(SDPBackend.CUDNN_ATTENTION))
    known[PATCHED] = harness.patched_provider(forward)
    providers = gpt2_common.chosen(known, args.providers, tuple(known))
    found = harness.measure(providers, compare, args)
    caches.clear()

    layers, hidden_size, _ = MODELS[case.model]
    tokens = case.batch_size * case.seq_len
    weights = harness.layer_parameters(model.transformer.h)
    products = 2 * tokens * sum(weight.numel() for weight in weights)
    products += 2 * case.batch_size * model.lm_head.weight.numel()
    attention = 2 * layers * hidden_size * case.batch_size * case.seq_len**2
    read_bytes = sum(weight.nbytes for weight in (*weights, model.lm_head.weight))
    floor_ms = rates.floor_ms(case.dtype, read_bytes, products + attention)
    rows = harness.make_rows(case, found, floor_ms, args.device)
    best = min((row for row in rows if row["provider"] != PATCHED), key=median_of, default=None)
    for row in rows:
        if row["provider"] == PATCHED and best is not None:
            ratio = median_of(row) / median_of(best)
            print(f"  {PATCHED} / {best['provider']}, the best other: {ratio:.3f}", flush=True)
    return rows


def median_of(row: harness.Row) -> float:
    return float(row["median_ms"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpt2_common.add_arguments(parser)
    default = ",".join(MODELS) if torch.cuda.is_available() else "small"
    parser.add_argument("--models", default=default, help=f"comma-separated: {', '.join(MODELS)}")
    args = parser.parse_args()
    harness.prepare(args)
    batch_size, seq_len = CPU_SHAPE if args.device == "cpu" else GPU_SHAPE
    dtype = gpt2_common.dtype_of(args)
    cases = [
        Case("gpt2_prefill", name, batch_size, seq_len, dtype)
        for name in gpt2_common.names_of(args, parser)
    ]
    return gpt2_common.run_cases(harness.selected(cases, args.only), run_case, args)


if __name__ == "__main__":
    raise SystemExit(main())
