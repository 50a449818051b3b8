"""The choice of the next token.

Letters: B rows, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.errors import UserError


class Sampler:
    """Draws one token for each row, from `choices` of these settings; `temperature` 0 takes the likeliest.

    Row b has a stream of random numbers of its own, started from `seed` + b: its text depends on no other row. The
    numbers are drawn on the CPU, and are the same for every device.
    """

    def __init__(
        self, n_rows: int, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(n_rows)]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Ids (B,). Raises `UserError` for logits that are not finite."""
        if not torch.stack(logits_BV.aminmax()).isfinite().all():
            raise UserError("the model gives logits that are not finite: the weights of this checkpoint are broken")
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        probability_BV, ids_BV = choices(logits_BV, self.temperature, self.top_k, self.top_p)
        numbers = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        place_B1 = places(probability_BV, torch.stack(numbers).to(logits_BV.device))
        return ids_BV.gather(-1, place_B1)[:, 0]


def choices(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The tokens that may come next: their probabilities, of sum 1 in each row, and their ids. They stand likeliest
    first, or by their ids where all may come, for which nothing need be sorted.

    Logits are divided by `temperature`. Then the `top_k` likeliest tokens stay, of equal ones those with the lower id;
    and of these, by their share among themselves, the fewest likeliest whose shares reach `top_p` (arXiv:1904.09751).
    What does not stay has probability 0.
    """
    if top_k is None and top_p >= 1:
        ids_BV = torch.arange(logits_BV.shape[1], device=logits_BV.device).expand_as(logits_BV)
    else:
        logits_BV, ids_BV = ranked(logits_BV, top_k)
    best_B1 = logits_BV.amax(-1, keepdim=True).double()
    share_BV = logits_BV.to(torch.float64, copy=True).sub_(best_B1).div_(temperature).softmax(-1)
    if top_p >= 1:
        return share_BV, ids_BV
    before_BV = F.pad(share_BV.cumsum(-1)[:, :-1], (1, 0))
    share_BV = share_BV.masked_fill(before_BV >= top_p, 0.0)
    return share_BV / share_BV.sum(-1, keepdim=True), ids_BV


def ranked(logits_BV: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The `top_k` largest logits of each row (B, V) in falling order, and their ids; of equal ones the lower id first.

    Only where the least of them is not the only one of its size must the whole vocabulary be sorted.
    """
    if top_k is not None and top_k < logits_BV.shape[1]:
        best_BK, ids_BK = logits_BV.topk(top_k)
        if bool(((logits_BV >= best_BK[:, -1:]).sum(-1) == top_k).all()):
            ids_BK = ids_BK.sort(-1).values
            found_BK, order_BK = logits_BV.gather(-1, ids_BK).sort(dim=-1, descending=True, stable=True)
            return found_BK, ids_BK.gather(-1, order_BK)
    logits_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    return logits_BV[:, :top_k], ids_BV[:, :top_k]


def places(probability_BV: Tensor, number_B: Tensor) -> Tensor:
    """Where numbers from [0, 1) fall when the probabilities of a row lie side by side: (B, 1), never on a 0."""
    end_BV = probability_BV.cumsum(-1)
    target_B1 = number_B[:, None] * end_BV[:, -1:]
    last_B1 = (end_BV < end_BV[:, -1:]).sum(-1, keepdim=True)
    return torch.searchsorted(end_BV, target_B1, right=True).minimum(last_B1)
