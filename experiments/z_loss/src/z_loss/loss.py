"""Cross-entropy with a z-loss. Letters: B rows, L length, l the tokens of this rank, v this rank's words."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from core.parallel.vocabulary import Vocabulary
from core.step.loss import Loss


class ZLoss(Loss):
    """Cross-entropy, and the weighted square of the log-partition z = log sum exp(logits) of each token.

    From PaLM, arXiv:2204.02311, section 5. Cross-entropy does not change when a constant is added to all logits of a
    token; the square draws z towards 0.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Loss.Config):
        weight: float = 1e-4
        """Of the square; 0 is cross-entropy alone."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if not 0 <= self.weight < math.inf:
                yield "weight", f"weight {self.weight} must be finite and not negative; 0 is cross-entropy alone"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Loss

    def of_tokens(self, logits_BLv: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
        z_Bl = vocabulary.logsumexp(logits_BLv)
        return vocabulary.cross_entropy(logits_BLv, labels_BL) + self.config.weight * z_Bl.square()
