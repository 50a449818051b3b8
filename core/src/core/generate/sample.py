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
        if not logits_BV.isfinite().all():
            raise UserError("the model gives logits that are not finite: the weights of this checkpoint are broken")
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        probability_BV, ids_BV = choices(logits_BV, self.temperature, self.top_k, self.top_p)
        numbers = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        place_B1 = places(probability_BV, torch.stack(numbers).to(logits_BV.device))
        return ids_BV.gather(-1, place_B1)[:, 0]


def choices(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The tokens that may come next, likeliest first: their probabilities, of sum 1 in each row, and their ids.

    Logits are divided by `temperature`. Then the `top_k` likeliest tokens stay, of equal ones those with the lower id;
    and of these, by their share among themselves, the fewest likeliest whose shares reach `top_p` (arXiv:1904.09751).
    What does not stay has probability 0.
    """
    logits_BV, ids_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    logits_BV, ids_BV = logits_BV[:, :top_k], ids_BV[:, :top_k]
    share_BV = ((logits_BV - logits_BV[:, :1]) / temperature).softmax(-1)
    if top_p < 1:
        before_BV = F.pad(share_BV.cumsum(-1)[:, :-1], (1, 0))
        share_BV = share_BV.masked_fill(before_BV >= top_p, 0.0)
    return share_BV / share_BV.sum(-1, keepdim=True), ids_BV


def places(probability_BV: Tensor, number_B: Tensor) -> Tensor:
    """Where numbers from [0, 1) fall when the probabilities of a row lie side by side: (B, 1), never on a 0."""
    end_BV = probability_BV.cumsum(-1)
    target_B1 = number_B[:, None] * end_BV[:, -1:]
    last_B1 = (probability_BV > 0).sum(-1, keepdim=True) - 1
    return torch.searchsorted(end_BV, target_B1, right=True).minimum(last_B1)
