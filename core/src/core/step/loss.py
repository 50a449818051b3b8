"""The loss as a sum, so that whoever knows the count of the whole step divides."""

from torch import Tensor
from torch.nn import functional as F

from core.data.packing import IGNORE


def cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of the labels that are not IGNORE, computed in fp32; 0 if none is."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORE, reduction="sum")
