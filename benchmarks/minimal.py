"""The practical limit: Qwen3 and its training step written by hand in plain PyTorch, with nothing around them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)
        self.q = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.gate, self.up = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Minimal(nn.Module):
    """The same network as `qwen3.model.Qwen3` with tied embeddings; `cos` and `sin` are computed once."""

    def __init__(self, hf: dict, length: int) -> None:
        super().__init__()
        head_dim = hf["head_dim"]
        self.embed = nn.Embedding(hf["vocab_size"], hf["hidden_size"])
        self.blocks = nn.ModuleList(
            Block(
                hf["hidden_size"],
                hf["num_attention_heads"],
                hf["num_key_value_heads"],
                head_dim,
                hf["intermediate_size"],
            )
            for _ in range(hf["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(hf["hidden_size"], eps=1e-6)
        frequency = hf["rope_parameters"]["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(length)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.embed.weight)


def copy_weights(model: Minimal, stored: dict[str, Tensor]) -> None:
    """Into the hand-written network, whose weights stand in another order than the names say."""
    names = {"norm1": "attention_norm", "norm2": "ffn_norm", "gate": "w1", "up": "w3", "down": "w2"}
    names |= {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
    with torch.no_grad():
        model.embed.weight.copy_(stored["tok_embeddings.weight"])
        model.norm.weight.copy_(stored["norm.weight"])
        for name, weight in model.blocks.named_parameters():
            i, part, _ = name.split(".")
            (source,) = (s for s in stored if s.startswith(f"layers.{i}.") and f".{names.get(part, part)}." in s)
            weight.copy_(stored[source])
