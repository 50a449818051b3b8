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

    def __init__(self, size: int) -> None:
        """`size` is that of the whole vocabulary."""
        self.size = size

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
        ignored_BL = labels_BL == IGNORE
        index_BL1 = labels_BL.masked_fill(ignored_BL, 0).unsqueeze(-1)
        return values_BLv.gather(-1, index_BL1).squeeze(-1).masked_fill(ignored_BL, 0.0)

    def own_tokens(self, values_BL: Tensor) -> Tensor:
        return values_BL

    def cross_entropy(self, logits_BLv: Tensor, labels_BL: Tensor) -> Tensor:
        losses = F.cross_entropy(logits_BLv.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view_as(labels_BL)
