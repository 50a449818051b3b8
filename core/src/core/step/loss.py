"""The loss as a sum over tokens, so that whoever knows the count of the whole step divides.

Letters: B rows, L length, l the tokens of this rank, D width, v this rank's words of the vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from core.config.configurable import Configurable, owner_of
from core.config.errors import UserError
from core.data.packing import IGNORE
from core.nn.layers import Head
from core.parallel.vocabulary import Vocabulary
from core.step.chunks import sum_in_chunks
from core.step.compiler import skip_vector_trials
from core.step.settings import Compile
from core.step.softmax import SoftmaxLoss
from core.step.source_losses import Tally

CHUNK_LOGITS = 2**24
"""Logits of a chunk that are worth no cut: 64 MiB in fp32."""

TokenLoss = Callable[[Tensor, Tensor, Vocabulary], Tensor]


class Loss(Configurable, ABC):
    """What training lowers: reads the residual stream through the head itself, on one rank and on many alike.

    A loss states what one token costs (`of_tokens`), in the pieces that a `Vocabulary` offers; the rest is here.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        chunk_tokens: int | Literal["auto", "off"] = "auto"
        """Tokens whose logits exist at a time, rounded up to what tensor parallelism divides. auto is the width of the
        residual stream, so that a chunk's logits are as large as the head, or more for a small vocabulary; off holds
        the logits of a whole microbatch, as auto does where a head has a forward of its own."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if not isinstance(self.chunk_tokens, str) and self.chunk_tokens < 1:
                yield "chunk_tokens", f"chunk_tokens {self.chunk_tokens} must be at least 1; off holds all logits"

        def tokens_at_a_time(self, *, dim: int, vocab_size: int, n_ranks: int) -> int | None:
            """Tokens of a chunk; None if there are no chunks.

            `n_ranks` share the vocabulary of `vocab_size` words and the tokens of a chunk.
            """
            if self.chunk_tokens == "off":
                return None
            tokens = self.chunk_tokens
            if tokens == "auto":
                tokens = max(dim, CHUNK_LOGITS * n_ranks // vocab_size)
            return -(-tokens // n_ranks) * n_ranks

        def least_bytes(self, n_tokens: int, *, dim: int, vocab_size: int, n_ranks: int) -> int:
            """Bytes that a rank holds at least while it computes the loss of `n_tokens`: fp32 logits, and in chunks the
            fp32 gradient of the head's weight."""
            chunk = self.tokens_at_a_time(dim=dim, vocab_size=vocab_size, n_ranks=n_ranks)
            rows = n_tokens if chunk is None else min(chunk, n_tokens) + dim
            return 4 * rows * vocab_size // n_ranks

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, here

    def __init__(self, config: Config, *, compile_backend: str | None = None) -> None:
        """torch.compile gets `of_tokens` where a backend is named."""
        self.config = config
        self._of_tokens: TokenLoss = self.of_tokens
        if compile_backend is not None:
            skip_vector_trials(compile_backend)
            self._of_tokens = of_any_length(torch.compile(self.of_tokens, backend=compile_backend))

    @abstractmethod
    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Nats of each token of this rank, (B, l), of fp32 logits (B, L, v); what it says of IGNORE is left out.

        It is asked for some tokens at a time, in any order: one token's loss depends on no other. The logits are its
        own, to write over.
        """

    def __call__(
        self,
        x_BLD: Tensor,
        labels_BL: Tensor,
        head: Head,
        vocabulary: Vocabulary,
        *,
        n_labels: int | None = None,
        scale: float = 1.0,
        tally: Tally | None = None,
    ) -> Tensor:
        """The summed loss of this rank's tokens whose label is not IGNORE, times `scale`, in nats and fp32; 0 if there
        are none. To `tally` each is added as it is.

        `x_BLD` is the normalised residual stream that the head takes: of this rank's tokens. `labels_BL` are those of
        all tokens whose logits the head computes here; at most `n_labels` of them are not IGNORE.
        """
        if self._in_chunks(head):
            settings = {"labels_BL": labels_BL, "vocabulary": vocabulary, "n": n_labels, "scale": scale, "tally": tally}
            return head(x_BLD, partial(self._read, **settings))
        sources_BL = None if tally is None else tally.of_tokens(labels_BL)
        logits_BLv = head(x_BLD).float()
        return self._counted(logits_BLv, labels_BL, sources_BL, vocabulary=vocabulary, tally=tally).sum() * scale

    def _in_chunks(self, head: Head) -> bool:
        """Whether the logits are computed in chunks: only a head that is a plain product can be asked for a part."""
        chunk_tokens = self.config.chunk_tokens
        plain = type(head).forward is Head.forward and "forward" not in vars(head)
        if isinstance(chunk_tokens, int) and not plain:
            raise UserError(
                f"loss.chunk_tokens {chunk_tokens} reads the head's weight, and this head has a forward of its own: "
                "set it to off, which holds all logits"
            )
        return plain and chunk_tokens != "off"

    def _read(
        self,
        x_BLD: Tensor,
        weight_vD: Tensor,
        *,
        labels_BL: Tensor,
        vocabulary: Vocabulary,
        n: int | None,
        scale: float,
        tally: Tally | None,
    ) -> Tensor:
        """The loss from the head's weight, in chunks."""
        size = self.config.tokens_at_a_time(dim=x_BLD.shape[-1], vocab_size=vocabulary.size, n_ranks=vocabulary.n_ranks)
        assert size is not None
        n_tokens = labels_BL.numel()
        n = n_tokens if n is None else min(-(-n // vocabulary.n_ranks) * vocabulary.n_ranks, n_tokens)
        losses = partial(self._counted, vocabulary=vocabulary, tally=tally)
        sizes = {"chunk_tokens": size, "n_labels": n, "scale": scale}
        sources_BL = None if tally is None else tally.of_tokens(labels_BL)
        return sum_in_chunks(x_BLD, weight_vD, labels_BL, losses, sources_BL=sources_BL, **sizes)

    def _counted(
        self,
        logits_BLv: Tensor,
        labels_BL: Tensor,
        sources_BL: Tensor | None,
        *,
        vocabulary: Vocabulary,
        tally: Tally | None,
    ) -> Tensor:
        """Nats of each token of this rank, 0 where the label is IGNORE; added to `tally` by the sources of tokens."""
        loss_Bl = self._of_tokens(logits_BLv, labels_BL, vocabulary)
        loss_Bl = loss_Bl.masked_fill(vocabulary.own_tokens(labels_BL) == IGNORE, 0.0)
        if tally is not None and sources_BL is not None:
            tally.add(loss_Bl, vocabulary.own_tokens(sources_BL))
        return loss_Bl


def of_any_length(compiled: TokenLoss) -> TokenLoss:
    """A compiled `of_tokens` that is not compiled again for the last chunk, whose length depends on the labels."""

    def of_tokens(logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        for tensor in (logits_BLv, labels_BL):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return compiled(logits_BLv, labels_BL, vocabulary)

    return of_tokens


class CrossEntropy(Loss):
    """The negative log-likelihood of the labels."""

    @dataclass(kw_only=True, slots=True)
    class Config(Loss.Config):
        z_loss: float = 0.0
        """Weight of the square of the log-partition of each token, which draws it towards 0 (arXiv:2204.02311, section
        5)."""
        label_smoothing: float = 0.0
        """Share of each label that is dealt out to all words alike (arXiv:1512.00567, section 7)."""
        soft_cap: float | None = None
        """Logits above this size are bent below it: cap tanh(logits / cap) (arXiv:2408.00118, section 2). What
        generates knows nothing of it."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from Loss.Config.problems(self)
            if not 0 <= self.z_loss < math.inf:
                yield "z_loss", f"z_loss {self.z_loss} must be finite and not negative; 0 is none"
            if not 0 <= self.label_smoothing < 1:
                message = f"label_smoothing {self.label_smoothing} must be at least 0 and below 1; 0 is none"
                yield "label_smoothing", message
            if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
                yield "soft_cap", f"soft_cap {self.soft_cap} must be finite and above 0; leave it out for none"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Loss

    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        c = self.config
        if not torch.compiler.is_compiling():
            return SoftmaxLoss.apply(logits_BLv, labels_BL, vocabulary, c.z_loss, c.label_smoothing, c.soft_cap)
        if c.soft_cap is not None:
            logits_BLv = c.soft_cap * torch.tanh(logits_BLv / c.soft_cap)
        z_Bl = vocabulary.logsumexp(logits_BLv)
        loss_Bl = z_Bl - (1 - c.label_smoothing) * vocabulary.pick(logits_BLv, labels_BL)
        if c.label_smoothing:
            loss_Bl = loss_Bl - c.label_smoothing / vocabulary.size * vocabulary.sum(logits_BLv)
        return loss_Bl + c.z_loss * z_Bl.square()


def loss_backend(settings: Compile, loss: Loss.Config, device: torch.device) -> str | None:
    """The backend that compiles the loss of a run; None where nothing does.

    Cross-entropy has its gradient written out, and a CPU computes it in 0.8 of the time of what a compiler makes of the
    formula.
    """
    is_written_out = getattr(owner_of(type(loss)), "of_tokens", None) is CrossEntropy.of_tokens
    return settings.backend if settings.takes("loss") and not (device.type == "cpu" and is_written_out) else None
