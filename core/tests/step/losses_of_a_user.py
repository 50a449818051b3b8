"""Losses as somebody writes them outside of core: no word about ranks."""

from dataclasses import dataclass

from torch import Tensor

from core.parallel.vocabulary import Vocabulary
from core.step.loss import Loss


class ZLoss(Loss):
    """Cross-entropy, and the square of the log-partition, which is to stay small (arXiv:2204.02311, section 5)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Loss.Config):
        weight: float = 0.1
        """Of the square."""

    config: Config

    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        z_Bl = vocabulary.logsumexp(logits_BLv)
        return vocabulary.cross_entropy(logits_BLv, labels_BL) + self.config.weight * z_Bl.square()


class Focal(Loss):
    """Cross-entropy that counts less where the model is sure already."""

    @dataclass(kw_only=True, slots=True)
    class Config(Loss.Config):
        gamma: float = 2.0
        """Exponent of the share that the model is unsure by."""

    config: Config

    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        log_p_Bl = vocabulary.pick(logits_BLv, labels_BL) - vocabulary.logsumexp(logits_BLv)
        return -((1 - log_p_Bl.exp()) ** self.config.gamma) * log_p_Bl


class Smoothed(Loss):
    """Cross-entropy of labels of which a tenth is dealt out to all words (arXiv:1512.00567, section 7)."""

    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        mean_Bl = vocabulary.sum(logits_BLv) / vocabulary.size
        z_Bl = vocabulary.logsumexp(logits_BLv)
        return z_Bl - 0.9 * vocabulary.pick(logits_BLv, labels_BL) - 0.1 * mean_Bl
