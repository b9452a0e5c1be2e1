"""BERT encoding: milliseconds a batch, for a padded batch as a tokenizer makes it.

    python benchmarks/bert_encode.py                  # on a GPU if there is one, else on the CPU
    python benchmarks/bert_encode.py --only tiny128   # one case
    python benchmarks/bert_encode.py --published      # the shapes of EET's own chart, full batches

floor: 2 * layer weights * real tokens + 4 * hidden * sum of squared lengths a layer, or the weights
read once, whichever takes longer (see harness.py). PUBLISHED stands against the PyTorch of 2021: it
is quoted beside our rows, not compared with them.
"""

import argparse
import functools

import harness
import torch
from harness import BASELINE, Case, Provider
from torch import Tensor, nn
from transformers import AutoModel, BertConfig

SEED = 0
MODELS = {  # layers, hidden size, heads
    "tiny128": (4, 128, 2),
    "minilm": (6, 384, 12),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
# Ragged: lengths evenly spread from 6 % to 100 % of the longest.
RAGGED = 0.53
CPU_SHAPES = (  # model, batch, tokens, share of real tokens
    ("tiny128", 1, 32, 1.0),
    ("minilm", 8, 128, 1.0),
    ("bert-base", 1, 128, 1.0),
    ("bert-base", 8, 128, 1.0),
    ("bert-base", 8, 128, RAGGED),
)
GPU_SHAPES = (
    ("tiny128", 1, 32, 1.0),
    ("minilm", 8, 128, 1.0),
    ("bert-base", 1, 128, 1.0),
    ("bert-base", 32, 128, 1.0),
    ("bert-base", 32, 128, RAGGED),
    ("bert-base", 8, 512, 1.0),
    ("bert-base", 32, 512, RAGGED),
    ("bert-large", 32, 128, 1.0),
    ("bert-large", 32, 512, RAGGED),
)
# EET's speed-up over PyTorch on an A100, at (batch, tokens); its README names neither the size of
# that BERT nor the dtype.
PUBLISHED = {
    (4, 32): 5.37,
    (4, 64): 5.13,
    (4, 128): 4.52,
    (4, 256): 3.42,
    (4, 512): 1.92,
    (10, 32): 5.10,
    (10, 64): 4.41,
    (10, 128): 2.72,
    (10, 256): 1.60,
    (10, 512): 1.25,
}
PUBLISHED_SHAPES = tuple(("bert-base", *shape, 1.0) for shape in PUBLISHED)


def published(row: harness.Row) -> str:
    """EET's own ratio for the shape of a row, as text; a dash where it published none."""
    ratio = PUBLISHED.get((int(row["batch_size"]), int(row["seq_len"])))
    return f"{ratio:.2f}x" if ratio else "–"


@functools.lru_cache(maxsize=1)
def build_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    layers, hidden_size, heads = MODELS[name]
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
    )
    return harness.random_model(AutoModel, config, dtype, device)


def build_batch(case: Case, device: str) -> dict[str, Tensor]:
    """Random tokens, padded on the right; lengths of a ragged batch run evenly up to `seq_len`."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(1000, 30000, (case.batch_size, case.seq_len), generator=generator)
    lengths = torch.full((case.batch_size,), case.seq_len)
    if case.fill < 1:
        spread = torch.linspace(2 * case.fill - 1, 1.0, case.batch_size)
        lengths = (spread * case.seq_len).round().long().clamp(min=1)
    mask = (torch.arange(case.seq_len) < lengths[:, None]).long()
    return {"input_ids": (tokens * mask).to(device), "attention_mask": mask.to(device)}


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    model = build_model(case.model, case.dtype, args.device)
    batch = build_batch(case, args.device)
    real = batch["attention_mask"].bool()

    def encode(encoder: nn.Module = model) -> Tensor:
        with torch.no_grad():
            return encoder(**batch).last_hidden_state

    expected = encode()

    def compare(_: Provider, hidden_states: Tensor) -> tuple[float, bool]:
        error = harness.relative_error(hidden_states[real], expected[real])
        return error, error <= harness.TOLERANCE[case.dtype]

    providers = [Provider(BASELINE, encode), harness.patched_provider(encode)]
    if args.compile:
        compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
        providers.append(Provider("torch_compile", functools.partial(encode, compiled)))
    found = harness.measure(providers, compare, args)

    weights = harness.layer_parameters(model.encoder)
    layers, hidden_size, _ = MODELS[case.model]
    lengths = real.sum(dim=1).double()
    products = 2 * sum(weight.numel() for weight in weights) * float(lengths.sum())
    attention = 4 * hidden_size * layers * float(lengths.square().sum())
    read_bytes = sum(weight.nbytes for weight in weights)
    floor_ms = rates.floor_ms(case.dtype, read_bytes, products + attention)
    return harness.make_rows(case, found, floor_ms, args.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], action="append")
    parser.add_argument(
        "--published", action="store_true", help="the shapes that EET published ratios for instead"
    )
    args = parser.parse_args()
    harness.prepare(args)
    on_gpu = args.device != "cpu"
    dtypes = ["float16", "float32"] if on_gpu else ["float32"]
    name, shapes = "bert_encode", GPU_SHAPES if on_gpu else CPU_SHAPES
    if args.published:
        name, shapes, dtypes = "bert_published", PUBLISHED_SHAPES, dtypes[:1]
    cases = [
        Case(name, model, batch_size, seq_len, getattr(torch, dtype), fill=fill)
        for dtype in args.dtype or dtypes
        for model, batch_size, seq_len, fill in shapes
    ]
    cases = harness.selected(cases, args.only)
    rates = harness.measure_rates(args.device, (case.dtype for case in cases))
    rows = []
    for case in cases:
        print(harness.title(case), flush=True)
        found = run_case(case, rates, args)
        harness.record(found, args)
        rows += found
    harness.print_rows(rows)
    return harness.exit_status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
