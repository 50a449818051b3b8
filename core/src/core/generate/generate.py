"""The loop: a batch of prompts in one forward, then all rows token by token.

Letters: B rows, L length of the longest prompt.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from core.generate.cache import CachedDecoder, CachedReader
from core.generate.sample import Sampler
from core.nn.decoder import Decoder


@dataclass
class Completion:
    """The ids that follow a prompt, and whether the model ended the text there, by a token that is not among them."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    limits: Sequence[int],
    n_tokens: int,
    end_ids: Collection[int] = (),
    emit: Callable[[int, int | None], object] = lambda row, token: None,
    enough: Callable[[Sequence[int]], bool] = lambda ids: False,
    reader: CachedReader = CachedDecoder,
) -> list[Completion]:
    """Continue each prompt with ids below `n_tokens`, until one of `end_ids` comes or the prompt's limit is reached,
    or what there is of it is `enough`.

    `emit(row, token)` hears of every token as it comes, and of a row's end as token None. The model must be in
    evaluation mode; prompts are not empty, limits at least 1. It reads them by `reader`.
    """
    longest = max(map(len, prompts))
    n_pads = [longest - len(prompt) for prompt in prompts]
    device = next(model.parameters()).device
    tokens_BL = torch.tensor([[0] * n + list(ids) for n, ids in zip(n_pads, prompts, strict=True)], device=device)
    completions = [Completion() for _ in prompts]
    going = set(range(len(prompts)))
    with reader(model, n_pads=n_pads, capacity=longest + max(limits) - 1) as cached:
        while going:
            drawn_B = sampler(cached(tokens_BL)[:, :n_tokens])
            drawn = drawn_B.tolist()
            for row in sorted(going):
                completion, token = completions[row], drawn[row]
                completion.ended = token in end_ids
                if not completion.ended:
                    completion.ids.append(token)
                    emit(row, token)
                if completion.ended or len(completion.ids) == limits[row] or enough(completion.ids):
                    going.remove(row)
                    emit(row, None)
            tokens_BL = drawn_B[:, None]
    return completions
