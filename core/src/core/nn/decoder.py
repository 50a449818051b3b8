"""The decoder that every model is: embed, blocks, norm, head. What one block is, the model says.

Letters: B rows, L length, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import Tensor, nn

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.nn.attention import Attention, Mask, Where
from core.nn.feed_forward import FeedForward
from core.nn.init import Scale
from core.nn.layers import Embedding, Head, RMSNorm
from core.nn.module import Module
from core.nn.rope import RoPE, Rotation


class Block(Module):
    """One pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    AXES = {"attention_norm": ("embed",), "ffn_norm": ("embed",)}

    def __init__(self, dim: int, *, norm_eps: float, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x_BLD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rotation, mask)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))


class Decoder(Module, Configurable, ABC):
    """A causal language model: token ids in, logits out."""

    AXES = {"norm": ("embed",)}
    HF_KEYS: ClassVar[dict[str, str]]
    """Hugging Face's name for each weight; `{i}` stands for the number of a block."""
    HF_HALVES: ClassVar[frozenset[str]] = frozenset()
    """Those of our names whose rows, head by head, are pairs (0, 1), (2, 3), ... here and halves at Hugging Face."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int
        """Width of the residual stream."""
        n_layers: int
        """Number of blocks."""
        vocab_size: int
        """Rows of the embedding and of the head; a tokenizer may use fewer."""
        max_seq_len: int
        """Most positions that the model may be asked for."""
        norm_eps: float = 1e-6
        """Added to the mean square in every RMSNorm."""
        tie_embeddings: bool = False
        """The head uses the weight of the embedding."""
        init_std: float = 0.02
        """Standard deviation of every matrix at the start; those that write to the residual stream get
        init_std / sqrt(2 n_layers). All are cut at three standard deviations."""
        rope: RoPE.Config = field(default_factory=RoPE.Config)
        """Rotary position embedding."""

        def problems(self) -> Iterator[tuple[str, str]]:
            for name in ("dim", "n_layers", "vocab_size", "max_seq_len"):
                if getattr(self, name) < 1:
                    yield name, f"{name} {getattr(self, name)} must be at least 1"
            if not self.norm_eps >= 0:
                yield "norm_eps", f"norm_eps {self.norm_eps} must not be negative"
            if not self.init_std > 0:
                yield "init_std", f"init_std {self.init_std} must be above 0"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.scale = Scale.of_depth(config.init_std, config.n_layers)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, std=config.init_std)
        self.rope = config.rope.build(head_dim=self.rope_dim())
        self.layers = nn.ModuleDict({str(i): self.block(i) for i in range(config.n_layers)})
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Head(config.dim, config.vocab_size, std=config.init_std)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @abstractmethod
    def block(self, i: int) -> Block:
        """Block number `i`, counted from 0."""

    def make_block(self, attention: Attention.Config, feed_forward: FeedForward.Config) -> Block:
        """A block of these parts in the width and at the scale of this model."""
        c = self.config
        return Block(
            c.dim,
            norm_eps=c.norm_eps,
            attention=attention.build(dim=c.dim, norm_eps=c.norm_eps, scale=self.scale),
            feed_forward=feed_forward.build(dim=c.dim, scale=self.scale),
        )

    @abstractmethod
    def rope_dim(self) -> int:
        """How many numbers of a head are rotated."""

    @classmethod
    @abstractmethod
    def from_hf_config(cls, hf: dict) -> Config:
        """The configuration that a Hugging Face `config.json` states; raises `UserError` for what it cannot express."""

    @abstractmethod
    def to_hf_config(self) -> dict:
        """The Hugging Face `config.json` of this model."""

    def forward(self, tokens_BL: Tensor, where: Where | None = None) -> Tensor:
        """Logits (B, L, V) in the compute dtype; without `where` every row is one document.

        Raises `UserError` when a row is longer than `max_seq_len`.
        """
        if tokens_BL.shape[1] > self.config.max_seq_len:
            raise UserError(
                f"{tokens_BL.shape[1]} positions asked for, the model has max_seq_len {self.config.max_seq_len}: "
                "shorten the rows or raise model.max_seq_len"
            )
        where = where or Where.rows(tokens_BL)
        rotation = self.rope(where.position_BL)
        masks: dict[object, Mask] = {}
        x_BLD = self.tok_embeddings(tokens_BL)
        for block in cast(Iterable[Block], self.layers.values()):
            kernel = block.attention.kernel
            if kernel not in masks:
                masks[kernel] = kernel.mask(where)
            x_BLD = block(x_BLD, rotation, masks[kernel])
        return self.output(self.norm(x_BLD))
