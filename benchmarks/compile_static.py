"""Fills inductor's cache on disk with the steps that transformers compiles for a static cache, so
that the benchmarks of it, which take a GPU each, don't wait for the compiler. One process a model:

    for m in small xl 8b h1024 h12288; do python benchmarks/compile_static.py $m & done; wait

Names are those of gpt2_generate.py, and h<hidden size> those of gpt2_context.py; all work of these
two is 1024 tokens in all at batch 4. TORCHINDUCTOR_CACHE_DIR must be the same for both.
"""

import argparse

import gpt2_common
import gpt2_context
import torch
from torch import Tensor
from transformers import StoppingCriteria

STEPS = 4
BATCH_SIZE, PROMPT, NEW_TOKENS = 4, 512, 512


class Few(StoppingCriteria):
    """Ends every row after STEPS tokens; the cache is as long as for NEW_TOKENS."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.steps += 1
        over = self.steps >= STEPS
        return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    name = parser.parse_args().model
    if name in gpt2_common.MODELS:
        shape = gpt2_common.MODELS[name]
    else:
        hidden_size = int(name.removeprefix("h"))
        layers = gpt2_context.layers_of(hidden_size, "cuda")
        shape = (layers, hidden_size, hidden_size // gpt2_context.HEAD_DIM)
    with gpt2_common.without_cudnn_attention("cuda"):
        model = gpt2_common.build_model(shape, torch.float16, "cuda")
        prompt = gpt2_common.prompt_of(BATCH_SIZE, PROMPT, "cuda")
        options = gpt2_common.static_options("cuda")
        gpt2_common.generate(model, prompt, NEW_TOKENS, stopping_criteria=[Few()], **options)
        torch.cuda.synchronize()
    print(f"{name}: compiled")


if __name__ == "__main__":
    main()
