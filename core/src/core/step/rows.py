"""Which rows of the data a rank reads for a step."""

import torch

from core.data.packing import IGNORE, Batch
from core.data.samples import Samples
from core.data.sampling import Split
from core.data.tokenizer import Tokenizer
from core.parallel.layout import RankView
from core.runtime.activity import working
from core.runtime.launcher import World, find_world


@working("preparing text")
def open_samples(
    config: Samples.Config,
    tokenizer: Tokenizer,
    layout: RankView,
    split: Split,
    *,
    seq_len: int,
    seed: int,
    rows_per_step: int,
) -> Samples:
    """The rows of a run, as this rank reads them; the first rank of a machine verifies what is in the cache."""
    place = {"rank": layout.data_rank, "n_ranks": layout.degrees.data}
    leads = (find_world() or World()).local_rank == 0
    sizes = {"seq_len": seq_len, "seed": seed, "rows_per_step": rows_per_step}
    return config.build(tokenizer=tokenizer, split=split, verify=leads, **sizes, **place)


def microbatches(
    loader: Samples, layout: RankView, *, first: int, n_rows: int, local_batch_size: int, end: int | None = None
) -> list[Batch]:
    """This rank's part of the rows first, ..., first + n_rows - 1, `local_batch_size` rows at a time.

    Rows are dealt out microbatch by microbatch, so that a step has the same rows on any number of ranks. Rows from
    `end` on are there, and count for nothing: every rank has equally many.

        microbatch     0 0 1 1        of two ranks, two rows at a time
        rank           0 1 0 1
    """
    n_data = layout.degrees.data
    batches = []
    for own in own_rows(layout, first=first, n_rows=n_rows, local_batch_size=local_batch_size):
        if loader.in_order:  # dealt out already
            start = own - layout.data_rank * local_batch_size
            batches.append(loader.read(start // n_data, local_batch_size))
            continue
        count = local_batch_size if end is None else min(max(end - own, 0), local_batch_size)
        batch = loader.read(own if count else first, max(count, 1))
        batches.append(padded(batch, count, local_batch_size))
    return batches


def own_rows(layout: RankView, *, first: int, n_rows: int, local_batch_size: int) -> range:
    """The first row of each of this rank's microbatches."""
    own = first + layout.data_rank * local_batch_size
    return range(own, own + n_rows, local_batch_size * layout.degrees.data)


def padded(batch: Batch, count: int, n_rows: int) -> Batch:
    """The first `count` rows of a batch, and as many more that count for nothing as make `n_rows`."""
    if count == n_rows:
        return batch
    row = torch.arange(n_rows).clamp(max=max(count - 1, 0))
    whole = batch.map(lambda part: part[row])
    whole.labels_BL[count:] = IGNORE
    return whole
