"""Plain ways to compute what core computes in its own way, to compare with."""

from torch import Tensor
from torch.nn import functional as F

from core.data.packing import IGNORE


def cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of the labels (B, L) that are not IGNORE, of whole logits (B, L, V)."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORE, reduction="sum")
