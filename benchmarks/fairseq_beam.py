"""fairseq's SequenceGenerator: milliseconds a step of beam search, or a new token of a language
model; the whole call with its encoder or prefix, divided.

    python benchmarks/fairseq_beam.py                      # on a GPU if there is one, else a CPU
    python benchmarks/fairseq_beam.py --only wmt_big --providers eet_patch

check: fairseq's own model, unpatched, scores every hypothesis in one pass; what the provider says
of it must agree, and the best one of a sentence must score as well as that of fairseq's search.
floor: weights of the decoder's layers and its head, its keys and values at their mean length and
those of the source, read once a step.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import harness
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import (
    base_architecture,
    transformer_wmt_en_de_big,
)
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.sequence_generator import SequenceGenerator
from harness import Case, Provider
from torch import Tensor, nn

BASELINE = "fairseq"
TRANSLATION = {"wmt_big": (transformer_wmt_en_de_big, 32768), "tiny": (base_architecture, 500)}
LANGUAGE_MODEL = {"lm_small": (12, 768, 12, 50257), "lm_tiny": (2, 64, 4, 500)}
# model, sentences, beams, tokens of the source or prefix, new tokens
GPU_SHAPES = (
    ("wmt_big", 8, 4, 30, 64),
    ("wmt_big", 32, 5, 30, 64),
    ("wmt_big", 128, 5, 30, 64),
    ("lm_small", 4, 1, 512, 512),
)
CPU_SHAPES = (("tiny", 8, 4, 30, 32), ("tiny", 32, 5, 30, 32), ("lm_tiny", 4, 1, 64, 64))
BEAMS = {(model, batch): beams for model, batch, beams, _, _ in (*GPU_SHAPES, *CPU_SHAPES)}


class Task:
    def __init__(self, dictionary: Dictionary) -> None:
        self.source_dictionary = self.target_dictionary = self.dictionary = dictionary


def dictionary_of(size: int) -> Dictionary:
    made = Dictionary()
    for number in range(size - len(made)):
        made.add_symbol(f"w{number}")
    return made


def build_model(name: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Dictionary]:
    """Seeded random weights, made on the device in fp32 and rounded."""
    torch.manual_seed(0)
    with torch.device(device):
        if name in TRANSLATION:
            architecture, vocab_size = TRANSLATION[name]
            args = Namespace(max_source_positions=1024, max_target_positions=1024)
            if name == "tiny":
                for side in ("encoder", "decoder"):
                    for key, value in (("layers", 2), ("embed_dim", 64), ("ffn_embed_dim", 128),
                                       ("attention_heads", 4)):  # fmt: skip
                        setattr(args, f"{side}_{key}", value)
            args.share_all_embeddings = True
            architecture(args)
            words = dictionary_of(vocab_size)
            model = TransformerModel.build_model(args, Task(words))
        else:
            layers, size, heads, vocab_size = LANGUAGE_MODEL[name]
            words = dictionary_of(vocab_size)
            args = Namespace(decoder_layers=layers, decoder_embed_dim=size, decoder_input_dim=size,
                             decoder_output_dim=size, decoder_ffn_embed_dim=4 * size,
                             decoder_attention_heads=heads, max_target_positions=1100,
                             share_decoder_input_output_embed=True)  # fmt: skip
            from fairseq.models.transformer_lm import base_lm_architecture

            base_lm_architecture(args)
            model = TransformerLanguageModel.build_model(args, Task(words))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(dtype).eval().requires_grad_(False), words


def sample_of(case: Case, size: int, device: str) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = case.batch_size, case.seq_len
    tokens = torch.randint(4, size, shape, generator=generator).to(device)
    lengths = torch.full((case.batch_size,), case.seq_len, device=device)
    return {"net_input": {"src_tokens": tokens, "src_lengths": lengths}}


def packed(found: list[list[dict[str, Tensor]]], case: Case, beams: int) -> Tensor:
    """Tokens and their scores, (sentences, beams, 2, tokens) in fp64; all have one length."""
    rows = [
        torch.stack([hypothesis["tokens"].double(), hypothesis["positional_scores"].double()])
        for sentence in found
        for hypothesis in sentence
    ]
    return torch.stack(rows).view(case.batch_size, beams, 2, -1)


def calls_of(
    case: Case, model: nn.Module, words: Dictionary, sample: dict[str, dict[str, Tensor]]
) -> tuple[Callable[[], Any], int]:
    """The user's call, and its beams; every hypothesis has all its tokens."""
    beams = BEAMS[case.model, case.batch_size]
    is_lm = case.model in LANGUAGE_MODEL
    most = case.new_tokens + case.seq_len if is_lm else case.new_tokens
    generator = SequenceGenerator(
        [model], words, beam_size=beams, max_len_b=most - 1, min_len=most - 1
    )
    prefix = sample["net_input"]["src_tokens"] if is_lm else None

    def call() -> Any:
        with torch.no_grad():
            return generator.generate([model], sample, prefix_tokens=prefix)

    return call, beams


def check_of(
    case: Case, model: nn.Module, words: Dictionary, sample: dict[str, dict[str, Tensor]]
) -> Callable[[Provider, Tensor], tuple[float, bool]]:
    best: dict[str, Tensor] = {}

    def compare(provider: Provider, result: Tensor) -> tuple[float, bool]:
        """The error is that of the scores of all tokens."""
        tokens, scores = result[:, 0, 0].long(), result[:, 0, 1]
        begin = torch.full_like(tokens[:, :1], words.eos())
        fed = torch.cat([begin, tokens[:, :-1]], 1)
        with torch.no_grad():
            if case.model in LANGUAGE_MODEL:
                logits = model(fed)[0]
            else:
                source = sample["net_input"]
                logits = model(source["src_tokens"], source["src_lengths"], fed)[0]
        expected = torch.stack([
            row.float().log_softmax(-1).gather(1, at[:, None])[:, 0]
            for row, at in zip(logits, tokens, strict=True)
        ])  # fmt: skip
        error = harness.relative_error(scores, expected)
        best[provider.name] = scores.sum(1)
        tolerance = 4 * harness.TOLERANCE[case.dtype]  # scores are differences of sums in fp32
        worse = 0.0
        if BASELINE in best:
            # Where rounding decides, either may find the better one.
            worse = float(
                (best[BASELINE].mean() - best[provider.name].mean()) / scores.sum(1).mean()
            )
            worse = abs(worse)
        if worse > tolerance:
            print(f"  {provider.name}: the best hypotheses score {worse:.1e} differently")
        return error, error <= tolerance and worse <= tolerance

    return compare


def floor_ms(case: Case, model: nn.Module, rates: harness.Rates, beams: int) -> float:
    decoder = model.decoder
    weights = [
        parameter
        for name, parameter in decoder.layers.named_parameters()
        # The encoder's output is projected once.
        if parameter.ndim == 2 and "encoder_attn.k_" not in name and "encoder_attn.v_" not in name
    ]
    weights.append(decoder.output_projection.weight)
    rows, layers = case.batch_size * beams, len(decoder.layers)
    width = 2 * layers * decoder.embed_dim * case.dtype.itemsize
    if case.model in LANGUAGE_MODEL:
        cached = rows * (case.seq_len + case.new_tokens / 2)
    else:
        cached = rows * case.new_tokens / 2 + case.batch_size * case.seq_len
    read = sum(weight.nbytes for weight in weights) + cached * width
    return rates.floor_ms(case.dtype, read, 2 * sum(w.numel() for w in weights) * rows)


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    model, words = build_model(case.model, case.dtype, args.device)
    sample = sample_of(case, len(words), args.device)
    call, beams = calls_of(case, model, words, sample)
    tensor_of = functools.partial(packed, case=case, beams=beams)
    known = (
        Provider(BASELINE, call, one_call_warms=True, tensor_of=tensor_of),
        harness.patched_provider(call, tensor_of=tensor_of),
    )
    named = [name for name in args.providers.split(",") if name]
    providers = [p for p in known if not named or p.name in named]
    found = harness.measure(providers, check_of(case, model, words, sample), args)
    floor = floor_ms(case, model, rates, beams)
    rows = harness.make_rows(case, found, floor, args.device, per=case.new_tokens)
    for row in rows:
        row["model"] = f"{case.model} beam {beams}"
        row["host"] = f"fairseq {importlib.metadata.version('ve-fairseq')}"
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser)
    parser.add_argument("--providers", default="", help="comma-separated, each is checked alone")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    harness.prepare(args)
    logging.disable(logging.INFO)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "float16"))
    shapes = CPU_SHAPES if args.device == "cpu" else GPU_SHAPES
    cases = [
        Case("fairseq_beam", model, batch, seq_len, dtype, new_tokens)
        for model, batch, _, seq_len, new_tokens in shapes
    ]
    cases = harness.selected(cases, args.only)
    rates = harness.measure_rates(args.device, [dtype])
    rows = []
    for case in cases:
        print(harness.title(case), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            found = run_case(case, rates, args)
            harness.record(found, args)
            rows += found
    harness.print_rows(rows)
    return harness.exit_status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
