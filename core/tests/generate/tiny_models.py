"""A tiny model of every kind of attention and network that core has."""

from dataclasses import dataclass

from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.mla import MLA
from core.nn.moe import Experts, MoE, Router
from core.nn.rope import RoPE
from core.testing.toy import on_cpu, randomise


class Tiny(Decoder):
    """Blocks of these parts; with `every_second` block 1, 3, ... has that attention."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        dim: int = 16
        """Width of the residual stream."""
        n_layers: int = 2
        """Number of blocks."""
        vocab_size: int = 64
        """Rows of the embedding and of the head."""
        max_seq_len: int = 32
        """Most positions that the model may be asked for."""
        attention: Attention.Config | MLA.Config
        """Self-attention."""
        every_second: Attention.Config | None = None
        """That of every second block, if it is another."""
        network: FeedForward.Config | MoE.Config
        """Feed-forward network or mixture of experts."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        c = self.config
        live = {"temperature": self.rope.temperature} if isinstance(c.attention, MLA.Config) else {}
        attention = c.every_second if i % 2 and c.every_second else c.attention
        if isinstance(c.network, MoE.Config):
            return self.make_block(attention, moe=c.network, **live)
        return self.make_block(attention, feed_forward=c.network, **live)

    def rope_dim(self) -> int:
        attention = self.config.attention
        return attention.qk_rope_head_dim if isinstance(attention, MLA.Config) else attention.head_dim


def mla(q_lora_rank: int | None) -> MLA.Config:
    return MLA.Config(
        n_heads=2, q_lora_rank=q_lora_rank, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
    )


DENSE = FeedForward.Config(hidden_dim=24)
SPARSE = MoE.Config(
    router=Router.Config(n_experts=4, top_k=2, score="sigmoid", load_balance_coeff=1e-3),
    experts=Experts.Config(hidden_dim=12),
    shared_experts=FeedForward.Config(hidden_dim=8),
)
YARN = RoPE.Config(layout="interleaved", scaling="yarn", scaling_factor=4.0, original_seq_len=8, mscale_all_dim=1.0)
GQA = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8)
SINKS = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, bias=True, sinks=True)
WINDOW = Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, bias=True, sinks=True, window=4)

KINDS = {
    "normalised heads": Tiny.Config(
        attention=Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, qk_norm=True), network=DENSE
    ),
    "tied": Tiny.Config(attention=GQA, network=DENSE, tie_embeddings=True),
    "window": Tiny.Config(attention=Attention.Config(n_heads=2, n_kv_heads=2, head_dim=8, window=3), network=DENSE),
    "sinks": Tiny.Config(attention=SINKS, network=DENSE),
    "sinks, and a window in every second block": Tiny.Config(attention=SINKS, every_second=WINDOW, network=SPARSE),
    "latent": Tiny.Config(attention=mla(None), network=DENSE, rope=YARN),
    "latent queries too, experts, further prediction": Tiny.Config(
        attention=mla(8), network=SPARSE, rope=YARN, n_mtp_layers=1
    ),
    "experts": Tiny.Config(attention=GQA, network=SPARSE),
}


def tiny(kind: str, *, seed: int = 0) -> Decoder:
    """A model of this kind with drawn weights, ready to predict."""
    model = on_cpu(KINDS[kind])
    randomise(model, seed)
    return model.eval()
