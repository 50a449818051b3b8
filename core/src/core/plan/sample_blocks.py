"""A model with some of its blocks, which stand for all: equal blocks between equal neighbours behave alike."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.activation_checkpoint.apply import ActivationCheckpoint, forced_shapes
from core.nn.backends import SDPA, trains_on_cpu
from core.nn.decoder import Block, Decoder
from core.nn.dispatch import Dispatcher
from core.optim.optimizer import Optimizer, own
from core.parallel.layout import Layout
from core.step.assemble import cut

REACH = 2
"""How far neighbours change what a block does: FSDP gathers the next block ahead, and frees the last one late."""


class Excerpt(NamedTuple):
    """A model, or a stage of one, without some of its blocks: block i behaves as block `like[i]`, which is there."""

    model: Decoder
    like: dict[int, int]

    def times(self, name: str) -> int:
        """For how many weights or buffers the one of this name stands."""
        first, _, rest = name.partition(".")
        return Counter(self.like.values())[int(rest.partition(".")[0])] if first == "layers" else 1


class Stored(NamedTuple):
    """What lies on a rank between steps: numbers in its weights, and bytes of all else."""

    n_weights: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int


def excerpts(
    config: Decoder.Config,
    layout: Layout,
    checkpointing: ActivationCheckpoint.Config,
    *,
    dispatcher: Callable[[ProcessGroup], Dispatcher],
    compute_dtype: torch.dtype,
) -> dict[int, Excerpt]:
    """The model, or this rank's stages of it by their numbers, spread over the ranks and without memory.

    Stages keep all their blocks.
    """
    piped = layout.degrees.pipeline > 1
    found = {}
    for number, model in cut(config, layout):
        for block in blocks(model).values():
            if not trains_on_cpu(block.attention, compute_dtype):
                block.attention.kernel = SDPA(block.attention.kernel.window)
        like = {i: i for i in blocks(model)} if piped else alike(model, checkpointing)
        for i in set(like) - set(like.values()):
            del model.layers[str(i)]
        layout.parallelize(
            model,
            dispatcher=dispatcher,
            checkpoint=checkpointing.build(folder=Path()).apply,
            compile_block=None,
            compute_dtype=compute_dtype,
        )
        found[number] = Excerpt(model, like)
    return found


def blocks(model: Decoder) -> dict[int, Block]:
    """The blocks that a model has, by their numbers."""
    return {int(name): cast(Block, block) for name, block in model.layers.items()}


def alike(model: Decoder, checkpointing: ActivationCheckpoint.Config) -> dict[int, int]:
    """For every block the first one that is equal and has equal neighbours; for all of them themselves, where these
    firsts would be other neighbours to each other.
    """
    kinds = {i: kind(block, i, model.config.n_layers, checkpointing) for i, block in blocks(model).items()}
    around = surroundings(kinds)
    first: dict[tuple, int] = {}
    like = {i: first.setdefault(around[i], i) for i in kinds}
    left = surroundings({i: kinds[i] for i in first.values()})
    return like if all(left[i] == around[i] for i in left) else {i: i for i in kinds}


def surroundings(kinds: dict[int, str]) -> dict[int, tuple]:
    """Each block's kind with those of its neighbours on both sides."""
    row = [None] * REACH + list(kinds.values()) + [None] * REACH
    return {i: tuple(row[place : place + 2 * REACH + 1]) for place, i in enumerate(kinds)}


def kind(block: Block, i: int, n_layers: int, checkpointing: ActivationCheckpoint.Config) -> str:
    """What makes block number i behave as it does, in words that are equal for equal blocks."""
    ahead = max(i - n_layers + 1, 0)
    parts = [(name, type(part), getattr(part, "config", None)) for name, part in block.named_modules()]
    shapes = [(name, weight.shape) for name, weight in block.named_parameters()]
    forced = sorted(forced_shapes(checkpointing, f"layers.{i}", block))
    return repr((ahead, parts, shapes, block.attention.kernel, forced))


def stored(excerpts: dict[int, Excerpt], optimizer: Optimizer) -> Stored:
    """What all blocks have on this rank, those counted too that the excerpts lack."""
    n_weights = weights = gradients = state = buffers = 0
    for excerpt in excerpts.values():
        for name, weight in excerpt.model.named_parameters():
            times = excerpt.times(name)
            n_weights += times * own(weight).numel()
            weights += times * n_bytes(weight)
            gradients += times * n_bytes(weight.grad)
            state += times * sum(map(n_bytes, optimizer.state[name].values()))
        for name, buffer in excerpt.model.named_buffers():
            buffers += excerpt.times(name) * n_bytes(buffer)
    return Stored(n_weights, weights, gradients, state, buffers)


def n_bytes(tensor: Tensor | None) -> int:
    """Bytes of a tensor that lie on this rank; of None none."""
    return 0 if tensor is None else own(tensor).numel() * tensor.element_size()
