"""Train a small GPT-2 on the docstrings of the standard library: a minute or so on two cores.

    python examples/train_tiny_gpt2.py            # prints the folder, and a sample
    python examples/train_tiny_gpt2.py --out DIR  # elsewhere than ~/.cache/eet_patch/tiny_gpt2

A model with random weights is a poor test of generation: its logits are almost flat, so that
rounding alone changes the tokens. This one has learnt real text, needs no download, and loads as
any other:

    AutoModelForCausalLM.from_pretrained(tiny_gpt2_path())
    AutoTokenizer.from_pretrained(tiny_gpt2_path())
"""

import argparse
import ast
import inspect
import os
import shutil
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

DEFAULT_OUT = Path.home() / ".cache" / "eet_patch" / "tiny_gpt2"
END_OF_TEXT = "<|endoftext|>"
SEED = 0

# The vocabulary is small because the corpus is: each of 2048 entries is seen often in a minute.
VOCAB_SIZE = 2048
CONTEXT = 256
SHORT_CONTEXT = 64  # most steps see short windows: the first things to learn are local
LONG_STEPS = 80
STEPS = 400
TOKENS_PER_STEP = 1024
WARMUP_STEPS = 20
MATRIX_LEARNING_RATE = 2e-2
LEARNING_RATE = 6e-3
MAX_THREADS = 4  # more threads only wait for each other at this size


def read_paragraphs() -> list[str]:
    """Return each paragraph of prose in the library's docstrings once, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paragraphs: dict[str, None] = {}  # a dict keeps the order and drops repeats
    for path in sorted(root.rglob("*.py")):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates in other encodings lie there too
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = inspect.cleandoc(ast.get_docstring(node) or "")
                for block in docstring.split("\n\n"):
                    text = " ".join(block.split())
                    if is_prose(text):
                        paragraphs[text] = None
    return list(paragraphs)


def is_prose(text: str) -> bool:
    """True for whole sentences; tables, signatures and sessions of the interpreter are left out."""
    if len(text) < 40 or not text[0].isupper() or text[-1] not in ".:" or ">>>" in text:
        return False
    return sum(char.isalpha() or char == " " for char in text) > 0.9 * len(text)


def train_tokenizer(texts: list[str]) -> GPT2TokenizerFast:
    """Train a byte-level BPE tokenizer with GPT-2's own rules on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # what generate() wants
        model_max_length=CONTEXT,
    )


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T of `matrix` = U S V^T, by five Newton-Schulz steps.

    Source: Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. With updates of
    this kind a minute is enough: AdamW alone was at a loss of 5.4 where these were at 4.4.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T) * max(1.0, matrix.shape[1] / matrix.shape[0]) ** 0.5


def train_model(token_ids: Tensor, end_id: int, generator: torch.Generator) -> GPT2LMHeadModel:
    """Train on windows drawn at random from the 1-D int64 `token_ids`."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT,
        n_embd=192,
        n_layer=4,
        n_head=6,
        resid_pdrop=0.0,  # about one pass over the text: nothing to regularise
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    model = GPT2LMHeadModel(config).train()
    matrices = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]
    momenta = [torch.zeros_like(weight) for weight in matrices]
    others = [p for p in model.parameters() if not any(p is weight for weight in matrices)]
    optimizer = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(STEPS):
        scale = min(1.0, (step + 1) / WARMUP_STEPS, 1.4 * (STEPS - step) / STEPS)
        length = SHORT_CONTEXT if step < STEPS - LONG_STEPS else CONTEXT
        starts = torch.randint(
            len(token_ids) - length, (TOKENS_PER_STEP // length,), generator=generator
        )
        batch = torch.stack([token_ids[start : start + length] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
        optimizer.step()
        with torch.no_grad():
            for weight, momentum in zip(matrices, momenta, strict=True):
                momentum.lerp_(weight.grad, 0.05)
                update = orthogonalise(weight.grad.lerp(momentum, 0.95))
                weight.sub_(update, alpha=MATRIX_LEARNING_RATE * scale)
        model.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:4d}  loss {loss.item():.2f}", flush=True)
    return model.eval()


def build(out: Path) -> None:
    """Train and save into `out`; the folder appears at once and whole, so two builds cannot mix."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        texts = read_paragraphs()
        tokenizer = train_tokenizer(texts)
        ids = tokenizer(END_OF_TEXT.join(texts), verbose=False)["input_ids"]
        threads = torch.get_num_threads()
        torch.set_num_threads(min(threads, MAX_THREADS))
        try:
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
                torch.manual_seed(SEED)
                generator = torch.Generator().manual_seed(SEED)
                with torch.enable_grad():
                    model = train_model(torch.tensor(ids), tokenizer.eos_token_id, generator)
        finally:
            torch.set_num_threads(threads)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            os.rename(shutil.copytree(scratch, f"{scratch}.done"), out)
        except OSError:  # another process was first; its model is the same
            shutil.rmtree(f"{scratch}.done", ignore_errors=True)
            if not is_complete(out):
                raise


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))


def tiny_gpt2_path(out: str | os.PathLike[str] = DEFAULT_OUT) -> str:
    """Return the folder of the trained model; trains it first if it is not there yet."""
    out = Path(out)
    if not is_complete(out):
        build(out)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the model")
    started = time.perf_counter()
    path = tiny_gpt2_path(parser.parse_args().out)
    print(f"{path} (ready after {time.perf_counter() - started:.0f} s)")

    tokenizer = GPT2TokenizerFast.from_pretrained(path)
    model = GPT2LMHeadModel.from_pretrained(path).eval()
    for prompt in ("Return the", "This module", "Raise ValueError if"):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print("-", repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main()
