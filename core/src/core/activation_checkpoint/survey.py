"""One forward of a model on fake tensors: what every operation of its blocks would save, recompute and cost."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from torch.utils.flop_counter import flop_registry

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.meter import Meter, storages
from core.activation_checkpoint.policy import Policy
from core.activation_checkpoint.replay import Replay
from core.config.configurable import Configurable

Fate = Literal["saved", "recomputed"]


@dataclass(kw_only=True, slots=True)
class Row:
    """All calls of one operation in one block that share a fate."""

    op: str
    fate: Fate
    count: int = 0
    bytes: int = 0
    """New memory of its outputs; a view has none."""
    flops: int = 0


@dataclass(kw_only=True, slots=True)
class BlockGroup:
    """Blocks that behave alike."""

    blocks: str
    n_blocks: int
    saved: int
    """Bytes that one block keeps alive for backward, its output included and its input not."""
    rows: list[Row]

    def flops(self, fate: Fate | None = None) -> int:
        return sum(row.flops for row in self.rows if fate is None or row.fate == fate)


@dataclass(kw_only=True, slots=True)
class Survey:
    """What a forward leaves for backward in one mode."""

    saved: int
    """Bytes kept by all blocks."""
    outside: int
    """Bytes kept elsewhere: rotation, mask, embedding and norm."""
    recomputed_share: float
    """FLOPs of the blocks that backward does again, as a share of their forward."""
    kinds: list[BlockGroup]


def survey(
    model_config: Configurable.Config,
    config: ActivationCheckpoint.Config,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    converters: Sequence[Configurable.Config] = (),
) -> Survey:
    """Run the model once on `shape` (rows, length) tokens with products in `dtype`, in the mode of `config`; its layers
    are changed by `converters` first."""
    blocks: list[tuple[list[Row], int]] = []
    with FakeTensorMode():
        model = model_config.build()
        for converter in converters:
            converter.build().apply(model)
        config.build(folder=Path()).apply(model)
        tokens = torch.zeros(shape, dtype=torch.int64)
        precision = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype, cache_enabled=False)
        with Meter() as meter, precision:
            for block in model.layers.values():
                watch_block(block, meter, blocks)
            output = model(tokens, read=residual_stream)
            alive = meter.alive
    assert output is not None, "it keeps alive what is counted"
    kinds = group(blocks)
    saved = sum(kind.saved * kind.n_blocks for kind in kinds)
    forward = sum(kind.flops() * kind.n_blocks for kind in kinds)
    again = sum(kind.flops("recomputed") * kind.n_blocks for kind in kinds)
    return Survey(saved=saved, outside=alive - saved, recomputed_share=again / forward, kinds=kinds)


def residual_stream(x_BLD: Tensor, head: nn.Module, depth: int) -> Tensor:
    """The `HeadReader` of what the head is given, (B, L, D)."""
    return x_BLD


def watch_block(block: nn.Module, meter: Meter, blocks: list[tuple[list[Row], int]]) -> None:
    """Append to `blocks`, when the block has run, its operations and the bytes it keeps."""
    forward = block.forward

    def heard(*args: Any) -> Any:
        rows: dict[tuple[str, Fate], Row] = {}
        before = meter.alive
        out = run_noted(forward, args, rows)
        blocks.append((list(rows.values()), meter.alive - before))
        return out

    block.forward = heard


def run_noted(forward: Callable, args: tuple, rows: dict[tuple[str, Fate], Row]) -> Any:
    """A block's forward, its operations noted: as the policy decides them, or all as saved where there is none."""
    if isinstance(forward, partial):
        inner, settings = forward.args
        return forward.func(inner, settings | {"context_fn": partial(noted, settings["context_fn"], rows)}, *args)
    with Listener(rows):
        return forward(*args)


def noted(policy: Policy, rows: dict[tuple[str, Fate], Row]) -> Replay:
    """The policy's modes, the forward one also noting what it decides."""
    forward, recompute = policy()
    decide = forward.policy_fn

    def note(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        decision = decide(context, op, *args, **kwargs)
        fate: Fate = "saved" if decision is CheckpointPolicy.MUST_SAVE else "recomputed"
        add(rows, fate, op, args, kwargs, context.op_output)
        return decision

    forward.policy_fn = note
    return forward, recompute


class Listener(TorchDispatchMode):
    """Notes every operation as saved."""

    def __init__(self, rows: dict[tuple[str, Fate], Row]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        add(self.rows, "saved", func, args, kwargs or {}, out)
        return out


def add(rows: dict[tuple[str, Fate], Row], fate: Fate, op: Any, args: tuple, kwargs: dict, out: Any) -> None:
    row = rows.setdefault((str(op), fate), Row(op=str(op), fate=fate))
    row.count += 1
    old = set(storages((args, kwargs)))
    row.bytes += sum(storage.nbytes() for storage in set(storages(out)) - old)
    row.flops += flops(op, args, kwargs, out)


def flops(op: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Operations of one call, by PyTorch's formulas; attention of every kernel compares each query with every key.

    Its backward computes the scores again, and two products for each of the forward's.
    """
    if "scaled_dot_product" in str(op):
        backward = "backward" in str(op)
        query, key, value = args[1:4] if backward else args[:3]
        (rows, heads, queries, width), keys = query.shape, key.shape[2]
        widths = 3 * width + 2 * value.shape[3] if backward else width + value.shape[3]
        return 2 * rows * heads * queries * keys * widths
    count = flop_registry.get(getattr(op, "overloadpacket", op))
    return count(*args, **kwargs, out_val=out) if count else 0


def group(blocks: list[tuple[list[Row], int]]) -> list[BlockGroup]:
    """Blocks with equal operations and bytes as one kind, in the order of their first."""
    kinds: list[tuple[list[int], list[Row], int]] = []
    for number, (rows, saved) in enumerate(blocks):
        same = next((kind for kind in kinds if (kind[1], kind[2]) == (rows, saved)), None)
        if same is None:
            kinds.append(([number], rows, saved))
        else:
            same[0].append(number)
    return [
        BlockGroup(blocks=ranges(numbers), n_blocks=len(numbers), saved=saved, rows=rows)
        for numbers, rows, saved in kinds
    ]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as people write them: 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
