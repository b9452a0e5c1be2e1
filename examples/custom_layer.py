"""A model of one's own from ops: a GPT-2 whose attention and feed-forward run side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from eet_patch import ops


class SideBySide(nn.Module):
    """GPT-2's weights where they lie, but `x + attention(LN(x)) + mlp(LN(x))`, as in GPT-J."""

    def __init__(self, gpt2: GPT2Model) -> None:
        super().__init__()
        self.gpt2, self.heads = gpt2, gpt2.config.n_head

    def forward(self, ids: Tensor, caches: Tensor, past_len: int) -> Tensor:
        """ids (batch, q_len); caches (layers, 2, batch, heads, capacity, head_dim) are written."""
        gpt2, places = self.gpt2, torch.arange(past_len, past_len + ids.shape[1])[None]
        x = ops.embedding(ids, gpt2.wte.weight, places.to(ids.device), gpt2.wpe.weight)
        for block, (keys, values) in zip(gpt2.h, caches, strict=True):
            ln, qkv, out = block.ln_1, block.attn.c_attn, block.attn.c_proj
            fc1, fc2 = block.mlp.c_fc, block.mlp.c_proj
            norm = {"norm": "pre", "norm_weight": ln.weight, "norm_bias": ln.bias}
            how = {**norm, "norm_eps": ln.eps, "weight_layout": "in_out"}
            ffn = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
            y = ops.ffn(x, *ffn, activation="gelu_tanh", add_residual=False, **how)
            mha = (qkv.weight, None, None, qkv.bias, None, None, out.weight, out.bias, self.heads)
            cache = {"key_cache": keys, "value_cache": values, "past_len": past_len}
            x = y + ops.masked_multi_head_attention(x, *mha, **cache, **how)
        return ops.layernorm(x, gpt2.ln_f.weight, gpt2.ln_f.bias, gpt2.ln_f.eps)


def plain(gpt2: GPT2Model, ids: Tensor) -> Tensor:
    """The same in PyTorch, all tokens at once."""
    x = gpt2.wte(ids) + gpt2.wpe(torch.arange(ids.shape[1], device=ids.device))
    for block in gpt2.h:
        y = block.ln_1(x)
        qkv = block.attn.c_attn(y).unflatten(2, (3, gpt2.config.n_head, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x = x + block.attn.c_proj(context) + block.mlp(y)
    return gpt2.ln_f(x)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpt2 = GPT2Model(GPT2Config(n_layer=4, n_embd=128, n_head=4)).to(device).eval()
    model, ids = SideBySide(gpt2), torch.randint(0, 50257, (2, 24), device=device)
    compiled = torch.compile(model, fullgraph=True)  # one graph: torch knows the ops' shapes
    with torch.no_grad():
        expected = plain(gpt2, ids)
        for name, run in (("eager", model), ("compiled", compiled)):
            caches = torch.empty(4, 2, 2, 4, 64, 32, device=device)
            first, rest = (part.contiguous() for part in ids.split((16, 8), 1))
            parts = [run(first, caches, 0), run(rest, caches, 16)]
            error = (torch.cat(parts, 1) - expected).abs().max().item()
            print(f"{name:9} largest difference from plain PyTorch {error:.1e}")
            assert error < 1e-4
