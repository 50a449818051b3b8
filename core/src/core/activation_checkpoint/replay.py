"""A block's forward recorded, and repeated in backward under guard: the repetition must do what the forward did.

PyTorch's own modes of selective checkpointing save and give back outputs by (operation, how many
of its kind came before). They notice an operation that was not there in forward, but not one that is missing: later
outputs of its kind would silently be those of another call. So here outputs are saved by their place in the sequence,
and the sequences are compared. Under torch.compile, which tags a graph instead, PyTorch's modes work unchanged.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointError,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    _is_compiling,
    _VersionWrapper,
    create_selective_checkpoint_contexts,
)

from core.activation_checkpoint.region import OFF_THE_RECORD, RECOMPUTING
from core.config.errors import UserError

FOREIGN = {"c10d", "fsdp", "profiler"}
"""Namespaces of what hooks of data parallelism do around a block's modules: it may differ, and is not ours to save."""


SAVED: Counter[Any] = Counter()
"""How often each operation was saved; counted in debug."""

MODULES: list[str] = []
"""Names of the modules whose forward is running, the innermost last; `name_modules` keeps it up in debug."""


RECOMPUTE, USED = object(), object()
"""What stands in a trace for an output that is computed again, and for one that was given back."""


@dataclass(slots=True)
class Trace:
    """What one call of a block dispatched, in order, and the outputs that were saved."""

    debug: bool = False
    """Also note the module of each operation, and count in SAVED."""
    once: bool = True
    """Saved outputs are given back once, and free then; else they are there as often as backward comes by."""
    ops: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, op: Any, output: Any) -> None:
        self.ops.append(op)
        self.outputs.append(output)
        if self.debug:
            self.places.append(MODULES[-1] if MODULES else "the block")
            SAVED[op] += output is not RECOMPUTE

    def take(self, op: Any, index: int) -> Any:
        """The output saved for operation number `index`, or RECOMPUTE.

        Raises `CheckpointError` when `op` is not the operation that the forward did at this point.
        """
        if index >= len(self.ops):
            raise CheckpointError(f"a block's recomputation does {op} after the end of its forward. {FIX}")
        if self.ops[index] is not op:
            raise CheckpointError(
                f"operation {index + 1} of a block was {self.ops[index]} in forward{self.place(index)}, "
                f"and is {op} in its recomputation. {FIX}"
            )
        output = self.outputs[index]
        if output is USED:
            raise RuntimeError(
                "backward went a second time through a block under activation checkpointing, whose saved outputs are "
                "given back only once: use --activation_checkpoint.mode none"
            )
        if output is not RECOMPUTE and self.once:
            self.outputs[index] = USED
        return output

    def check_end(self, n_done: int) -> None:
        """Raise `CheckpointError` when the forward went on after its first `n_done` operations."""
        if n_done < len(self.ops):
            raise CheckpointError(
                f"the recomputation of a block ended before operation {n_done + 1}, {self.ops[n_done]}, "
                f"which its forward had{self.place(n_done)}. {FIX}"
            )

    def place(self, index: int) -> str:
        """Where operation number `index` came from, as the end of a sentence."""
        return f" in {self.places[index]}" if self.debug else " (--activation_checkpoint.debug names the module)"


def name_modules(root: nn.Module, path: str) -> None:
    """Let every module below `root` say its name in MODULES while its forward runs."""
    for name, module in root.named_modules():
        module.forward = named(f"{path}.{name}" if name else path, module.forward)


def named(name: str, forward: Callable) -> Callable:
    """The same forward, with `name` in MODULES meanwhile.

    Neither a hook nor a partial: torch.compile compares their numbers and arguments, and would give each block a graph
    of its own.
    """

    def inside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        MODULES.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            MODULES.pop()

    return inside


class Forward(_CachingTorchDispatchMode):
    """Runs a block's forward, and records each operation with its output where the policy saves it."""

    supports_higher_order_operators = True  # torch 2.13 registers flex_attention and its like for the parent class only

    def __init__(self, decide: Callable[..., CheckpointPolicy], storage: dict, trace: Trace) -> None:
        super().__init__(decide, storage)
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if is_aside(func):
            return func(*args, **kwargs)
        if _is_compiling(func, args, kwargs):
            return super().__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **kwargs)
        context = SelectiveCheckpointContext(is_recompute=False)
        context.op_output = out  # no argument before torch 2.12
        saves = self.policy_fn(context, func, *args, **kwargs) is CheckpointPolicy.MUST_SAVE
        self.trace.add(func, mapped(saved, out) if saves else RECOMPUTE)
        return out


class Recompute(_CachedTorchDispatchMode):
    """Repeats the forward, takes what was saved, and compares each operation with the record."""

    supports_higher_order_operators = True

    def __init__(self, decide: Callable[..., CheckpointPolicy], storage: dict, trace: Trace) -> None:
        super().__init__(decide, storage, False)
        self.trace = trace
        self.position = 0

    def __enter__(self) -> "Recompute":
        self.position = 0
        self.token = RECOMPUTING.set(True)
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        RECOMPUTING.reset(self.token)
        super().__exit__(exc_type, exc_val, exc_tb)
        if exc_type is None:
            self.trace.check_end(self.position)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if is_aside(func):
            return func(*args, **kwargs)
        if _is_compiling(func, args, kwargs):
            return super().__torch_dispatch__(func, types, args, kwargs)
        output = self.trace.take(func, self.position)
        self.position += 1
        if output is RECOMPUTE:
            return func(*args, **kwargs)
        try:
            return mapped(given_back, output)
        except RuntimeError as error:
            place = self.trace.place(self.position - 1)
            raise UserError(
                f"{error}: the output of {func}{place}, which was kept for backward, was changed in place afterwards; "
                "a copy is to be changed there, or use --activation_checkpoint.mode full or none"
            ) from error


def detached(output: Any) -> Any:
    """A tensor without its graph, and what is no tensor as it is.

    Beneath autograd's record of views, where the version counter stays: PyTorch's modes do so, by functions that differ
    between releases.
    """
    if not isinstance(output, torch.Tensor):
        return output
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return output.detach()


def mapped(function: Callable[[Any], Any], output: Any) -> Any:
    """`function` of an output, or of each of several."""
    one = isinstance(output, torch.Tensor | _VersionWrapper)  # a walk through a tree costs as much as a small operation
    return function(output) if one else tree_map(function, output)


def saved(output: Any) -> Any:
    """An output as it is kept: without its graph, and with its version, to notice if it is changed in place."""
    return _VersionWrapper(detached(output))


def given_back(kept: _VersionWrapper) -> Any:
    """The output again, without a graph of an earlier time; a RuntimeError when it was changed in place meanwhile."""
    return detached(kept.get_val(allow_cache_entry_mutation=False))


FIX = (
    "A checkpointed block must do the same both times: put one-time work (a cache, a counter, a log) inside "
    "core.activation_checkpoint.region.off_the_record(), and there under `if not is_recomputing()` if it adds up."
)

Replay = tuple[Forward, Recompute]


def replay_contexts(decide: Callable[..., CheckpointPolicy], trace: Trace) -> Replay:
    """The modes of one call of a block: `decide` is asked once per operation, in forward."""
    plain, _ = create_selective_checkpoint_contexts(decide)
    storage = plain.storage  # under torch.compile; its form differs between releases
    return Forward(decide, storage, trace), Recompute(decide, storage, trace)


def is_aside(func: Any) -> bool:
    """Whether an operation is neither recorded nor compared."""
    return OFF_THE_RECORD.get() or is_foreign(func)


@cache
def is_foreign(func: Any) -> bool:
    """Whether an operation is PyTorch's own bookkeeping, or that of hooks."""
    return func in SAC_IGNORED_OPS or getattr(func, "namespace", None) in FOREIGN
