"""Encoders of real and of the largest promised sizes: BERT-large in every dtype, hidden 16384,
sequences of 4096. On a CPU the same tests run at sizes that it can hold.
"""

import gc

import pytest
import torch
import transformers
from helpers import compare, padding, token_ids


@pytest.fixture(autouse=True)
def memory_given_back():
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def built(device, dtype, **sizes):
    """Random weights, made where and as what they are used; biases and norms are random too."""
    config = transformers.BertConfig(vocab_size=300, attn_implementation="sdpa", **sizes)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.BertModel(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
                    else:  # in chunks: noise of its size would be as large as the model
                        for rows in parameter.split(1024):
                            rows.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    finally:
        torch.set_default_dtype(before)
    return model


def compare_lengths(model, device, lengths):
    """Hidden states of real tokens, and pooled ones; on CUDA by a graph, which the third call of a
    shape replays.
    """
    width = max(lengths)
    mask = padding(lengths, width, "right", device)
    ids = token_ids(len(lengths), width, device) * mask

    def last_of(model, name):
        for _ in range(3 if device.type == "cuda" else 1):
            out = model(ids, mask)
        return out[name]

    compare(model, lambda m: last_of(m, "last_hidden_state"), "bert_model", mask)
    compare(model, lambda m: last_of(m, "pooler_output"), "bert_model")


def test_bert_large(device, dtype):
    num_layers, lengths = (24, (128, 9, 77, 128)) if device.type == "cuda" else (3, (40, 9))
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    model = built(device, dtype, num_hidden_layers=num_layers, **sizes)
    compare_lengths(model, device, lengths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_size_16384(device, dtype):
    """Its float64 twin takes 26 GB."""
    hidden_size = 16384 if device.type == "cuda" else 2048
    model = built(
        device,
        dtype,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 128,
        intermediate_size=hidden_size,
        max_position_embeddings=128,
    )
    compare_lengths(model, device, (96, 5, 33))


def test_4096_tokens(device, dtype):
    length = 4096 if device.type == "cuda" else 1100
    model = built(
        device,
        dtype,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=4096,
    )
    compare_lengths(model, device, (length, 1000))
