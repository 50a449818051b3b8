"""The decoder that every model is: embed, blocks, norm, head. What one block is, the model says.

Letters: B rows, L length, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.nn.kernel import Kernel, Mask, Positions, SelfAttention
from core.nn.layers import Embedding, Head, RMSNorm
from core.nn.module import Flops, Module, size_problems
from core.nn.mtp import Merge, Predictions
from core.nn.rope import RoPE, Rotation
from core.nn.start import Scale

HeadReader = Callable[[Tensor, Head, int], Tensor]
"""Makes something of the normalised residual stream (B, L, D), the head, and how many tokens further than the next one
it predicts."""


def logits(x_BLD: Tensor, head: Head, depth: int) -> Tensor:
    """The `HeadReader` of the logits themselves, (B, L, V)."""
    return head(x_BLD)


class Block(Module):
    """One pre-norm residual block: x + attention(norm(x)), then x + network(norm(x)).

    The network is dense (`feed_forward`) or sparse (`moe`): any module that takes and returns (B, L, D).
    """

    AXES = {"attention_norm": ("embed",), "ffn_norm": ("embed",)}

    def __init__(
        self,
        dim: int,
        *,
        norm_eps: float,
        attention: SelfAttention,
        feed_forward: Module | None = None,
        moe: Module | None = None,
    ) -> None:
        super().__init__()
        assert (feed_forward is None) != (moe is None), "a block has one network"
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward = feed_forward
        self.moe = moe

    def forward(self, x_BLD: Tensor, rotation: Rotation, mask: Mask, padding_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rotation, mask)
        network = self.feed_forward or self.moe
        assert network is not None
        padding = [] if padding_BL is None or not network.counts_tokens else [padding_BL]
        return x_BLD + network(self.ffn_norm(x_BLD), *padding)


class Decoder(Module, Configurable, ABC):
    """A causal language model: token ids in, logits out."""

    AXES = {"norm": ("embed",)}
    SIZED_BY = {"vocab": ("vocab_size",)}

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
        n_mtp_layers: int = 0
        """Blocks behind the last one that training uses to predict tokens further ahead (arXiv:2412.19437, 2.2)."""
        mtp_loss_weight: float = 0.3
        """Weight of the mean loss of those predictions beside that of the next token."""
        rope: RoPE.Config = field(default_factory=RoPE.Config)
        """Rotary position embedding."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from size_problems(self, "dim", "n_layers", "vocab_size", "max_seq_len")
            yield from size_problems(self, "n_mtp_layers", low=0)
            if not self.mtp_loss_weight > 0:
                message = f"mtp_loss_weight {self.mtp_loss_weight} must be above 0; n_mtp_layers 0 is off"
                yield "mtp_loss_weight", message
            if not self.norm_eps >= 0:
                yield "norm_eps", f"norm_eps {self.norm_eps} must not be negative"
            if not 0 < self.init_std <= 1000:
                yield "init_std", f"init_std {self.init_std} must be above 0 and at most 1000"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.scale = Scale.of_depth(config.init_std, config.n_layers)
        self.tok_embeddings: Embedding | None = Embedding(config.vocab_size, config.dim, std=config.init_std)
        self.rope = config.rope.build(head_dim=self.rope_dim())
        n_blocks = config.n_layers + config.n_mtp_layers
        self.layers = nn.ModuleDict({str(i): self.block(i) for i in range(n_blocks)})
        self.norm: RMSNorm | None = RMSNorm(config.dim, eps=config.norm_eps)
        self.output: Head | None = Head(config.dim, config.vocab_size, std=config.init_std)
        self.ahead = nn.ModuleDict(
            {
                str(i): Merge(config.dim, norm_eps=config.norm_eps, std=config.init_std)
                for i in range(config.n_layers, n_blocks)
            }
        )
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @abstractmethod
    def block(self, i: int) -> Block:
        """Block number `i`, counted from 0; those for multi-token prediction come last."""

    def make_block(
        self,
        attention: Configurable.Config,
        *,
        feed_forward: Configurable.Config | None = None,
        moe: Configurable.Config | None = None,
        **extra: float,
    ) -> Block:
        """A block of these parts in the width and at the scale of this model; `extra` goes to the attention."""
        c = self.config
        return Block(
            c.dim,
            norm_eps=c.norm_eps,
            attention=attention.build(dim=c.dim, norm_eps=c.norm_eps, scale=self.scale, **extra),
            feed_forward=None if feed_forward is None else feed_forward.build(dim=c.dim, scale=self.scale),
            moe=None if moe is None else moe.build(dim=c.dim, scale=self.scale),
        )

    @abstractmethod
    def rope_dim(self) -> int:
        """How many numbers of a head are rotated."""

    def forward(
        self, tokens_BL: Tensor, positions: Positions | None = None, read: HeadReader | None = None
    ) -> Tensor | Predictions:
        """What `read` makes of the normalised residual stream (B, L, D) and the head; without it the logits (B, L, V)
        in the compute dtype. Without `positions` every row is one document.

        A stage of a pipeline, which lacks the embedding or the head, takes or returns the residual stream (B, L, D).

        In training a model with multi-token prediction returns `Predictions`. Raises `UserError` when a row is longer
        than `max_seq_len`.
        """
        if tokens_BL.shape[1] > self.config.max_seq_len:
            raise UserError(
                f"{tokens_BL.shape[1]} positions asked for, the model has max_seq_len {self.config.max_seq_len}: "
                "shorten the rows or raise model.max_seq_len"
            )
        positions = positions or Positions.rows(tokens_BL)
        rotation = self.rope(positions.position_BL)
        masks: dict[Kernel, Mask] = {}
        padding = [] if positions.padding_BL is None else [positions.padding_BL]
        blocks = cast(dict[str, Block], dict(self.layers.items()))
        x_BLD = tokens_BL if self.tok_embeddings is None else self.tok_embeddings(tokens_BL)
        for i, block in blocks.items():
            if int(i) < self.config.n_layers:
                x_BLD = block(x_BLD, rotation, self._mask(block, positions, masks), *padding)
        if self.norm is None or self.output is None:
            return x_BLD
        read = read or logits
        x_BLD = self.norm(x_BLD)
        main = read(x_BLD, self.output, 0)
        if not (self.training and self.ahead):
            return main
        further = []
        assert self.tok_embeddings is not None, "a stage of a pipeline predicts one token"
        for depth, (i, merge) in enumerate(cast(dict[str, Merge], dict(self.ahead.items())).items(), start=1):
            tokens_BL = tokens_BL.roll(-1, dims=1)
            x_BLD = merge(x_BLD, self.tok_embeddings(tokens_BL))
            x_BLD = merge.norm(blocks[i](x_BLD, rotation, self._mask(blocks[i], positions, masks), *padding))
            further.append(read(x_BLD, self.output, depth))
        return Predictions(main, further)

    def flops_per_token(self, seq_len: int) -> Flops:
        return Flops(matmul=2 * self.config.vocab_size * self.config.dim * self.config.n_mtp_layers)

    def _mask(self, block: Block, positions: Positions, masks: dict[Kernel, Mask]) -> Mask:
        """The mask of a block's kernel, made once for all blocks with an equal one."""
        kernel = block.attention.kernel
        if kernel not in masks:
            masks[kernel] = kernel.mask(positions)
        return masks[kernel]
