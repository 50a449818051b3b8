"""A model with some of its blocks, which stand for all: equal blocks between equal neighbours behave alike."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from operator import or_
from typing import NamedTuple, cast

import torch
from torch import nn

from core.activation_checkpoint.apply import ActivationCheckpoint, forced_shapes
from core.nn.decoder import Block, Decoder
from core.nn.kernel_checks import trains_on_cpu
from core.nn.sdpa import SDPA
from core.nn.weights import Weight, n_numbers, weights
from core.optim.groups import Group
from core.optim.optimizer import Optimizer
from core.optim.weight import local_bytes, local_tensor
from core.parallel.layout import RankView, Wrapping
from core.quantization.converter import Converter
from core.step.assemble import spread_models

REACH = 2
"""How far neighbours change what a block does: FSDP gathers the next block ahead, and frees the last one late."""


class SampledModel(NamedTuple):
    """A model, or a stage of one, without some of its blocks: the present block `stand_in[i]` behaves as block i."""

    model: Decoder
    stand_in: dict[int, int]

    def times(self, name: str) -> int:
        """For how many weights or buffers the one of this name stands."""
        first, _, rest = name.partition(".")
        return Counter(self.stand_in.values())[int(rest.partition(".")[0])] if first == "layers" else 1


class RestingBytes(NamedTuple):
    """What lies on a rank between steps: numbers in its weights, and bytes of all else."""

    n_weights: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int


def sampled_models(
    config: Decoder.Config,
    layout: RankView,
    activation_checkpoint: ActivationCheckpoint.Config,
    wrapping: Wrapping,
    groups: Sequence[Group],
    converters: Sequence[Converter.Config],
    *,
    device: torch.device,
) -> dict[int, SampledModel]:
    """The model, or this rank's stages of it by their numbers, spread over the ranks and without memory.

    Attention is that of `device`, as far as a CPU can compute it.
    Weights of frozen `groups` get no gradient. Stages keep all their blocks, and so do models whose blocks are none of
    ours.
    """
    found: list[dict[int, int]] = []

    def sample(model: Decoder) -> None:
        for block in own_blocks(model):
            kernel = block.attention.kernel
            if not trains_on_cpu(block.attention, wrapping.compute_dtype):
                block.attention.kernel = SDPA(kernel.window)  # in tiles, which keep no more than it does
            elif isinstance(kernel, SDPA) and device.type != "cpu":
                block.attention.kernel = SDPA(kernel.window, tiled=False)
        whole = layout.degrees.pipeline > 1 or len(own_blocks(model)) < len(model.layers)
        stand_in = {i: i for i in blocks(model)} if whole else stand_ins(model, activation_checkpoint)
        for i in set(stand_in) - set(stand_in.values()):
            del model.layers[str(i)]
        found.append(stand_in)

    models = spread_models(config, layout, wrapping, groups, converters, sample)
    sampled = map(SampledModel, models.values(), found)
    return dict(zip(models, sampled, strict=True))


def blocks(model: Decoder) -> dict[int, Block]:
    """The blocks that a model has, by their numbers."""
    return {int(name): cast(Block, block) for name, block in model.layers.items()}


def own_blocks(model: Decoder) -> list[Block]:
    """The blocks of a model that are core's, with an attention that is known: another program's are not."""
    return [block for block in model.layers.values() if isinstance(block, Block)]


def stand_ins(model: Decoder, activation_checkpoint: ActivationCheckpoint.Config) -> dict[int, int]:
    """For every block the first one that is equal and has equal neighbours; for all of them themselves, where these
    firsts would be other neighbours to each other.
    """
    reached = accumulate([is_trained(each) for each in (model.tok_embeddings, *model.layers.values())], or_)
    flows_back = dict(zip(blocks(model), list(reached)[1:], strict=True))
    kinds = {
        i: repr((flows_back[i], kind(block, i, model.config.n_layers, activation_checkpoint)))
        for i, block in blocks(model).items()
    }
    around = surroundings(kinds)
    first: dict[tuple, int] = {}
    stand_in = {i: first.setdefault(around[i], i) for i in kinds}
    left = surroundings({i: kinds[i] for i in first.values()})
    return stand_in if all(left[i] == around[i] for i in left) else {i: i for i in kinds}


def is_trained(part: nn.Module | None) -> bool:
    """Whether a part of a model has a weight that is not frozen."""
    return part is not None and any(weight.requires_grad for weight in part.parameters())


def surroundings(kinds: dict[int, str]) -> dict[int, tuple]:
    """Each block's kind with those of its neighbours on both sides."""
    row = [None] * REACH + list(kinds.values()) + [None] * REACH
    return {i: tuple(row[place : place + 2 * REACH + 1]) for place, i in enumerate(kinds)}


def kind(block: Block, i: int, n_layers: int, activation_checkpoint: ActivationCheckpoint.Config) -> str:
    """What makes block number i behave as it does, in words that are equal for equal blocks."""
    mtp_depth = max(i - n_layers + 1, 0)
    parts = [(name, type(part), getattr(part, "config", None)) for name, part in block.named_modules()]
    changed = [(name, getattr(part, "product", None)) for name, part in block.named_modules()]
    shapes = [(name, weight.shape, weight.requires_grad) for name, weight in block.named_parameters()]
    forced = sorted(forced_shapes(activation_checkpoint, f"layers.{i}", block))
    return repr((mtp_depth, parts, changed, shapes, block.attention.kernel, forced))


def every_weight(sampled_models: dict[int, SampledModel]) -> dict[str, tuple[Weight, nn.Parameter]]:
    """All weights of this rank by their names, each with the one that stands for it: itself, if its block is there."""
    found = {}
    for sampled in sampled_models.values():
        named = list(weights(sampled.model))
        found |= {weight.name: (weight, weight.value) for weight in named}
        for i, other in sampled.stand_in.items():
            for weight in named if i != other else ():
                if weight.name.startswith(f"layers.{other}."):
                    name, source = weight.name.replace(f".{other}.", f".{i}.", 1), weight.value
                    value = nn.Parameter(torch.empty_like(source), source.requires_grad)
                    found[name] = weight._replace(name=name, value=value), source
    return found


def resting_bytes(sampled_models: dict[int, SampledModel], optimizer: Optimizer) -> RestingBytes:
    """What all blocks have on this rank, those counted too that the sampled models lack."""
    n_weights = weight_bytes = gradients = buffers = 0
    for sampled in sampled_models.values():
        for name, weight in sampled.model.named_parameters():
            times = sampled.times(name)
            n_weights += times * n_numbers(local_tensor(weight))
            weight_bytes += times * local_bytes(weight)
            gradients += times * local_bytes(weight.grad)
        for name, buffer in sampled.model.named_buffers():
            buffers += sampled.times(name) * local_bytes(buffer)
    state = sum(local_bytes(tensor) for kept in optimizer.state.values() for tensor in kept.values())
    return RestingBytes(n_weights, weight_bytes, gradients, state, buffers)
