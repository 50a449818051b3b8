"""DeepSeek-V3 (arXiv:2412.19437) and DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, shared and routed
experts behind a few dense blocks, interleaved RoPE stretched by YaRN.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.mla import MLA
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE
from core.weights.hf_model import HFModel


class DeepSeekV3(Decoder, HFModel):
    """The decoder of DeepSeek-V3, and of DeepSeek-V2, which differs in its router alone."""

    HF = "deepseek_v3.hf:FORM"
    PEERS = "deepseek_v3.peers:FORMS"

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        attention: MLA.Config
        """Self-attention of every block."""
        feed_forward: FeedForward.Config
        """Feed-forward network of the dense blocks."""
        n_dense_layers: int
        """Blocks at the start that have no experts."""
        moe: MoE.Config
        """Mixture of experts of all other blocks, those for multi-token prediction included."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            dense, n_layers = self.n_dense_layers, self.n_layers
            if not 0 <= dense <= n_layers:
                yield "n_dense_layers", f"n_dense_layers {dense} must be from 0 to n_layers {n_layers}"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        c = self.config
        dense = i < c.n_dense_layers
        return self.make_block(
            c.attention,
            feed_forward=c.feed_forward if dense else None,
            moe=None if dense else c.moe,
            temperature=self.rope.temperature,
        )

    def rope_dim(self) -> int:
        return self.config.attention.qk_rope_head_dim


ROUTERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"score": "softmax", "normalise": False, "group_score": "max", "load_balance_coeff": None},
    "deepseek_v3": {"score": "sigmoid", "normalise": True, "group_score": "sum_of_two", "load_balance_coeff": 1e-3},
}
"""What makes a router one of a family. No `config.json` states the step of the bias (arXiv:2412.19437, section 4.2)."""

HEADS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
"""The attention of every published size, but for the number of heads and the latent of queries."""

SIZES: dict[str, dict[str, Any]] = {
    "debug": dict(
        family="deepseek_v3",
        shape=dict(dim=128, n_layers=4, n_dense_layers=1, vocab_size=2_048),
        heads=dict(n_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        dense_dim=384,
        router=dict(n_experts=8, top_k=2, route_scale=2.5, n_groups=4, n_limited_groups=2),
        expert_dim=96,
        n_shared_experts=1,
    ),
    "16B": dict(
        family="deepseek_v2",
        shape=dict(dim=2048, n_layers=27, n_dense_layers=1, vocab_size=102_400),
        heads=dict(HEADS, n_heads=16, q_lora_rank=None),
        dense_dim=10_944,
        router=dict(n_experts=64, top_k=6),
        expert_dim=1_408,
        n_shared_experts=2,
    ),
    "236B": dict(
        family="deepseek_v2",
        shape=dict(dim=5120, n_layers=60, n_dense_layers=1, vocab_size=102_400),
        heads=dict(HEADS, n_heads=128, q_lora_rank=1536),
        dense_dim=12_288,
        router=dict(n_experts=160, top_k=6, route_scale=16.0, n_groups=8, n_limited_groups=3),
        expert_dim=1_536,
        n_shared_experts=2,
    ),
    "671B": dict(
        family="deepseek_v3",
        shape=dict(dim=7168, n_layers=61, n_dense_layers=3, vocab_size=129_280),
        heads=dict(HEADS, n_heads=128, q_lora_rank=1536),
        dense_dim=18_432,
        router=dict(n_experts=256, top_k=8, route_scale=2.5, n_groups=8, n_limited_groups=4),
        expert_dim=2_048,
        n_shared_experts=1,
    ),
}
"""The published sizes, and a small one."""


def size(name: str) -> DeepSeekV3.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    return of_shape(**SIZES[name])


def of_shape(
    *,
    family: str,
    shape: dict[str, Any],
    heads: dict[str, Any],
    dense_dim: int,
    router: dict[str, Any],
    expert_dim: int,
    n_shared_experts: int,
) -> DeepSeekV3.Config:
    """A DeepSeek of a family in `ROUTERS`; of its dimensions `dense_dim` is the hidden one of a dense block,
    `expert_dim` that of an expert."""
    mscale, balance_loss_coeff = (0.707, 1e-3) if family == "deepseek_v2" else (1.0, 1e-4)
    return DeepSeekV3.Config(
        **shape,
        max_seq_len=163_840,
        rope=RoPE.Config(
            layout="interleaved",
            scaling="yarn",
            scaling_factor=40.0,
            original_seq_len=4096,
            mscale=mscale,
            mscale_all_dim=mscale,
        ),
        attention=MLA.Config(**heads),
        feed_forward=FeedForward.Config(hidden_dim=dense_dim),
        moe=MoE.Config(
            router=Router.Config(**router, **ROUTERS[family], balance_loss_coeff=balance_loss_coeff),
            experts=Experts.Config(hidden_dim=expert_dim),
            shared_experts=FeedForward.Config(hidden_dim=n_shared_experts * expert_dim),
        ),
    )
