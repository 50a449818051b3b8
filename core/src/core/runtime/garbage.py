"""Python's cycle collector at moments of our choice."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_garbage() -> Iterator[None]:
    """The cycle collector stands still while the block runs: the loop calls it at its own moments."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
