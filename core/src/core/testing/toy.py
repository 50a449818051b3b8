"""A small decoder to test core with, and models as tests want them: without memory, or with drawn weights."""

from dataclasses import dataclass, field

import torch
from torch import nn

from core.nn.attention import Attention
from core.nn.decoder import Block, Decoder
from core.nn.feed_forward import FeedForward
from core.nn.init import init_weights, materialise
from core.nn.moe import Experts, MoE, Router
from core.nn.weights import weights
from core.runtime.meta import meta_model
from core.weights.hf_config import checked_hf_config, decoder_from_hf, decoder_to_hf
from core.weights.hf_form import HFForm
from core.weights.hf_model import HFModel
from core.weights.keys import KeyTable


def toy_attention() -> Attention.Config:
    return Attention.Config(n_heads=4, n_kv_heads=2, head_dim=8, qk_norm=True)


def toy_feed_forward() -> FeedForward.Config:
    return FeedForward.Config(hidden_dim=24)


def toy_moe() -> MoE.Config:
    return MoE.Config(
        router=Router.Config(n_experts=6, top_k=2, load_balance_coeff=1e-3),
        experts=Experts.Config(hidden_dim=12),
        shared_experts=FeedForward.Config(hidden_dim=8),
    )


KEYS: KeyTable = {
    "tok_embeddings.weight": "model.embed.weight",
    "layers.{i}.attention_norm.weight": "model.blocks.{i}.norm_1.weight",
    "layers.{i}.attention.wq.weight": "model.blocks.{i}.q.weight",
    "layers.{i}.attention.wk.weight": "model.blocks.{i}.k.weight",
    "layers.{i}.attention.wv.weight": "model.blocks.{i}.v.weight",
    "layers.{i}.attention.wo.weight": "model.blocks.{i}.o.weight",
    "layers.{i}.attention.q_norm.weight": "model.blocks.{i}.q_norm.weight",
    "layers.{i}.attention.k_norm.weight": "model.blocks.{i}.k_norm.weight",
    "layers.{i}.ffn_norm.weight": "model.blocks.{i}.norm_2.weight",
    "layers.{i}.feed_forward.w1.weight": "model.blocks.{i}.gate.weight",
    "layers.{i}.feed_forward.w3.weight": "model.blocks.{i}.up.weight",
    "layers.{i}.feed_forward.w2.weight": "model.blocks.{i}.down.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "head.weight",
}


class Toy(Decoder, HFModel):
    """A decoder of every dense part that core has, small enough to train in a second."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        dim: int = 16
        """Width of the residual stream."""
        n_layers: int = 2
        """Number of blocks."""
        vocab_size: int = 64
        """Rows of the embedding and of the head."""
        max_seq_len: int = 64
        """Most positions that the model may be asked for."""
        attention: Attention.Config = field(default_factory=toy_attention)
        """Self-attention of every block."""
        feed_forward: FeedForward.Config = field(default_factory=toy_feed_forward)
        """Feed-forward network of every block."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        return self.make_block(self.config.attention, feed_forward=self.config.feed_forward)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim

    @classmethod
    def hf_form(cls) -> HFForm:
        return HFForm(
            keys=KEYS,
            from_config=lambda hf: cls.Config(**decoder_from_hf(checked_hf_config(hf, {"model_type": "toy"}))),
            to_config=lambda config: {"model_type": "toy", **decoder_to_hf(config)},
        )


class ToyMoE(Decoder):
    """A decoder whose first block is dense and whose others are mixtures of experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        dim: int = 16
        """Width of the residual stream."""
        n_layers: int = 2
        """Number of blocks."""
        vocab_size: int = 64
        """Rows of the embedding and of the head."""
        max_seq_len: int = 64
        """Most positions that the model may be asked for."""
        attention: Attention.Config = field(default_factory=toy_attention)
        """Self-attention of every block."""
        feed_forward: FeedForward.Config = field(default_factory=toy_feed_forward)
        """Feed-forward network of the first block."""
        moe: MoE.Config = field(default_factory=toy_moe)
        """Mixture of experts of every other block."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Decoder

    def block(self, i: int) -> Block:
        c = self.config
        if i == 0:
            return self.make_block(c.attention, feed_forward=c.feed_forward)
        return self.make_block(c.attention, moe=c.moe)

    def rope_dim(self) -> int:
        return self.config.attention.head_dim


def on_cpu(config: Decoder.Config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model on the CPU, its weights started from `seed`."""
    model = meta_model(config)
    materialise(model, torch.device("cpu"), dtype)
    init_weights(((weight.name, weight.value, weight.start) for weight in weights(model)), seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw all weights anew, wide enough for each to matter: matrices around 0, vectors around 1."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.normal_(float(weight.dim() == 1), 0.1, generator=generator)
