"""The vocabulary of the head as one rank holds it: the pieces that a loss over it is made of.

Tensor parallelism cuts the vocabulary: a rank has the logits of its own words, for the tokens of all ranks; what is
summed over the vocabulary goes to the rank of the token. A loss is written once, in these pieces.

Letters: B rows, L tokens that the labels are given for, l those of them that are this rank's, v this rank's words.
"""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

from core.data.packing import IGNORE


class Vocabulary(ABC):
    """Reductions over the whole vocabulary. Logits are (B, L, v) in fp32, labels (B, L), results (B, l)."""

    def __init__(self, size: int, n_ranks: int = 1) -> None:
        """`size` is that of the whole vocabulary, which `n_ranks` share, and the tokens with it."""
        self.size, self.n_ranks = size, n_ranks

    @abstractmethod
    def max(self, logits_BLv: Tensor) -> Tensor:
        """The largest logit of each of the L tokens, (B, L); it has no gradient."""

    @abstractmethod
    def sum(self, values_BLv: Tensor) -> Tensor:
        """Values of all words summed, for the tokens of this rank."""

    @abstractmethod
    def pick(self, values_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        """The value at each label, for the tokens of this rank; 0 where the label is IGNORE."""

    @abstractmethod
    def own_tokens(self, values_BL: Tensor) -> Tensor:
        """Of values of all tokens those of this rank's."""

    @abstractmethod
    def all_tokens(self, values_Bl: Tensor) -> Tensor:
        """Of values of each rank's tokens those of all, (B, L); without a gradient."""

    @abstractmethod
    def total(self, values_BL: Tensor) -> Tensor:
        """Values of all ranks' words summed, for all L tokens, (B, L); without a gradient."""

    @abstractmethod
    def find(self, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The label as a word of this rank, (B, L, 1), 0 where it is none, and whether it is one."""

    @abstractmethod
    def cross_entropy(self, logits_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        """`logsumexp` less `pick`, in the way that is fastest here; 0 where the label is IGNORE."""

    def logsumexp(self, logits_BLv: Tensor) -> Tensor:
        """The logarithm of the sum of the exponentials of all logits, for the tokens of this rank."""
        max_BL = self.max(logits_BLv)
        return self.sum((logits_BLv - max_BL.unsqueeze(-1)).exp()).log() + self.own_tokens(max_BL)


class WholeVocabulary(Vocabulary):
    """All words and all tokens are here."""

    def max(self, logits_BLv: Tensor) -> Tensor:
        return logits_BLv.detach().amax(-1)

    def sum(self, values_BLv: Tensor) -> Tensor:
        return values_BLv.sum(-1)

    def pick(self, values_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        index_BL1, own_BL1 = self.find(labels_BL)
        return values_BLv.gather(-1, index_BL1).masked_fill(~own_BL1, 0.0).squeeze(-1)

    def own_tokens(self, values_BL: Tensor) -> Tensor:
        return values_BL

    def all_tokens(self, values_Bl: Tensor) -> Tensor:
        return values_Bl

    def total(self, values_BL: Tensor) -> Tensor:
        return values_BL

    def find(self, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        own_BL1 = (labels_BL != IGNORE).unsqueeze(-1)
        return labels_BL.unsqueeze(-1).masked_fill(~own_BL1, 0), own_BL1

    def cross_entropy(self, logits_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        losses = F.cross_entropy(logits_BLv.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view_as(labels_BL)
