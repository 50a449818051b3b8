"""How much text tokens stand for, so that losses of other tokenizers compare: bits per byte."""

import torch

from core.data.packing import IGNORE, Batch
from core.data.tokenizer import Tokenizer


class TextBytes:
    """Bytes of text in UTF-8 that the labels of a batch stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes_V = torch.tensor(tokenizer.n_bytes(), dtype=torch.float64)
        self.bos_id = tokenizer.bos_id
        self.added = sum(self.bytes_V[tokenizer.encode("a")].tolist()) - 1
        """Bytes that the tokenizer puts in front of a text: some begin each with a space."""

    def __call__(self, batch: Batch) -> float:
        """The bytes of all labels that count; NaN where one is of an unknown token.

        The end of a document, which is predicted too, stands for no text. Where a document begins with a token of its
        own, its first text is predicted from that, and what the tokenizer put in front does not count.
        """
        counts_BL = batch.labels_BL != IGNORE
        bytes_N = self.bytes_V[batch.labels_BL[counts_BL]]
        opens_N = batch.tokens_BL[counts_BL] == (IGNORE if self.bos_id is None else self.bos_id)
        return float(bytes_N.sum() - self.added * (opens_N & (bytes_N > 0)).sum())
