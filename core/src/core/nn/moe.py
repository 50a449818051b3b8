"""Mixture of experts: route -> dispatch -> experts -> combine.

A gate, one matrix in fp32, gives each token a logit for each expert; softmax or sigmoid makes it a score, and the token
goes to the K experts with the best ones. With groups, which lie on machines of their own, it chooses from the experts
of the best groups alone. A token and a choice are a row: rows are sorted by expert, sent to where it lives, and
multiplied group by group; the results return and are summed, each times its score. The score is the only path of a
gradient to the gate: the choice itself has none, and is kept for backward, never made again. What keeps the gate from
always choosing the same few experts is told in `core.nn.balance`.

Letters: B rows, L length, T = B L tokens, D width, E experts, G groups of experts, K choices of a token, R = T K rows
for experts, F hidden width of an expert.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.activation_checkpoint.region import is_recomputing, kept, off_the_record
from core.config.configurable import Configurable
from core.nn.dispatch import Dispatcher, Local, count
from core.nn.feed_forward import FeedForward, swiglu
from core.nn.grouped import GroupedLinear, to_autocast
from core.nn.module import Flops, Module, cpu_forms, inference_forms, size_problems
from core.nn.start import Constant, Normal, Scale


class Gate(Module):
    """Logits of the experts, in fp32 on every device: weight (E, D), bias (E)."""

    def __init__(self, dim: int, n_experts: int, *, std: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.bias = nn.Parameter(torch.empty(n_experts)) if bias else None
        self.start = {"weight": Normal(std), "bias": Constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        with nullcontext() if inference_forms(x) else torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(matmul=2 * self.weight.numel())


class Choice(NamedTuple):
    """The experts that each token chose, and the weight of each answer in fp32."""

    ids_TK: Tensor
    weight_TK: Tensor


class Router(Module, Configurable):
    """Chooses `top_k` experts for each token.

    Two means keep experts evenly loaded: a bias that only the choice sees, moved once per step against the load
    (arXiv:2408.15664; `core.nn.balance`), and a loss per sequence (arXiv:2412.19437, equations 17 to 20).
    """

    AXES = {"gate": ("choices", "embed")}

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        n_experts: int
        """Number of experts."""
        top_k: int
        """Experts per token."""
        score: Literal["softmax", "sigmoid"] = "softmax"
        """How logits become scores."""
        normalise: bool = True
        """Divide the weights of a token's experts by their sum."""
        route_scale: float = 1.0
        """Factor on the weights."""
        bias: bool = False
        """Add a bias to the logits."""
        n_groups: int = 1
        """Groups that the experts form, in order; with several, a token chooses from the best ones only."""
        n_limited_groups: int = 1
        """Groups that a token chooses from."""
        group_score: Literal["sum_of_two", "max"] = "sum_of_two"
        """What makes a group good: its two best experts, or its best one."""
        load_balance_coeff: float | None = None
        """Step of the bias on the choice; without it there is no such bias."""
        balance_loss_coeff: float = 0.0
        """Weight of the balance loss of each sequence; its denominator is that of the loss."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if wrong := list(size_problems(self, "n_experts")):
                yield from wrong
                return
            if not 1 <= self.top_k <= self.n_experts:
                yield "top_k", f"top_k {self.top_k} must be from 1 to n_experts {self.n_experts}"
            yield from self._group_problems()
            if not self.route_scale > 0:
                yield "route_scale", f"route_scale {self.route_scale} must be above 0"
            if self.load_balance_coeff is not None and not self.load_balance_coeff > 0:
                yield "load_balance_coeff", f"load_balance_coeff {self.load_balance_coeff} must be above 0, or None"
            if not self.balance_loss_coeff >= 0:
                yield "balance_loss_coeff", f"balance_loss_coeff {self.balance_loss_coeff} must not be negative"

        def _group_problems(self) -> Iterator[tuple[str, str]]:
            n_experts, n_groups, limit = self.n_experts, self.n_groups, self.n_limited_groups
            if n_groups < 1 or n_experts % n_groups:
                fits = ", ".join(str(n) for n in range(1, n_experts + 1) if n_experts % n == 0)
                yield "n_groups", f"n_groups {n_groups} must divide n_experts {n_experts}: use {fits}"
                return
            size = n_experts // n_groups
            if not 1 <= limit <= n_groups:
                yield "n_limited_groups", f"n_limited_groups {limit} must be from 1 to n_groups {n_groups}"
            elif self.top_k > limit * size:
                left = f"n_limited_groups {limit} of {size} experts each leave {limit * size}, top_k is {self.top_k}"
                yield "n_limited_groups", f"{left}: raise n_limited_groups or lower top_k"
            if n_groups > 1 and size < 2 and self.group_score == "sum_of_two":
                left = f"n_groups {n_groups} leaves {size} expert in a group, whose two best experts are its score"
                yield "n_groups", f"{left}: use at most {n_experts // 2} groups, or group_score max"

    selection_bias: Tensor | None
    tokens_E: Tensor
    loss_scale: Tensor

    def __init__(self, config: Config, *, dim: int, scale: Scale) -> None:
        super().__init__()
        self.config = config
        self.force_balance = False
        self.gate = Gate(dim, config.n_experts, std=scale.std, bias=config.bias)
        self.row_counts, self.own_tokens = nn.Identity(), nn.Identity()
        """Choices of a row, counted, and what is padding: who holds a part of a row adds up all, or takes its own."""
        zeros = torch.zeros(config.n_experts, device="cpu")
        self.register_buffer("selection_bias", None if config.load_balance_coeff is None else zeros)
        self.register_buffer("tokens_E", zeros.long(), persistent=False)
        self.register_buffer("balance_loss", torch.zeros((), device="cpu"), persistent=False)
        self.register_buffer("loss_scale", torch.zeros((), device="cpu"), persistent=False)

    def forward(self, x_BLD: Tensor, padding_BL: Tensor | None = None) -> Choice:
        """The choice of each token. In training that of no padding is counted, once, and gives the balance loss."""
        c = self.config
        padding_BL = None if padding_BL is None else self.own_tokens(padding_BL)
        logit_BLE = self.gate(x_BLD)
        score_BLE = logit_BLE.sigmoid() if c.score == "sigmoid" else logit_BLE.softmax(-1)
        ids_BLK = self.choose(score_BLE.detach())
        # Kept is the choice alone: what it was sorted from is many times larger.
        with nullcontext() if inference_forms(ids_BLK) else kept():
            ids_BLK = ids_BLK.clone()
        if self.training:
            if c.balance_loss_coeff > 0:
                score_BLE = self._with_balance_loss(score_BLE, ids_BLK, padding_BL)
            if not is_recomputing():
                with off_the_record(), torch.no_grad():
                    ids = ids_BLK if padding_BL is None else ids_BLK.masked_fill(padding_BL.unsqueeze(-1), c.n_experts)
                    self.tokens_E.add_(count(ids, c.n_experts + 1)[:-1])
        weight_BLK = score_BLE.gather(-1, ids_BLK)
        if c.normalise:
            weight_BLK = weight_BLK / (weight_BLK.sum(-1, keepdim=True) + 1e-20)
        return Choice(ids_BLK.flatten(0, 1), (weight_BLK * c.route_scale).flatten(0, 1))

    def choose(self, score_BLE: Tensor) -> Tensor:
        """The `top_k` best experts (B, L, K) by score and bias; of equal ones those with the lower number."""
        c = self.config
        if self.force_balance:
            in_turn = torch.arange(score_BLE[..., 0].numel() * c.top_k, device=score_BLE.device) % c.n_experts
            return in_turn.view(*score_BLE.shape[:-1], c.top_k)
        if self.selection_bias is not None:
            score_BLE = score_BLE + self.selection_bias
        if c.n_groups > 1:
            score_BLGE = score_BLE.unflatten(-1, (c.n_groups, -1))
            n_best = 2 if c.group_score == "sum_of_two" else 1
            group_BLG = score_BLGE.sort(-1, descending=True).values[..., :n_best].sum(-1)
            chosen_BLG = best(group_BLG, c.n_limited_groups)
            allowed_BLG = torch.zeros_like(group_BLG, dtype=torch.bool).scatter(-1, chosen_BLG, True)
            score_BLE = score_BLGE.masked_fill(~allowed_BLG.unsqueeze(-1), float("-inf")).flatten(-2)
        return best(score_BLE, c.top_k)

    def _with_balance_loss(self, score_BLE: Tensor, ids_BLK: Tensor, padding_BL: Tensor | None) -> Tensor:
        """The scores, whose gradient will be joined by that of the balance loss

            sum over rows  coeff sum over experts f_E P_E

        f being the share of the row's choices that an expert got, times E, and P the sum of its normalised scores in
        the row, of tokens that are no padding. Choices are those that were made, in groups and by the bias as well (the
        paper writes them without the bias). The sum is multiplied by `loss_scale`, as the main loss is.
        """
        c = self.config
        ones_BLK = torch.ones_like(ids_BLK, dtype=score_BLE.dtype)
        share_BLE = score_BLE / score_BLE.sum(-1, keepdim=True)
        if padding_BL is not None:
            ones_BLK, share_BLE = (x.masked_fill(padding_BL.unsqueeze(-1), 0.0) for x in (ones_BLK, share_BLE))
        chosen_BE = torch.zeros_like(score_BLE[:, 0]).scatter_add(-1, ids_BLK.flatten(1), ones_BLK.flatten(1))
        chosen_BE = self.row_counts(chosen_BE)
        f_BE = chosen_BE * (c.n_experts / chosen_BE.sum(-1, keepdim=True).clamp(min=1.0))
        loss = c.balance_loss_coeff * (f_BE * share_BLE.sum(1)).sum()  # P is the sum of shares
        if not is_recomputing():
            with off_the_record(), torch.no_grad():
                self.balance_loss.add_(loss.detach())
        return _AlongWith.apply(score_BLE, loss, self.loss_scale)


def best(score: Tensor, k: int) -> Tensor:
    """Places (..., k) of the `k` largest numbers of the last dimension of (..., E); of equal ones the first, always."""
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class _AlongWith(torch.autograd.Function):
    """x, through which backward reaches `loss` too, times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.saved_tensors[0].clone(), None


class Experts(Module, Configurable):
    """Gated feed-forward networks, one for each expert, computed as grouped matrix products."""

    AXES = {
        "w1": ("experts", "expert_ffn", "embed"),
        "w3": ("experts", "expert_ffn", "embed"),
        "w2": ("experts", "embed", "expert_ffn"),
    }

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        hidden_dim: int
        """Width between the matrix products of one expert."""
        activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
        """w2(silu(w1 x) * w3 x), or GPT-OSS's w2(g sigmoid(1.702 g) (u + 1)), g = min(w1 x, 7), u = clamp(w3 x, 7)."""
        bias: bool = False
        """Add a bias to every product."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from size_problems(self, "hidden_dim")

    def __init__(self, config: Config, *, n_experts: int, dim: int, scale: Scale) -> None:
        super().__init__()
        self.config = config
        self.w1 = GroupedLinear(n_experts, dim, config.hidden_dim, std=scale.std, bias=config.bias)
        self.w3 = GroupedLinear(n_experts, dim, config.hidden_dim, std=scale.std, bias=config.bias)
        self.w2 = GroupedLinear(n_experts, config.hidden_dim, dim, std=scale.residual, bias=config.bias)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows in, rows out; they come sorted by expert, `counts_E` rows for each."""
        gate_RF, up_RF = self.w1(x_RD, counts_E), self.w3(x_RD, counts_E)
        if self.config.activation == "swiglu":
            return self.w2(swiglu(gate_RF, up_RF), counts_E)
        if forms := cpu_forms(gate_RF):
            return self.w2(forms.clamped_swiglu(gate_RF, up_RF), counts_E)
        gate_RF, up_RF = gate_RF.clamp(max=7.0), up_RF.clamp(-7.0, 7.0)
        return self.w2(gate_RF * torch.sigmoid(1.702 * gate_RF) * (up_RF + 1), counts_E)


class MoE(Module, Configurable):
    """A sparse feed-forward network: each token is computed by the experts that the router chooses for it."""

    SIZED_BY = {"experts": ("router.n_experts",)}
    counts_tokens = True

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        router: Router.Config
        """Which experts a token goes to."""
        experts: Experts.Config
        """What an expert computes."""
        shared_experts: FeedForward.Config | None = None
        """A network that every token passes as well."""

    dispatcher: Dispatcher

    def __init__(self, config: Config, *, dim: int, scale: Scale) -> None:
        super().__init__()
        self.top_k, self.n_experts = config.router.top_k, config.router.n_experts
        self.router = config.router.build(dim=dim, scale=scale)
        self.experts = config.experts.build(n_experts=self.n_experts, dim=dim, scale=scale)
        shared = config.shared_experts
        self.shared_experts: FeedForward | None = None if shared is None else shared.build(dim=dim, scale=scale)
        self.dispatcher = Local()

    def forward(self, x_BLD: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        x_TD = to_autocast(x_BLD.flatten(0, 1))
        ids_TK, weight_TK = self.router(x_BLD) if padding_BL is None else self.router(x_BLD, padding_BL)
        rows = self.dispatcher.dispatch(x_TD, ids_TK, weight_TK, self.n_experts)
        y_RD = self.experts(rows.x_RD, rows.counts_G) * rows.weight_R.unsqueeze(-1)
        y_BLD = self.dispatcher.combine(y_RD, rows.back).to(x_BLD.dtype).view_as(x_BLD)
        return y_BLD if self.shared_experts is None else y_BLD + self.shared_experts(x_BLD)

    def flops_per_token(self, seq_len: int) -> Flops:
        n_numbers = sum(part.n_numbers for part in self.experts.children() if isinstance(part, GroupedLinear))
        return Flops(matmul=2 * self.top_k * n_numbers // self.n_experts)
