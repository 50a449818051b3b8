"""DeepSeek-V3 (arXiv:2412.19437) and DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, shared and routed
experts behind a few dense blocks, interleaved RoPE stretched by YaRN.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.checkpoint.hf_model import HFModel
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.mla import MLA
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE


class DeepSeekV3(Decoder, HFModel):
    """The decoder of DeepSeek-V3, and of DeepSeek-V2, which differs in its router alone."""

    HF = "deepseek_v3.hf:FORM"

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

SIZES = {
    # name: dim, blocks, dense ones, (heads, query latent, key latent, plain, rotated, value width), dense hidden,
    #       (experts, shared, per token, hidden), (family, factor, groups, of which), vocabulary
    "debug": (128, 4, 1, (4, 64, 32, 32, 16, 32), 384, (8, 1, 2, 96), ("v3", 2.5, 4, 2), 2_048),
    "16B": (2048, 27, 1, (16, None, 512, 128, 64, 128), 10_944, (64, 2, 6, 1_408), ("v2", 1.0, 1, 1), 102_400),
    "236B": (5120, 60, 1, (128, 1536, 512, 128, 64, 128), 12_288, (160, 2, 6, 1_536), ("v2", 16.0, 8, 3), 102_400),
    "671B": (7168, 61, 3, (128, 1536, 512, 128, 64, 128), 18_432, (256, 1, 8, 2_048), ("v3", 2.5, 8, 4), 129_280),
}


def size(name: str) -> DeepSeekV3.Config:
    """A new configuration of the published size `name`, or of the small "debug" one."""
    dim, n_layers, n_dense_layers, heads, dense_dim, experts, routing, vocab_size = SIZES[name]
    n_heads, q_lora_rank, kv_lora_rank, plain, rotated, value = heads
    n_experts, n_shared, top_k, hidden_dim = experts
    family, factor, n_groups, limit = routing
    mscale, balance_loss_coeff = (0.707, 1e-3) if family == "v2" else (1.0, 1e-4)
    router = Router.Config(
        n_experts=n_experts,
        top_k=top_k,
        route_scale=factor,
        n_groups=n_groups,
        n_limited_groups=limit,
        balance_loss_coeff=balance_loss_coeff,
        **ROUTERS[f"deepseek_{family}"],
    )
    return DeepSeekV3.Config(
        dim=dim,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=163_840,
        rope=RoPE.Config(
            layout="interleaved",
            scaling="yarn",
            scaling_factor=40.0,
            original_seq_len=4096,
            mscale=mscale,
            mscale_all_dim=mscale,
        ),
        attention=MLA.Config(
            n_heads=n_heads,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=plain,
            qk_rope_head_dim=rotated,
            v_head_dim=value,
        ),
        feed_forward=FeedForward.Config(hidden_dim=dense_dim),
        n_dense_layers=n_dense_layers,
        moe=MoE.Config(
            router=router,
            experts=Experts.Config(hidden_dim=hidden_dim),
            shared_experts=FeedForward.Config(hidden_dim=n_shared * hidden_dim),
        ),
    )
