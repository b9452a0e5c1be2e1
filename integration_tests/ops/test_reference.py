"""The references against PyTorch's own modules in float64: a second opinion. Needs no kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eet_patch.testing import inputs, reference

F64 = torch.float64


def assert_same(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(num_kv_heads, is_causal):
    query, key, value = inputs.attention_inputs(2, 4, 5, 5, 8, F64, "cpu", num_kv_heads)
    expected = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=True, scale=0.3
    )
    out = reference.attention(query, key, value, is_causal=is_causal, softmax_scale=0.3)
    assert_same(out, expected.transpose(1, 2))


def test_attention_masks():
    query, key, value = inputs.attention_inputs(2, 4, 5, 7, 8, F64, "cpu")
    keep = torch.rand(2, 1, 5, 7) < 0.6
    keep[..., 0] = True
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=keep).transpose(1, 2)
    assert_same(reference.attention(query, key, value, attention_mask=keep), expected)
    for lowest in (float("-inf"), torch.finfo(F64).min):
        added = torch.zeros(2, 1, 5, 7, dtype=F64).masked_fill(~keep, lowest)
        assert_same(reference.attention(query, key, value, attention_mask=added), expected)

    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=~padding[:, None, None]
    ).transpose(1, 2)
    assert_same(reference.attention(query, key, value, key_padding_mask=padding), expected)
    left = reference.attention(query, key, value, kv_start=torch.tensor([0, 3]))
    assert_same(left[0], expected[0])
    assert_same(left[1], reference.attention(query, key[:, :, 3:], value[:, :, 3:])[1])


def test_attention_masked_altogether_is_zero():
    query, key, value = inputs.attention_inputs(1, 2, 3, 4, 8, F64, "cpu")
    keep = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    keep[:, :, 1] = False
    out = reference.attention(query, key, value, attention_mask=keep)
    assert (out[:, 1] == 0).all() and (out[:, [0, 2]] != 0).all()


def test_attention_packed():
    lengths = [3, 0, 5]
    query, key, value = (torch.randn(8, 2, 4, dtype=F64) for _ in range(3))
    out = reference.attention(
        query, key, value, cu_seqlens=inputs.cu_seqlens_of(lengths, "cpu"), max_seqlen=5
    )
    for part in (slice(0, 3), slice(3, 8)):
        q, k, v = (t[None, part].transpose(1, 2) for t in (query, key, value))
        assert_same(out[part], F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_layer(norm, weight_layout):
    """Attention block and feed-forward block together are `nn.TransformerEncoderLayer`."""
    options = {"dropout": 0, "activation": "gelu", "batch_first": True, "dtype": F64}
    layer = nn.TransformerEncoderLayer(16, 4, 32, norm_first=norm == "pre", **options)
    x = torch.randn(2, 5, 16, dtype=F64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    turn = (lambda w: w) if weight_layout == "out_in" else (lambda w: w.t())
    attn, norms = layer.self_attn, (layer.norm1, layer.norm2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = layer(x, src_key_padding_mask=padding)
        blocks = [{"norm": norm, "norm_weight": n.weight, "norm_bias": n.bias} for n in norms]
        out = reference.multi_head_attention(
            x,
            *(turn(w) for w in attn.in_proj_weight.chunk(3)),
            *attn.in_proj_bias.chunk(3),
            turn(attn.out_proj.weight),
            attn.out_proj.bias,
            4,
            key_padding_mask=padding,
            norm_eps=1e-5,
            weight_layout=weight_layout,
            **blocks[0],
        )
        out = reference.ffn(
            out,
            turn(layer.linear1.weight),
            layer.linear1.bias,
            turn(layer.linear2.weight),
            layer.linear2.bias,
            weight_layout=weight_layout,
            **blocks[1],
        )
    assert_same(out, expected)


def test_cached_decoding_equals_the_whole():
    given = inputs.attention_block_inputs((2, 6, 16), 4, F64, "cpu", norm="pre")
    x = given.pop("hidden_states")
    whole = reference.masked_multi_head_attention(x, **given)
    key_cache, value_cache = torch.zeros(2, 2, 4, 9, 4, dtype=F64)
    parts = [
        reference.masked_multi_head_attention(
            x[:, start:end], **given, key_cache=key_cache, value_cache=value_cache, past_len=start
        )
        for start, end in ((0, 3), (3, 4), (4, 6))
    ]
    assert_same(torch.cat(parts, dim=1), whole)
    assert (key_cache[:, :, 6:] == 0).all() and (key_cache[:, :, :6] != 0).all()


def test_cross_attention_is_self_attention_over_its_own_keys():
    given = inputs.attention_block_inputs((2, 6, 16), 4, F64, "cpu", norm=None)
    x = given["hidden_states"]
    cross = {k: v for k, v in given.items() if not k.startswith(("key", "value"))}
    for name in ("key", "value"):
        projected = reference.linear(x, given[f"{name}_weight"], given[f"{name}_bias"])
        cross[name] = projected.unflatten(-1, (4, 4)).transpose(1, 2)
    assert_same(
        reference.cross_multi_head_attention(**cross), reference.multi_head_attention(**given)
    )


def test_embedding_is_that_of_bert():
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, hidden_dropout_prob=0
    )
    module = BertEmbeddings(config).double()
    ids, types = torch.randint(50, (2, 7)), torch.randint(2, (2, 7))
    with torch.no_grad():
        expected = module(input_ids=ids, token_type_ids=types)
        out = reference.embedding(
            ids,
            module.word_embeddings.weight,
            torch.arange(7)[None],
            module.position_embeddings.weight,
            types,
            module.token_type_embeddings.weight,
            module.LayerNorm.weight,
            module.LayerNorm.bias,
            config.layer_norm_eps,
        )
    assert_same(out, expected)
