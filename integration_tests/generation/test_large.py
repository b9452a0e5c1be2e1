"""The largest sizes that are promised: hidden 16384, sequences of 16384, a vocabulary of 256k. On a
CPU the same tests run at sizes that it can hold.
"""

import gc

import pytest
import torch
import transformers
from helpers import assert_as_accurate, in_double, patched, token_ids
from transformers import DynamicCache

CHUNK = 1024  # tokens of a float64 forward at a time, for its attention has no kernel but the plain


@pytest.fixture(autouse=True)
def memory_given_back():
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def large_gpt2(device, dtype, **sizes):
    """Built where it is used, with weights at which tokens vary: positions weigh most, and the
    output embedding is not the input's.
    """
    config = transformers.GPT2Config(
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        **sizes,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.GPT2LMHeadModel(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(noise, alpha=0.2)
            else:
                std = {"wpe": 0.9, "wte": 0.3}.get(name.split(".")[1])
                std = std or 1.2 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, std, generator=generator)
    return model.requires_grad_(False)


def generated(model, tokens, mask, new):
    return model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


def logits_of(model, tokens, mask, new):
    """Of the positions that chose the last `new` tokens, over a cache that is filled in chunks."""
    more = mask.new_ones(mask.shape[0], tokens.shape[1] - mask.shape[1])
    mask = torch.cat([mask, more], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, last = DynamicCache(config=model.config), None
    for begin in range(0, tokens.shape[1] - new, CHUNK):
        end = min(begin + CHUNK, tokens.shape[1] - new)
        last = step(model, tokens, mask, positions, cache, begin, end, 1)
    rest = step(model, tokens, mask, positions, cache, end, tokens.shape[1] - 1, new - 1)
    return torch.cat([last, rest], 1)


def step(model, tokens, mask, positions, cache, begin, end, keep):
    with torch.no_grad():
        return model(
            input_ids=tokens[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits


def assert_right(model, tokens, mask, new):
    """Logits of each step within promise 1, each run against float64 over its own tokens; tokens
    chosen on the device the best of them.
    """
    own = generated(model, tokens, mask, new)
    with patched("gpt2_sample"):
        out = generated(model, tokens, mask, new)
        plain = model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
    double = in_double(model)
    truths = [logits_of(double, run.sequences, mask, new) for run in (own, out)]
    own_logits, logits = (torch.stack(run.logits, 1) for run in (own, out))
    # assert_as_accurate compares with one truth; where the tokens are equal both are the same.
    shifted = own_logits.double() - truths[0] + truths[1]
    assert_as_accurate(logits.double(), shifted, truths[1], "logits of each step")
    apart = 2 * (own_logits.double() - truths[0]).abs().max()
    best = truths[1].gather(2, out.sequences[:, -new:, None])[..., 0]
    assert float((truths[1].amax(2) - best).max()) <= apart
    assert len(plain[:, -new:].unique()) > new / 4, "tokens that repeat show little"
    different = plain != out.sequences
    for row in different.any(1).nonzero()[:, 0].tolist():
        at = int(different[row].int().argmax()) - tokens.shape[1]
        two = truths[1][row, at].topk(2).values
        assert float(two[0] - two[1]) <= apart, f"row {row} parts at new token {at}"


def with_padding(tokens, padded):
    mask = torch.ones_like(tokens)
    mask[0, :padded] = 0
    return tokens * mask, mask


def test_hidden_16384(device):
    hidden_size, dtype, layers = 1024, torch.float32, 1
    if device.type == "cuda":
        hidden_size, dtype = 16384, torch.float16
        room = torch.cuda.get_device_properties(device).total_memory
        if room < 60e9:
            pytest.skip("one layer of hidden size 16384 takes 26 GB in float64, and 7 in float16")
        layers = 2 if room > 120e9 else 1
    model = large_gpt2(
        device,
        dtype,
        n_embd=hidden_size,
        n_head=hidden_size // 128,
        n_layer=layers,
        vocab_size=1000,
        n_positions=64,
    )
    tokens, mask = with_padding(token_ids(4, 24, device, 1000), 7)
    assert_right(model, tokens, mask, 16)


def test_sequence_of_16384(device, dtype):
    length, new = (16384, 40) if device.type == "cuda" else (600, 20)
    model = large_gpt2(
        device, dtype, n_embd=512, n_head=8, n_layer=2, vocab_size=1000, n_positions=length
    )
    tokens, mask = with_padding(token_ids(2, length - new, device, 1000), 100)
    assert_right(model, tokens, mask, new)


def test_vocabulary_of_256k(device, dtype):
    vocab_size = 262144 if device.type == "cuda" else 70000
    model = large_gpt2(
        device, dtype, n_embd=128, n_head=2, n_layer=2, vocab_size=vocab_size, n_positions=64
    )
    tokens, mask = with_padding(token_ids(3, 12, device, vocab_size), 4)
    assert_right(model, tokens, mask, 16)
