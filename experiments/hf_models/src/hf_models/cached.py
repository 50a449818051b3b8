"""What a model of transformers has computed of a text, kept, so that one token more costs one token.

Letters: B rows, L length of what is new, M length of all so far, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.config.errors import UserError
from hf_models.folder import accepts, masks_of
from hf_models.model import HFModel

KEPT = ("cache", "past_key_values")
"""What transformers calls it, since 5.2x and before."""
CHECKED = 8
"""Tokens of the text that is read to see whether pieces are read as a whole is."""


class CachedHFModel:
    """A model that reads a batch of texts piece by piece, as `core.generate.cache.CachedDecoder` reads core's: inside
    `with`, a call takes the tokens (B, L) that follow in each row and returns the logits (B, V) of the token after.

    What is kept is transformers' own cache. Row b begins with `n_pads[b]` tokens that are no text, which the attention
    mask hides; positions count from the text. Raises `UserError` for a model that keeps nothing, or that does not read
    pieces, or rows with such tokens, as it reads a whole text.
    """

    def __init__(self, model: HFModel, *, n_pads: Sequence[int], capacity: int) -> None:
        path = model.config.path
        found = next((kept for kept in KEPT if accepts(path, kept)), None)
        if found is None:
            raise UserError(f"{keeps_nothing(model)} ({' or '.join(KEPT)}): it does not write")
        if any(n_pads) and not accepts(path, "attention_mask"):
            name = type(model.theirs).__name__
            raise UserError(f"{name} of transformers has no attention_mask: give prompts of one length, or one prompt")
        self.model, self.kept, self.length, self.padded = model, found, 0, any(n_pads)
        device = next(model.parameters()).device
        self.n_pads_B1 = torch.tensor(n_pads, device=device)[:, None]
        self.index_1M = torch.arange(capacity, device=device)[None]
        self.state: Any = None
        tables = (part for name, part in model.theirs.named_modules() if name.endswith("position_embeddings"))
        self.counts_otherwise = any(getattr(table, "padding_idx", None) is not None for table in tables)
        """From the number behind the padding's, as RoBERTa does: it has to count by itself."""

    def __enter__(self) -> "CachedHFModel":
        if self.padded not in self.model.checked:
            check_pieces(self.model, padded=self.padded)
            self.model.checked.add(self.padded)
        return self

    def __exit__(self, *raised: object) -> None:
        self.state = None

    @torch.inference_mode()
    def __call__(self, tokens_BL: Tensor) -> Tensor:
        config, index_1M = self.model.config, self.index_1M[:, : self.length + tokens_BL.shape[1]]
        path = config.path
        asked = {"attention_mask": (index_1M >= self.n_pads_B1).long()}
        if not masks_of(path, config.attention):  # what it hides are inputs, not keys: those of these tokens
            asked["attention_mask"] = asked["attention_mask"][:, self.length :]
        if not self.counts_otherwise:
            asked["position_ids"] = (index_1M - self.n_pads_B1)[:, self.length :].clamp(min=0)
        asked = {name: value for name, value in asked.items() if accepts(path, name)}
        keep = {"logits_to_keep": 1} if accepts(path, "logits_to_keep") else {}
        found = self.model.theirs(input_ids=tokens_BL, use_cache=True, **{self.kept: self.state}, **asked, **keep)
        self.state, self.length = found.get(self.kept), index_1M.shape[1]
        if self.state is None:
            raise UserError(f"{keeps_nothing(self.model)} that it hands on: it does not write")
        return found.logits[:, -1]


def keeps_nothing(model: HFModel) -> str:
    """The beginning of the sentence that says so."""
    return f"{type(model.theirs).__name__} of transformers keeps nothing of a text"


@torch.inference_mode()
def check_pieces(model: HFModel, *, padded: bool) -> None:
    """Raises `UserError` where the logits of a short text differ when it is read in pieces, in a batch with rows that
    begin with tokens which are no text if `padded`, from those when each row is read as a whole."""
    weight, n_pads = next(model.parameters()), [0, 3] if padded else [0]
    tokens_L = torch.arange(1, CHECKED + 1, device=weight.device) * 7919 % model.config.vocab_size
    reader = CachedHFModel(model, n_pads=n_pads, capacity=CHECKED)
    pieces = tokens_L.expand(len(n_pads), -1).split([CHECKED - 2, 1, 1], dim=1)
    found_BPV = torch.stack([reader(piece_BL) for piece_BL in pieces], dim=1)
    whole = [model.theirs(input_ids=tokens_L[None, n:], use_cache=False).logits[0, -len(pieces) :] for n in n_pads]
    expected_BPV = torch.stack(whole)
    off = ((found_BPV - expected_BPV).abs().max() / expected_BPV.std()).item()
    if not off < (0.01 if expected_BPV.dtype == torch.float32 else 0.1):
        how = "in a batch of prompts of several lengths: give one prompt" if padded else "in pieces: it does not write"
        name = type(model.theirs).__name__
        raise UserError(f"{name} of transformers has other logits, by {off:.0%} of their deviation, for a text {how}")
