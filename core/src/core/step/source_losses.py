"""What training costs by source: the losses of a mixture's tokens, which a step computes anyway, added up by the source
of their rows.

Letters: B rows, L tokens that labels are given for, l those of them that are this rank's, S sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.data.packing import IGNORE, Batch
from core.parallel.layout import RankView


class Tally(NamedTuple):
    """The losses of one microbatch, as far as this rank computes them."""

    sources_B: Tensor
    """The source of each row."""
    nats_S: Tensor
    """Sums of losses, in fp32."""

    def of_tokens(self, labels_BL: Tensor) -> Tensor:
        """The source of each token, (B, L)."""
        return self.sources_B.unsqueeze(1).expand_as(labels_BL)

    def add(self, loss_Bl: Tensor, sources_Bl: Tensor) -> None:
        """Add the losses of tokens, each to its source."""
        numbers_S11 = torch.arange(len(self.nats_S), device=self.nats_S.device).view(-1, 1, 1)
        self.nats_S.add_(torch.where(sources_Bl == numbers_S11, loss_Bl.detach(), 0.0).sum((1, 2)))


class SourceLosses:
    """Sums over steps of the losses of each source, and of its tokens that count, as far as this rank has them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._forget()

    def _forget(self) -> None:
        self._nats, self._tokens = torch.zeros(2, len(self.names), dtype=torch.float64).unbind()

    def add(self, nats: Sequence[float], tokens: Sequence[int]) -> None:
        """Add those of a step, for each source."""
        self._nats += torch.tensor(nats, dtype=torch.float64)
        self._tokens += torch.tensor(tokens, dtype=torch.float64)

    def take(self, layout: RankView) -> dict[str, float]:
        """The mean loss of each source that had tokens since it was asked last, in nats, by its name. A collective."""
        if not self.names:
            return {}
        sums = layout.sums(*self._nats.tolist(), *self._tokens.tolist())
        n, share = len(self.names), layout.degrees.data / layout.degrees.world  # so many ranks read the same rows
        self._forget()
        found = zip(self.names, sums[:n], sums[n:], strict=True)
        return {name: nats / (count * share) for name, nats, count in found if count}


class StepSources(NamedTuple):
    """Where the rows of a step come from."""

    rows: list[Tensor]
    """The sources of the rows of each microbatch, (B,) each."""
    losses: SourceLosses
    """Where the losses of the step are added."""

    def tallies(self, size: int | None, device: torch.device) -> list[Tally]:
        """A tally for each microbatch, or for each `size` rows of them."""
        parts = [part for rows_B in self.rows for part in (rows_B.split(size) if size else [rows_B])]
        return [Tally(part.to(device), torch.zeros(len(self.losses.names), device=device)) for part in parts]

    def tokens(self, batches: Sequence[Batch]) -> list[int]:
        """The labels of each source that count."""
        counts_S = torch.zeros(len(self.losses.names), dtype=torch.int64)
        for rows_B, batch in zip(self.rows, batches, strict=True):
            counts_S.index_add_(0, rows_B, (batch.labels_BL != IGNORE).sum(1))
        return counts_S.tolist()

    def add(self, tallies: Sequence[Tally], batches: Sequence[Batch]) -> None:
        """Add what a step has found: its `tallies`, and the labels of its batches."""
        nats_S = torch.stack([tally.nats_S for tally in tallies]).cpu().double().sum(0)
        self.losses.add(nats_S.tolist(), self.tokens(batches))
