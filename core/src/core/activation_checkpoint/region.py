"""Named exceptions to the policy, stated beside the computation they are about.

A module says what a stretch of its forward is; the policy alone decides what is saved. The marks are read by the eager
modes and, as annotations of the graph, by torch.compile (`torch.fx.traceback.annotate`, torch 2.11 to 2.13).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.fx.traceback

Mark = Literal["keep", "recompute"]

_KEY = "armature_activation_checkpoint"
RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)
OFF_THE_RECORD: ContextVar[bool] = ContextVar("off_the_record", default=False)


def kept() -> AbstractContextManager:
    """Outputs computed inside are saved in every mode, full included.

    For decisions that a recomputation must not take again, such as the routing of tokens to experts: computed anew in
    another rounding they could send a token elsewhere, and its gradient with it.
    """
    return torch.fx.traceback.annotate({_KEY: "keep"})


def recomputed() -> AbstractContextManager:
    """Outputs computed inside are computed again in backward in every mode, whatever the operation."""
    return torch.fx.traceback.annotate({_KEY: "recompute"})


def current_mark() -> Mark | None:
    """The innermost mark around the operation that is being dispatched."""
    return torch.fx.traceback.current_meta.get("custom", {}).get(_KEY)


def is_recomputing() -> bool:
    """Whether this forward is a repetition for backward: counters and other one-time effects must leave it out.

    What is left out must stand inside `off_the_record()`, or the repetition is not what the forward was.
    """
    return not torch.compiler.is_compiling() and RECOMPUTING.get()


@contextmanager
def off_the_record() -> Iterator[None]:
    """Work inside is no part of the computation: not saved, and allowed to differ between forward and recomputation.

    No tensor that gradients flow through may be made here. Under torch.compile nothing is recorded anyway.
    """
    if torch.compiler.is_compiling():
        yield
        return
    token = OFF_THE_RECORD.set(True)
    try:
        yield
    finally:
        OFF_THE_RECORD.reset(token)
