"""Random shapes, masks, dtypes and entry points of encoders against the unpatched model.

EET_FUZZ_CASES sets how many: 2000 on a GPU take two minutes. A case is made from its number alone.
"""

import functools
import os
import random
from collections import defaultdict

import pytest
import torch
from helpers import BEFORE_5, in_double, tiny_bert

import eet_patch
from eet_patch.testing.accuracy import ERROR_SLACK, MAX_ERROR_RATIO

CASES = int(os.environ.get("EET_FUZZ_CASES", "60"))
MODELS = [  # family, hidden size, heads, inner size, layers, activation
    ("bert", 32, 4, 72, 2, "gelu"),
    ("bert", 64, 1, 64, 1, "relu"),
    ("bert", 128, 2, 512, 3, "gelu_new"),
    ("roberta", 48, 2, 100, 2, "gelu"),
    ("xlm_roberta", 40, 8, 40, 1, "silu"),
    ("electra", 32, 4, 72, 2, "gelu"),
    ("data2vec", 96, 3, 96, 2, "gelu"),
]
NO_SDPA = ("electra", "data2vec")  # before 5.0
ENTRIES = ["model", "tuple", "hidden_states", "embeds", "ids", "encoder", "inference_mode"]
MASKS = ["none", "right", "left", "interior", "random", "bool", "full", "row", "keys", "pairs"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@functools.cache
def models(index, dtype, device):
    family, hidden_size, heads, inner, layers, activation = MODELS[index]
    model = tiny_bert(
        family,
        device,
        dtype,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_hidden_layers=layers,
        hidden_act=activation,
        attn_implementation="eager" if BEFORE_5 and family in NO_SDPA else "sdpa",
    )
    return model, in_double(model)


def make_mask(rng, kind, batch, length, device):
    """The mask that is given, and which positions are real."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    keep = torch.ones(batch, length, dtype=torch.bool)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    places = torch.arange(length)
    if kind in ("right", "bool", "keys", "pairs"):
        keep = places < lengths
    elif kind == "left":
        keep = places >= length - lengths
    elif kind in ("interior", "random", "row"):
        share = 0.9 if kind == "interior" else rng.random()
        keep = torch.rand(batch, length, generator=generator) < share
        keep[:, rng.randrange(length)] = True
    if kind == "row":
        keep[rng.randrange(batch)] = False
    keep = keep.to(device)
    if kind == "none":
        return None, keep
    if kind == "bool":
        return keep, keep
    if kind == "keys":
        return keep[:, None, None, :].expand(batch, 1, length, length), keep
    if kind == "pairs":
        return (keep[:, None, None, :] & keep[:, None, :, None]), keep
    return keep.long(), keep


def run(model, entry, ids, mask, extra):
    """All real-valued outputs, in the shape (batch, length, ...)."""
    if mask is not None and mask.dim() == 4:
        # transformers passes a mask of four dimensions on as it is: additive where it wants that.
        if BEFORE_5 or model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
                ~mask, lowest
            )
    if BEFORE_5 and mask is not None and mask.dim() == 4:
        hidden = model.embeddings(ids)
        if hasattr(model, "embeddings_project"):
            hidden = model.embeddings_project(hidden)
        return [model.encoder(hidden, mask)[0]]
    given = {"attention_mask": mask}
    if entry == "tuple":
        return [model(ids, return_dict=False, **given)[0]]
    if entry == "hidden_states":
        return list(model(ids, output_hidden_states=True, **given).hidden_states)
    if entry == "embeds":
        embeds = model.embeddings.word_embeddings(ids)
        return [model(inputs_embeds=embeds, **given).last_hidden_state]
    if entry == "ids":
        return [model(ids, **extra, **given).last_hidden_state]
    if entry == "encoder":
        hidden = model.embeddings(ids)
        if hasattr(model, "embeddings_project"):
            hidden = model.embeddings_project(hidden)
        return [model.encoder(hidden, attention_mask=None)[0]]
    return [model(ids, **given).last_hidden_state]


def squared_error(out, truth):
    return float((out.double() - truth).square().sum()), float(truth.square().sum())


def check_case(number, device, totals):
    rng = random.Random(number)
    dtype = rng.choice(DTYPES)
    model, double = models(rng.randrange(len(MODELS)), dtype, device)
    batch = rng.choice([1, 1, 2, 3, 5, 8, 17])
    length = rng.choice([1, 2, 7, 16, 31, 40, 64, 65, 80])
    entry, kind = rng.choice(ENTRIES), rng.choice(MASKS)
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 300, (batch, length), generator=generator).to(device)
    mask, keep = make_mask(rng, kind, batch, length, device)
    if entry == "encoder" and not (BEFORE_5 and mask is not None and mask.dim() == 4):
        keep = torch.ones_like(keep)
    positions = (torch.arange(length) + rng.randrange(8)) % 80
    extra = {
        "token_type_ids": torch.randint(0, 2, (batch, length), generator=generator).to(device),
        "position_ids": positions.expand(batch, length).contiguous().to(device),
    }
    mode = torch.inference_mode if entry == "inference_mode" else torch.no_grad
    case = f"case {number}: {model.config.model_type} {dtype} ({batch}, {length}) {entry} {kind}"
    with mode():
        own = run(model, entry, ids, mask, extra)
        truth = run(double, entry, ids, mask, extra)
        with eet_patch.enabled():
            # The second call captures a graph where there is a GPU, the third replays it.
            outs = [run(model, entry, ids, mask, extra) for _ in range(3)]
    seen = keep.any(1)
    for out in outs:
        for index, (mine, first, theirs, right) in enumerate(
            zip(out, outs[0], own, truth, strict=True)
        ):
            assert torch.equal(mine, first), f"{case}: two runs differ"
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, case
            padding = mine[~keep]
            assert index < len(out) - 1 or entry == "hidden_states" or not padding.any(), case
            assert bool(mine[seen].isfinite().all()), f"{case}: output {index} is not finite"
            error, size = squared_error(mine[keep], right[keep])
            own_error, _ = squared_error(theirs[keep], right[keep])
            # One small case says little about the ratio of two errors; all together hold the bound.
            allowed = 3 * own_error**0.5 + 4 * EPS[dtype] * size**0.5
            assert error**0.5 <= allowed, f"{case}: output {index}, {error**0.5} > {allowed}"
    for mine, theirs, right in zip(outs[0], own, truth, strict=True):
        totals[dtype] += torch.tensor(
            [
                squared_error(mine[keep], right[keep])[0],
                squared_error(theirs[keep], right[keep])[0],
                float(right[keep].square().sum()),
            ],
            dtype=torch.float64,
        )


def check_cases(numbers, device):
    totals = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    eet_patch.reset_report()
    for number in numbers:
        check_case(number, device, totals)
    for dtype, (error, own, size) in totals.items():
        error, own = (error / size) ** 0.5, (own / size) ** 0.5
        assert error <= MAX_ERROR_RATIO * own + ERROR_SLACK, f"{dtype}: {error} against {own}"
    rows = eet_patch.report().targets
    replaced = sum(row.replaced for row in rows if row.name.endswith(("_model", "_encoder")))
    assert replaced >= len(numbers)  # of three calls a case


def test_random_calls(device):
    check_cases(range(CASES), device)


@pytest.fixture(autouse=True, scope="module")
def forget_models():
    yield
    models.cache_clear()


if __name__ == "__main__":  # a device and a range of cases
    import sys

    check_cases(range(int(sys.argv[2]), int(sys.argv[3])), torch.device(sys.argv[1]))
    print(eet_patch.report(), "\nall right")
