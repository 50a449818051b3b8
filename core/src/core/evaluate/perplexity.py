"""How well a model predicts a text."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from core.config.errors import UserError
from core.data.tokenizer import Tokenizer
from core.evaluate.scores import Score, ScoredRow

SEQ_LEN, STRIDE = 2048, 1024  # tokens that are seen at once, and of them predicted, where nobody says otherwise
MOST_TEXT_MIB = 1024
"""So large may a text be."""


class Perplexity(NamedTuple):
    """How well a text was predicted."""

    nats_per_token: float
    perplexity: float
    """e to the power of that."""
    bits_per_byte: float
    """The same by bytes of the text in UTF-8, which compares between tokenizers."""
    n_tokens: int
    n_bytes: int


def perplexity_of(
    text: str,
    tokenizer: Tokenizer,
    score: Callable[[Sequence[ScoredRow]], Sequence[Score]],
    *,
    seq_len: int,
    stride: int,
) -> Perplexity:
    """How well `score` predicts a text, as one document: every token once, behind at least `seq_len - stride` others
    as far as there are so many.

    Its first token is predicted behind bos, or else behind eos, which ends the document before in training. Raises
    `UserError` for a text without tokens, and for a tokenizer with neither.
    """
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("a text without tokens has no perplexity: give one with text in it")
    if first is None:
        raise UserError("the tokenizer has no bos and no eos, behind which the first token could be predicted")
    found = score(list(windows([first, *ids], seq_len=seq_len, stride=stride)))
    nats = -math.fsum(math.fsum(each.log_probs) for each in found)
    n_bytes, mean = len(text.encode()), nats / len(ids)
    return Perplexity(mean, math.exp(min(mean, 700)), nats / math.log(2) / n_bytes, len(ids), n_bytes)


def windows(ids: Sequence[int], *, seq_len: int, stride: int) -> Iterator[ScoredRow]:
    """Rows of at most `seq_len` inputs that ask for every id but the first once, the later rows for `stride` each."""
    end = min(seq_len, len(ids) - 1)
    yield ScoredRow(ids[: end + 1], end)
    while end < len(ids) - 1:
        n = min(stride, len(ids) - 1 - end)
        end += n
        yield ScoredRow(ids[end - seq_len : end + 1], n)
