"""What a model says of tokens that are there: how likely each is behind those in front of it.

Letters: B rows, L length of the longest row, D width, T tokens that are asked for, C tokens of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from core.nn.decoder import Decoder
from core.nn.layers import Head
from core.runtime.activity import followed, working

MOST_LOGITS = 2**24
"""So many logits exist at a time: 64 MiB in fp32."""


class ScoredRow(NamedTuple):
    """Ids of which the last `n` are asked for; at least one stands in front of them."""

    ids: Sequence[int]
    n: int


class Score(NamedTuple):
    """What a model says of the tokens that were asked for."""

    log_probs: list[float]
    """Of each, in nats."""
    greedy: bool
    """Whether each is the likeliest of all words."""


@torch.no_grad()
def score_rows(model: Decoder, rows: Sequence[ScoredRow], *, batch_tokens: int) -> list[Score]:
    """The score of each row, in their order; the model must be in evaluation mode.

    Rows of similar length share a forward of at most `batch_tokens` tokens, or of one row.
    """
    scores: dict[int, Score] = {}
    lengths = [len(row.ids) - 1 for row in rows]
    batches = list(batches_by_length(lengths, batch_tokens))
    with working("predicting texts"):
        for numbers in followed(batches, lambda batch: sum(lengths[n] for n in batch), lambda n: f"{n:,} tokens"):
            found = _scored(model, [rows[number] for number in numbers])
            scores |= dict(zip(numbers, found, strict=True))
    return [scores[number] for number in range(len(rows))]


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of rows of these lengths, the longest first, in batches that fill to at most `batch_tokens`."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _scored(model: Decoder, rows: Sequence[ScoredRow]) -> Iterator[Score]:
    """The scores of rows that share a forward. They are filled up behind, where no token that counts looks."""
    longest = max(len(row.ids) - 1 for row in rows)
    filled = [list(row.ids) + [0] * (longest + 1 - len(row.ids)) for row in rows]
    ids_BL = torch.tensor(filled, device=next(model.parameters()).device)
    places = [(b, len(row.ids) - 1 - row.n + k) for b, row in enumerate(rows) for k in range(row.n)]
    place_T2 = torch.tensor(places, device=ids_BL.device)
    row_T, column_T = place_T2.unbind(1)
    labels_T = ids_BL[row_T, column_T + 1]

    def read(x_BLD: Tensor, head: Head, depth: int) -> Tensor:
        return score_tokens(x_BLD[row_T, column_T], head, labels_T, n_words=model.config.vocab_size)

    log_probs, greedy = cast(Tensor, model(ids_BL[:, :-1], None, read)).tolist()
    first = 0
    for row in rows:
        part = slice(first, first + row.n)
        yield Score(log_probs[part], all(greedy[part]))
        first += row.n


def score_tokens(x_TD: Tensor, head: Head, labels_T: Tensor, *, n_words: int) -> Tensor:
    """The log-probabilities of labels (T,) of `n_words` at the normalised residual stream (T, D), and whether each is
    the likeliest: (2, T), in fp32."""
    found = []
    n_chunk = max(1, MOST_LOGITS // n_words)
    for x_CD, labels_C in zip(x_TD.split(n_chunk), labels_T.split(n_chunk), strict=True):
        logits_CV = head(x_CD).float()
        log_probs_C = logits_CV.gather(1, labels_C[:, None])[:, 0] - logits_CV.logsumexp(1)
        found.append(torch.stack((log_probs_C, (logits_CV.argmax(1) == labels_C).float())))
    return torch.cat(found, 1)
