"""GPT-2 decoding through `model.generate()`: milliseconds a token, the whole call / new tokens.

    python benchmarks/gpt2_generate.py                       # on a GPU if there is one, else a CPU
    python benchmarks/gpt2_generate.py --models small,xl,8b --only '\\(4,' --compile --slow-runs 3
    python benchmarks/gpt2_generate.py --models 8b,10b --providers eet_patch
    python benchmarks/gpt2_generate.py --models xl --providers transformers-static-compile

Check and floor are those of gpt2_common.py.
"""

import argparse

import gpt2_common
import harness
from gpt2_common import MODELS, STATIC
from harness import BASELINE, PATCHED, Case

CPU_SHAPES = ((1, 64, 64), (4, 64, 64))  # batch, tokens of the prompt, new tokens
GPU_SHAPES = ((4, 512, 512), (16, 512, 512))


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    model = gpt2_common.build_model(MODELS[case.model], case.dtype, args.device)
    prompt = gpt2_common.prompt_of(case.batch_size, case.seq_len, args.device)
    known = gpt2_common.providers_of(case, model, prompt, args.device)
    default = (BASELINE, PATCHED, STATIC) if args.compile else (BASELINE, PATCHED)
    providers = gpt2_common.chosen(known, args.providers, default)
    found = harness.measure(providers, gpt2_common.greedy_check(case, model), args)
    floor_ms = gpt2_common.generation_floor(case, rates, model)
    return harness.make_rows(case, found, floor_ms, args.device, per=case.new_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpt2_common.add_arguments(parser)
    parser.add_argument("--models", default="small", help=f"comma-separated: {', '.join(MODELS)}")
    args = parser.parse_args()
    harness.prepare(args)
    dtype = gpt2_common.dtype_of(args)
    cases = [
        Case("gpt2_generate", name, batch_size, seq_len, dtype, new_tokens)
        for name in gpt2_common.names_of(args, parser)
        for batch_size, seq_len, new_tokens in (CPU_SHAPES if args.device == "cpu" else GPU_SHAPES)
    ]
    return gpt2_common.run_cases(harness.selected(cases, args.only), run_case, args)


if __name__ == "__main__":
    raise SystemExit(main())
