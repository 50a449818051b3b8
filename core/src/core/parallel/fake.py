"""Ranks that are not there: one process lays out a run of thousands, and nobody answers it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend


@contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """A process group of `world_size` in which this process is `rank`, while the block runs.

    Its collectives return at once and move nothing.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _gen_transform_infos.cache_clear()  # torch 2.13 keeps groups there by the shape of their mesh
        _clear_sharding_prop_cache()
