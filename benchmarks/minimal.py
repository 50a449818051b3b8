"""The practical limit: each family and its training step written by hand in plain PyTorch, with nothing around them.

Sizes are read from our configurations and weights have our names, so that `load_state_dict` copies them. Cosines and
sines are computed once, and so is a mask. Experts are a loop over those that tokens chose; sinks are a column of
the logits. Letters: B rows, L length, T tokens, D width, N heads, E experts, K choices of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Turn = Callable[[Tensor], Tensor]
"""Rotates heads (B, N, L, H) by the positions of their tokens."""


def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


class Attention(nn.Module):
    def __init__(self, c: Any, dim: int, eps: float, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.window = c.head_dim, window
        self.wq = linear(dim, c.n_heads * c.head_dim, c.bias)
        self.wk = linear(dim, c.n_kv_heads * c.head_dim, c.bias)
        self.wv = linear(dim, c.n_kv_heads * c.head_dim, c.bias)
        self.wo = linear(c.n_heads * c.head_dim, dim, c.bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, eps=eps) if c.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(c.n_heads)) if c.sinks else None

    def forward(self, x: Tensor, turn: Turn, masks: dict[int | None, Tensor]) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = turn(self.q_norm(q)), turn(self.k_norm(k))
        if self.sinks is None:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            h = attend_with_sinks(q, k, v, self.sinks, masks[self.window])
        return self.wo(h.transpose(1, 2).flatten(-2))


def attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """As in GPT-OSS's paper: the softmax has one column more, which is then left out."""
    k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], 1) for side in (k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
    column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat((logits, column), -1).softmax(-1)[..., :-1] @ v


class LatentAttention(nn.Module):
    """Values are narrower than keys; padded they meet PyTorch's fused kernel, which was faster than its other path."""

    def __init__(self, c: Any, dim: int, scale: float) -> None:
        super().__init__()
        self.c, self.scale, key_dim = c, scale, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.wq_a, self.q_norm = linear(dim, c.q_lora_rank), nn.RMSNorm(c.q_lora_rank, eps=1e-6)
        self.wq_b = linear(c.q_lora_rank, c.n_heads * key_dim)
        self.wkv_a = linear(dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = nn.RMSNorm(c.kv_lora_rank, eps=1e-6)
        self.wkv_b = linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.wo = linear(c.n_heads * c.v_head_dim, dim)

    def forward(self, x: Tensor, turn: Turn, masks: dict[int | None, Tensor]) -> Tensor:
        c = self.c
        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)
        q, q_turned = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        latent, k_turned = self.wkv_a(x).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        kv = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)
        k, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        q = torch.cat((q, turn(q_turned)), -1)
        k = torch.cat((k, turn(k_turned.unsqueeze(1)).expand(-1, c.n_heads, -1, -1)), -1)
        v = F.pad(v, (0, q.shape[-1] - c.v_head_dim))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)[..., : c.v_head_dim]
        return self.wo(h.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = linear(dim, hidden_dim), linear(dim, hidden_dim), linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    def __init__(self, c: Any, dim: int) -> None:
        super().__init__()
        self.c, self.gate = c, linear(dim, c.n_experts, c.bias)
        self.balance_loss = torch.zeros(())
        if c.load_balance_coeff is not None:
            self.register_buffer("selection_bias", torch.zeros(c.n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts (T, K) of each token of (B, L, D), and their weights."""
        c, logits = self.c, self.gate(x)
        score = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            ids = self.choose(score)
        weight = score.gather(-1, ids)
        weight = weight / weight.sum(-1, keepdim=True) * c.route_scale
        chosen = F.one_hot(ids, c.n_experts).sum((1, 2))
        share = (score / score.sum(-1, keepdim=True)).sum(1)
        even = chosen * (c.n_experts / (c.top_k * x.shape[1]))
        self.balance_loss = c.balance_loss_coeff * (even * share).sum() / x.shape[:2].numel()
        if c.load_balance_coeff is not None:  # for the next step: this one has made its choice
            load = chosen.sum(0).float()
            sign = (load.mean() - load).sign()
            self.selection_bias += c.load_balance_coeff * (sign - sign.mean())
        return ids.flatten(0, 1), weight.flatten(0, 1)

    def choose(self, score: Tensor) -> Tensor:
        c = self.c
        if c.load_balance_coeff is not None:
            score = score + self.selection_bias
        if c.n_groups > 1:
            groups = score.unflatten(-1, (c.n_groups, -1))
            best = groups.topk(2, -1).values.sum(-1).topk(c.n_limited_groups, -1).indices
            outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            score = groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
        return score.topk(c.top_k, -1).indices


class Stacked(nn.Module):
    """One matrix per expert."""

    def __init__(self, n_experts: int, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_experts, n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_experts, n_out)) if bias else None

    def each(self) -> list[tuple[Tensor, Tensor | None]]:
        biases = [None] * len(self.weight) if self.bias is None else self.bias.unbind()
        return list(zip(self.weight.unbind(), biases, strict=True))


class Experts(nn.Module):
    def __init__(self, c: Any, n_experts: int, dim: int) -> None:
        super().__init__()
        self.clamped = c.activation == "clamped_swiglu"
        self.w1, self.w3 = (Stacked(n_experts, dim, c.hidden_dim, c.bias) for _ in range(2))
        self.w2 = Stacked(n_experts, c.hidden_dim, dim, c.bias)

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, (w1, w3, w2) in enumerate(zip(self.w1.each(), self.w3.each(), self.w2.each(), strict=True)):
            token, choice = torch.where(ids == e)
            h = x[token]
            gate, up = F.linear(h, *w1), F.linear(h, *w3)
            if self.clamped:
                gate, up = gate.clamp(max=7), up.clamp(-7, 7)
                h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                h = F.silu(gate) * up
            y = y.index_add(0, token, F.linear(h, *w2) * weight[token, choice, None])
        return y


class MoE(nn.Module):
    def __init__(self, c: Any, dim: int) -> None:
        super().__init__()
        self.router, self.experts = Router(c.router, dim), Experts(c.experts, c.router.n_experts, dim)
        self.shared_experts = None if c.shared_experts is None else FeedForward(dim, c.shared_experts.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts(x.flatten(0, 1), *self.router(x)).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Block(nn.Module):
    def __init__(self, c: Any, attention: nn.Module, dense: bool) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(c.dim, eps=c.norm_eps) for _ in range(2))
        self.attention = attention
        if dense:
            self.feed_forward = FeedForward(c.dim, c.feed_forward.hidden_dim)
        else:
            self.moe = MoE(c.moe, c.dim)
        self.network = [self.feed_forward if dense else self.moe]  # a list, or the weights would have two names

    def forward(self, x: Tensor, turn: Turn, masks: dict[int | None, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, masks)
        return x + self.network[0](self.ffn_norm(x))


class Minimal(nn.Module):
    """The same network as one of ours with the configuration `c`, whose angles have the cosines and sines (L, H/2).

    `softmax_scale` is that of latent attention."""

    def __init__(self, c: Any, cos: Tensor, sin: Tensor, softmax_scale: float = 0.0) -> None:
        super().__init__()
        self.rotate = rotate_pairs if c.rope.layout == "interleaved" else rotate_halves
        self.tok_embeddings, self.norm = nn.Embedding(c.vocab_size, c.dim), nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.output = linear(c.dim, c.vocab_size)
        if c.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.layers = nn.ModuleDict()
        for i in range(c.n_layers):
            if hasattr(c.attention, "kv_lora_rank"):
                attention: nn.Module = LatentAttention(c.attention, c.dim, softmax_scale)
            else:
                window = None if i % 2 else c.attention.window
                attention = Attention(c.attention, c.dim, c.norm_eps, window)
            dense = not hasattr(c, "moe") or i < getattr(c, "n_dense_layers", 0)
            self.layers[str(i)] = Block(c, attention, dense)
        self.cos, self.sin, self.masks = cos, sin, {}
        if getattr(c.attention, "sinks", False):
            back = torch.arange(len(cos))[:, None] - torch.arange(len(cos))
            for window in (None, c.attention.window):
                hidden = (back < 0) | (back >= (window or len(cos)))
                self.masks[window] = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x, lambda heads: self.rotate(heads, self.cos, self.sin), self.masks)
        return self.output(self.norm(x))

    def balance_loss(self) -> Tensor | float:
        """Of the last forward: joins the loss in training."""
        return sum(part.balance_loss for part in self.modules() if isinstance(part, Router))


def minimal_of(model: Any, length: int) -> Minimal:
    """The hand-written network with the weights of one of ours, for rows of `length` tokens."""
    rotation = model.rope(torch.arange(length)[None])
    scale = getattr(model.layers["0"].attention, "softmax_scale", 0.0)
    minimal = Minimal(model.config, rotation.cos[0, :, 0], rotation.sin[0, :, 0], scale)
    minimal.load_state_dict(model.state_dict())
    return minimal
