"""What the tests against fairseq share: its commands, in this process and in their own, what they
print, and tiny models.
"""

import contextlib
import copy
import io
import json
import os
import re
import subprocess
from argparse import Namespace
from dataclasses import dataclass, field

import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer import TransformerConfig, TransformerModel, base_architecture
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from fairseq_cli import eval_lm, generate
from helpers import assert_replaced, in_place, randomised
from train_tiny_fairseq import command

import eet_patch

ENCODER, DECODER = "fairseq_encoder_layer", "fairseq_decoder_layer"
WHOLE_ENCODER, SEARCH = "fairseq_encoder", "fairseq_search"
MAX_SCORE_DIFFERENCE = 1e-4
PAD, EOS, VOCAB = 1, 2, 60


# --- commands ------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a generation command printed: "H-3.0" -> (score, text) for the first hypothesis of
    sentence 3, and so on for the other lines that hold scores; `said` is its last line.
    """

    text: str
    hypotheses: dict = field(default_factory=dict)
    positional: dict = field(default_factory=dict)
    alignments: dict = field(default_factory=dict)
    said: str = ""


def parse(text):
    result, seen = Result(text), {}
    for line in text.splitlines():
        match = re.match(r"([A-Z])-(\d+)\t(.*)", line)
        if not match:
            result.said = re.sub(r" in \S+s .*", "", line) if line.strip() else result.said
            continue
        kind, number, rest = match.groups()
        rank = seen.get((kind, number), 0)
        seen[kind, number] = rank + 1
        key = f"{number}.{rank}"
        if kind == "H":
            score, _, words = rest.partition("\t")
            result.hypotheses[key] = (float(score), words)
        elif kind == "P":
            result.positional[key] = [float(score) for score in rest.split()]
        elif kind == "A":
            result.alignments[key] = rest
    return result


def assert_same(out, own):
    """The same hypotheses in the same order, scores within 1e-4, the same alignments and BLEU."""
    assert own.hypotheses, own.text[-2000:]
    assert out.hypotheses.keys() == own.hypotheses.keys()
    for key, (score, words) in own.hypotheses.items():
        assert out.hypotheses[key][1] == words, key
        assert abs(out.hypotheses[key][0] - score) <= MAX_SCORE_DIFFERENCE, key
    for key, scores in own.positional.items():
        torch.testing.assert_close(
            torch.tensor(out.positional[key]),
            torch.tensor(scores),
            rtol=0,
            atol=MAX_SCORE_DIFFERENCE + 1e-4,  # printed with four digits
        )
    assert out.alignments.keys() == own.alignments.keys()
    for key, pairs in own.alignments.items():
        assert_same_alignment(out.alignments[key], pairs)
    assert out.said == own.said


def assert_same_alignment(out, own):
    """Hard alignments are pairs as "0-1"; soft ones are probabilities, printed after commas."""
    if "," not in own:
        assert out == own
        return
    numbers = [torch.tensor([float(n) for n in re.split(r"[\s,]+", t.strip())]) for t in (out, own)]
    torch.testing.assert_close(*numbers, rtol=0, atol=1e-4)


def configured(name, *arguments):
    """A fairseq command's arguments as its `main` takes them."""
    parser = {
        "fairseq-generate": options.get_generation_parser,
        "fairseq-eval-lm": options.get_eval_lm_parser,
    }[name]
    words = [*map(str, arguments), "--cpu", "--num-workers", "0"]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser(), words))


def in_this_process(name, config):
    """Runs a fairseq command's own `main`; what it prints, and what it returns."""
    main = {"fairseq-generate": generate.main, "fairseq-eval-lm": eval_lm.main}[name]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        returned = main(copy.deepcopy(config))
    return printed.getvalue(), returned


def generate_both(trained, name, *arguments, subset="test1", level="loop", **enabled):
    """fairseq-generate over the fixture's small test set, unpatched and patched; asserts that
    every search was replaced, at `level` "layer" every call of a layer, and with None nothing.
    """
    if level == "layer":
        enabled = {"exclude": (WHOLE_ENCODER, SEARCH), **enabled}
    config = configured(
        "fairseq-generate",
        trained / "corpus" / "data",
        "--path",
        trained / name / "model.pt",
        "--gen-subset",
        subset,
        "--max-tokens",
        "600",
        *arguments,
    )
    own = parse(in_this_process("fairseq-generate", config)[0])
    with eet_patch.enabled(**{"strict": True, **enabled}):
        out = parse(in_this_process("fairseq-generate", config)[0])
        if level is not None:
            for name in (WHOLE_ENCODER, SEARCH) if level == "loop" else (ENCODER, DECODER):
                assert_replaced(name)
    return own, out


def run_command(name, *arguments, stdin=None, check=True, **environment):
    """Runs a fairseq command as a user does, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), *in_place()]))
    done = subprocess.run(
        [*command(name), *map(str, arguments), "--cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        input=stdin,
        env=env,
    )
    if check:
        said = done.stdout[-3000:] + done.stderr
        assert done.returncode == 0, f"exit {done.returncode}\n{said}"
    return done


def run_both(tmp_path, name, *arguments, stdin=None):
    """Runs a command without and with the flag; returns both and the report of the second."""
    own = run_command(name, *arguments, stdin=stdin, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    report = tmp_path / "report.json"
    flag = ["--user-dir", eet_patch.fairseq_dir()]
    out = run_command(name, *arguments, *flag, stdin=stdin, EET_REPORT=str(report))
    rows = {row["name"]: row for row in json.loads(report.read_text())["targets"]}
    return own, out, rows


# --- tiny models ---------------------------------------------------------------------------------


def layer_config(**changes):
    """A configuration of one layer; `encoder.`/`decoder.` keys by "encoder__embed_dim"."""
    cfg = TransformerConfig()
    for part in ("encoder", "decoder", "quant_noise"):
        setattr(cfg, part, getattr(cfg, part)())  # the defaults are the classes themselves
    for side in (cfg.encoder, cfg.decoder):
        side.embed_dim, side.attention_heads, side.ffn_embed_dim = 32, 4, 72
        side.normalize_before = changes.pop("normalize_before", side.normalize_before)
        changes["normalize_before"] = side.normalize_before
    cfg.dropout = cfg.attention_dropout = cfg.activation_dropout = 0.1
    changes.pop("normalize_before")
    for name, value in changes.items():
        side, _, key = name.rpartition("__")
        setattr(getattr(cfg, side) if side else cfg, key, value)
    return cfg


def decoder_layer(device="cpu", dtype=torch.float32, no_encoder_attn=False, **changes):
    layer = TransformerDecoderLayerBase(layer_config(**changes), no_encoder_attn=no_encoder_attn)
    return randomised(layer).to(device, dtype)


def encoder_layer(device="cpu", dtype=torch.float32, **changes):
    return randomised(TransformerEncoderLayerBase(layer_config(**changes))).to(device, dtype)


def dictionary():
    made = Dictionary()
    for number in range(VOCAB - len(made)):
        made.add_symbol(f"w{number}")
    return made


class Task:
    """What a model needs of a task to be built."""

    source_dictionary = target_dictionary = dictionary()


def tiny_args(**changes):
    """A translation model's arguments as older code passes them on, flat."""
    sizes = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 72, "attention_heads": 4}
    settings = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sizes.items()}
    settings |= {"max_source_positions": 64, "max_target_positions": 64}
    args = Namespace(**settings | changes)
    base_architecture(args)
    return args


def tiny_model(device="cpu", dtype=torch.float32, **changes):
    """A translation model of two layers a side with random weights, ready for inference."""
    model = TransformerModel.build_model(tiny_args(**changes), Task)
    return randomised(model).to(device, dtype)


def batch(lengths, side, device="cpu", seed=1):
    """Token ids (len(lengths), longest), padded on `side`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(4, VOCAB, (len(lengths), width), generator=generator)
    for row, length in enumerate(lengths):
        padding = slice(length, width) if side == "right" else slice(0, width - length)
        ids[row, padding] = PAD
    return ids.to(device)
