"""What a model of transformers has computed of a text, kept, so that one token more costs one token.

Letters: B rows, L length of what is new, M length of all so far, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.config.errors import UserError
from hf_models.folder import accepts
from hf_models.model import HFModel

KEPT = ("cache", "past_key_values")
"""What transformers calls it, since 5.2x and before."""


class CachedHFModel:
    """A model that reads a batch of texts piece by piece, as `core.generate.cache.CachedDecoder` reads core's: inside
    `with`, a call takes the tokens (B, L) that follow in each row and returns the logits (B, V) of the token after.

    What is kept is transformers' own cache. Row b begins with `n_pads[b]` tokens that are no text, which the attention
    mask hides; positions count from the text. Raises `UserError` for a model that keeps nothing.
    """

    def __init__(self, model: HFModel, *, n_pads: Sequence[int], capacity: int) -> None:
        path, name = model.config.path, type(model.theirs).__name__
        found = next((kept for kept in KEPT if accepts(path, kept)), None)
        if found is None:
            raise UserError(f"{name} of transformers keeps nothing of a text ({' or '.join(KEPT)}): it does not write")
        if any(n_pads) and not accepts(path, "attention_mask"):
            raise UserError(f"{name} of transformers has no attention_mask: give prompts of one length, or one prompt")
        self.model, self.kept, self.length = model, found, 0
        device = next(model.parameters()).device
        self.n_pads_B1 = torch.tensor(n_pads, device=device)[:, None]
        self.index_1M = torch.arange(capacity, device=device)[None]
        self.state: Any = None

    def __enter__(self) -> "CachedHFModel":
        return self

    def __exit__(self, *raised: object) -> None:
        self.state = None

    @torch.inference_mode()
    def __call__(self, tokens_BL: Tensor) -> Tensor:
        index_1M = self.index_1M[:, : self.length + tokens_BL.shape[1]]
        asked = {"attention_mask": (index_1M >= self.n_pads_B1).long()}
        asked["position_ids"] = (index_1M - self.n_pads_B1)[:, self.length :].clamp(min=0)
        path = self.model.config.path
        asked = {name: value for name, value in asked.items() if accepts(path, name)}
        keep = {"logits_to_keep": 1} if accepts(path, "logits_to_keep") else {}
        found = self.model.theirs(input_ids=tokens_BL, use_cache=True, **{self.kept: self.state}, **asked, **keep)
        self.state, self.length = found[self.kept], index_1M.shape[1]
        return found.logits[:, -1]
