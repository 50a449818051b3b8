"""The loss as a sum over tokens, so that whoever knows the count of the whole step divides.

Letters: B rows, L length, l the tokens of this rank, D width, v this rank's words of the vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from core.config.configurable import Configurable
from core.data.packing import IGNORE
from core.nn.layers import Head
from core.parallel.vocabulary import Vocabulary


class Loss(Configurable, ABC):
    """What training lowers: reads the residual stream through the head itself, on one rank and on many alike.

    A loss states what one token costs (`of_tokens`), in the pieces that a `Vocabulary` offers; the rest is here.
    """

    def __init__(self, config: Configurable.Config, *, compile_backend: str | None = None) -> None:
        """torch.compile gets `of_tokens` where a backend is named."""
        self.config = config
        self._of_tokens: Callable[[Tensor, Tensor, Vocabulary], Tensor] = self.of_tokens
        if compile_backend is not None:
            self._of_tokens = torch.compile(self.of_tokens, backend=compile_backend)

    @abstractmethod
    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Nats of each token of this rank, (B, l), of fp32 logits (B, L, v); what it says of IGNORE is left out."""

    def __call__(self, x_BLD: Tensor, labels_BL: Tensor, head: Head, vocabulary: Vocabulary) -> Tensor:
        """The summed loss of this rank's tokens whose label is not IGNORE, in nats and fp32; 0 if there are none.

        `x_BLD` is the normalised residual stream that the head takes: of this rank's tokens. `labels_BL` are those of
        all tokens whose logits the head computes here.
        """
        loss_Bl = self._of_tokens(head(x_BLD).float(), labels_BL, vocabulary)
        return loss_Bl.masked_fill(vocabulary.own_tokens(labels_BL) == IGNORE, 0.0).sum()


class CrossEntropy(Loss):
    """The negative log-likelihood of the labels."""

    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        return vocabulary.cross_entropy(logits_BLv, labels_BL)
