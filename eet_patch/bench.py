"""`python -m eet_patch bench`: your model, on your machine, unpatched and patched in turns.

Each case is checked first: hidden states against the unpatched model's, tokens against its tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eet_patch
from eet_patch.testing.accuracy import relative_error
from eet_patch.testing.timing import clock, device_name

# As benchmarks/harness.py: largest relative difference from the unpatched model in the same dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
BAR_WIDTH = 40
SEED = 0


@dataclass
class Result:
    """One case: what was asked, how long both took, and whether the answers agree."""

    title: str
    unpatched: list[float] = field(default_factory=list)
    patched: list[float] = field(default_factory=list)
    error: float = float("nan")
    ok: bool = False
    fallbacks: dict[str, int] = field(default_factory=dict)

    @property
    def speed_up(self) -> float:
        return statistics.median(self.unpatched) / statistics.median(self.patched)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="hub id or folder; default: BERT-base and GPT-2 with random weights")
    add("--device", help="default: cuda if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="default: half on a GPU")
    add("--batch", type=int, nargs="+", default=[1, 8], help="sequences a batch")
    add("--length", type=int, nargs="+", default=[32, 128], help="tokens a sequence, or a prompt")
    add("--new-tokens", type=int, default=32, help="of generate()")
    add("--seconds", type=float, default=5.0, help="spent on a case at most, after 5 runs of each")
    add("--out", default="eet_patch_bench.png", help="the chart; a .txt beside it")


def run(args: argparse.Namespace) -> int:
    """The command: prints the table and the chart, writes both, 1 where an answer is wrong."""
    try:
        import transformers
    except ImportError:
        print('bench needs transformers: pip install "eet-patch[transformers]"', file=sys.stderr)
        return 2
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    default = "float32" if args.device == "cpu" else "float16"
    dtype = getattr(torch, args.dtype or default)
    results = []
    for name, model in models(args.model, dtype, args.device):
        for batch_size in args.batch:
            for length in args.length:
                results.append(case(name, model, batch_size, length, args))
        del model
    if not results:
        return 1
    where = f"{device_name(args.device)}, {str(dtype)[6:]}, torch {torch.__version__}, "
    where += f"transformers {transformers.__version__}, eet_patch {eet_patch.__version__}"
    text = f"{where}\n\n{table(results)}\n\n{chart(results)}\n"
    print(f"\n{text}")
    out = Path(args.out)
    out.with_suffix(".txt").write_text(text, encoding="utf-8")
    drawn = draw(results, where, out)
    print(f"written: {out.with_suffix('.txt')}{f', {out}' if drawn else ''}")
    return 0 if all(result.ok for result in results) else 1


def models(name: str | None, dtype: torch.dtype, device: str) -> Iterator[tuple[str, nn.Module]]:
    """The named model, or two of real size with random weights: nothing is fetched then."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config

    if name is None:
        yield "BERT-base", AutoModel.from_config(BertConfig(), dtype=dtype).to(device).eval()
        made = AutoModelForCausalLM.from_config(GPT2Config(), dtype=dtype)
        yield "GPT-2", made.to(device).eval()
        return
    config = AutoConfig.from_pretrained(name)
    decodes = any("CausalLM" in a or "LMHead" in a for a in config.architectures or ())
    loader: Any = AutoModelForCausalLM if decodes and not is_encoder(config) else AutoModel
    yield Path(name).name, loader.from_pretrained(name, dtype=dtype).to(device).eval()


def is_encoder(config: Any) -> bool:
    return getattr(config, "is_decoder", None) is False and "bert" in config.model_type


def case(
    name: str, model: nn.Module, batch_size: int, length: int, args: argparse.Namespace
) -> Result:
    """Checks one shape, then times it in turns: a machine that slows down slows both."""
    vocab_size = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(min(5, vocab_size - 1), vocab_size, (batch_size, length))  # type: ignore[operator,arg-type]
    batch = {"input_ids": ids.to(args.device)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    generates = hasattr(model, "lm_head") and hasattr(model, "generate")
    title = f"{name}, {batch_size} x {length}" + (f" + {args.new_tokens}" if generates else "")

    def encode() -> Tensor:
        with torch.inference_mode():
            hidden_states: Tensor = model(**batch)[0]
            return hidden_states.clone()

    def generate() -> Tensor:
        count = args.new_tokens
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return model.generate(**batch, **options, pad_token_id=0)  # type: ignore[operator,no-any-return]

    call = generate if generates else encode
    result = Result(title)
    expected = call()
    eet_patch.reset_report()
    with eet_patch.enabled():
        actual = call()
        targets = eet_patch.report().targets
    replaced = sum(target.replaced for target in targets)
    for target in targets:
        for reason, count in target.fallbacks.items():
            result.fallbacks[reason] = result.fallbacks.get(reason, 0) + count
    if generates:
        result.error, result.ok = agreement(model, expected, actual, length)
    else:
        result.error = relative_error(actual, expected)
        result.ok = result.error <= TOLERANCE[expected.dtype]
    result.ok = result.ok and replaced > 0
    measure(result, call, args)
    return result


def agreement(
    model: nn.Module, expected: Tensor, actual: Tensor, length: int
) -> tuple[float, bool]:
    """How far below the best one the unpatched model sees each chosen token, as a share of the
    largest logit: 0 where the tokens are its own, little where two were equally good.
    """
    if torch.equal(expected, actual):
        return 0.0, True
    with torch.inference_mode():
        logits = model(actual).logits[:, length - 1 : -1].float()
    chosen = logits.gather(2, actual[:, length:, None]).squeeze(2)
    gap = ((logits.amax(2) - chosen) / logits.abs().amax(2)).max().item()
    return gap, gap <= TOLERANCE[next(model.parameters()).dtype]


def measure(result: Result, call: Callable[[], Tensor], args: argparse.Namespace) -> None:
    started, turn = time.perf_counter(), 0
    while True:
        for times, scope in (
            (result.unpatched, nullcontext),
            (result.patched, eet_patch.enabled),
        ):
            with scope():
                call()  # what is made once: buffers, graphs, plans
                times += [clock(call, args.device) for _ in range(2)]
        turn += 1
        spent = time.perf_counter() - started
        share = 1.0 if spent >= args.seconds and turn >= 3 else min(spent / args.seconds, 0.99)
        progress(result.title, share)
        if share == 1.0:
            return


def progress(title: str, share: float) -> None:
    """One line that fills up, where somebody watches; a line a case where nobody does."""
    if sys.stderr.isatty():
        full = round(share * 24)
        print(f"\r{title:32s} [{'#' * full}{'.' * (24 - full)}]", end="", file=sys.stderr)
    if share == 1.0:
        print(f"{'' if sys.stderr.isatty() else title + ': timed'}", file=sys.stderr, flush=True)


def table(results: list[Result]) -> str:
    """What was measured, a line a case, and why calls fell back."""
    width = max(len(result.title) for result in results)
    lines = [
        f"{'case':{width}s} {'unpatched ms':>13s} {'eet_patch ms':>13s} {'speed-up':>9s} "
        f"{'error':>8s} answers"
    ]
    for result in results:
        plain, patched = (statistics.median(t) for t in (result.unpatched, result.patched))
        lines.append(
            f"{result.title:{width}s} {plain:13.2f} {patched:13.2f} {result.speed_up:8.2f}x "
            f"{result.error:8.1e} {'agree' if result.ok else 'DO NOT COUNT'}"
        )
    reasons: dict[str, int] = {}
    for result in results:
        for reason, count in result.fallbacks.items():
            reasons[reason] = reasons.get(reason, 0) + count
    lines += [f"{count} calls ran the original: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)


def chart(results: list[Result]) -> str:
    """Bars of text: time as a share of the unpatched model's."""
    lines = []
    for result in results:
        share = 1 / result.speed_up
        full = max(1, round(BAR_WIDTH * share))
        lines.append(result.title)
        lines.append(f"  unpatched {'█' * BAR_WIDTH} 100 %")
        lines.append(f"  eet_patch {'█' * min(full, 2 * BAR_WIDTH)} {share:.0%}")
    return "\n".join(lines)


def draw(results: list[Result], where: str, out: Path) -> bool:
    """The chart as a picture; False, and a word, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return False
    figure = Figure(figsize=(8, 1.4 + 0.6 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results):
        plain, patched = (statistics.median(t) for t in (result.unpatched, result.patched))
        for offset, value, colour, label in (
            (-0.2, plain, "#9aa5b1", "unpatched"),
            (0.2, patched, "#2f6fde", "eet_patch"),
        ):
            axes.barh(row + offset, value / plain, 0.36, color=colour, label=label)
            axes.text(value / plain + 0.01, row + offset, f"{value:.3g} ms", va="center", size=8)
    axes.set_yticks(range(len(results)), [result.title for result in results], size=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time as a share of the unpatched model's; labels: median of a call")
    axes.set_title(where, size=8)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out, dpi=120)
    return True
