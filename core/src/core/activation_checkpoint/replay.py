"""A block's forward recorded, and repeated in backward under guard: the repetition must do what the forward did.

Built on the two dispatch modes of PyTorch's selective checkpointing (torch 2.13), which save and give back outputs by
(operation, how many of its kind came before). They notice an operation that was not there in forward, but not one that
is missing: later outputs of its kind would silently be those of another call. So the sequences are compared here.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointError,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
)

from core.activation_checkpoint.region import OFF_THE_RECORD, RECOMPUTING

FOREIGN = {"c10d", "fsdp", "profiler"}
"""Namespaces of what hooks of data parallelism do around a block's modules: it may differ, and is not ours to save."""


SAVED: Counter[Any] = Counter()
"""How often each operation was saved; counted in debug."""

MODULES: list[str] = []
"""Names of the modules whose forward is running, the innermost last; `name_modules` keeps it up in debug."""


@dataclass(slots=True)
class Trace:
    """What one call of a block dispatched, in order."""

    debug: bool = False
    """Also note the module of each operation, and count in SAVED."""
    ops: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, op: Any) -> None:
        self.ops.append(op)
        if self.debug:
            self.places.append(MODULES[-1] if MODULES else "the block")

    def place(self, index: int) -> str:
        """Where operation number `index` came from, as the end of a sentence."""
        return f" in {self.places[index]}" if self.debug else " (--activation_checkpoint.debug names the module)"


def name_modules(root: nn.Module, path: str) -> None:
    """Let every module below `root` say its name in MODULES while its forward runs."""

    def enter(name: str) -> Callable:
        return lambda module, args: None if torch.compiler.is_compiling() else MODULES.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            MODULES.pop()

    for name, module in root.named_modules():
        module.register_forward_pre_hook(enter(f"{path}.{name}" if name else path))
        module.register_forward_hook(leave, always_call=True)


class Forward(_CachingTorchDispatchMode):
    """Runs a block's forward, lets the policy decide for each output, and records the operations."""

    supports_higher_order_operators = True  # torch 2.13 registers flex_attention and its like for the parent class only

    def __init__(self, decide: Callable[..., CheckpointPolicy], storage: dict, trace: Trace) -> None:
        super().__init__(self.counted if trace.debug else decide, storage)
        self.decide, self.trace = decide, trace

    def counted(self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """The policy's decision, noted in SAVED."""
        decision = self.decide(context, op, *args, **kwargs)
        SAVED[op] += decision is CheckpointPolicy.MUST_SAVE
        return decision

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if is_aside(func):
            return func(*args, **(kwargs or {}))
        self.trace.add(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Recompute(_CachedTorchDispatchMode):
    """Repeats the forward, takes what was saved, and compares each operation with the record."""

    supports_higher_order_operators = True

    def __init__(self, storage: dict, trace: Trace) -> None:
        super().__init__(None, storage)
        self.trace = trace
        self.position = 0

    def __enter__(self) -> "Recompute":
        self.position = 0
        self.token = RECOMPUTING.set(True)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        RECOMPUTING.reset(self.token)
        super().__exit__(kind, error, traceback)
        if kind is None and self.position < len(self.trace.ops):
            missing = self.trace.ops[self.position]
            raise CheckpointError(
                f"the recomputation of a block ended before operation {self.position + 1}, {missing}, "
                f"which its forward had{self.trace.place(self.position)}. {MEND}"
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if is_aside(func):
            return func(*args, **(kwargs or {}))
        self.compare(func)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def compare(self, func: Any) -> None:
        """Raise `CheckpointError` when this is not the operation that the forward did at this point."""
        recorded = self.trace.ops
        if self.position >= len(recorded):
            raise CheckpointError(f"a block's recomputation does {func} after the end of its forward. {MEND}")
        expected = recorded[self.position]
        if expected is not func:
            raise CheckpointError(
                f"operation {self.position + 1} of a block was {expected} in forward{self.trace.place(self.position)}, "
                f"and is {func} in its recomputation. {MEND}"
            )
        self.position += 1


MEND = (
    "A checkpointed block must do the same both times: put one-time work (a cache, a counter, a log) inside "
    "core.activation_checkpoint.region.off_the_record(), and there under `if not is_recomputing()` if it adds up."
)

Replay = tuple[Forward, Recompute]


def replay_contexts(decide: Callable[..., CheckpointPolicy], trace: Trace) -> Replay:
    """The modes of one call of a block: `decide` is asked once per operation, in forward."""
    storage: dict[Any, dict[int, Any]] = defaultdict(dict)
    return Forward(decide, storage, trace), Recompute(storage, trace)


def is_aside(func: Any) -> bool:
    """Whether an operation is neither recorded nor compared."""
    return OFF_THE_RECORD.get() or func in SAC_IGNORED_OPS or getattr(func, "namespace", None) in FOREIGN
