"""Whether a run's ranks and device can compute what converters made of its layers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from core.checkpoint.settings import Checkpoint
from core.config.errors import joined
from core.config.fields import Problem
from core.data.tokenizer import Tokenizer
from core.nn.decoder import Decoder
from core.nn.product import layer_products
from core.nn.weights import NF4_BLOCK, NF4_BLOCK_BYTES, weights
from core.parallel.settings import Parallelism
from core.quantization.converter import Converter, adapts
from core.step.shares import ranks_that_share
from core.weights.companions import tokenizer_in

SAMPLE = "The sum of 12 and 345 is 357.\n\tdef area(x): return x ** 2  # Größe, 数学, площадь\n"
"""What two tokenizers with equal tokens encode alike."""


class ConvertedRun(Protocol):
    """What is asked of the configuration of a run."""

    parallelism: Parallelism
    converters: list[Converter.Config]
    checkpoint: Checkpoint
    tokenizer: Tokenizer.Config


def check_converted(model: Decoder, run: ConvertedRun, device: torch.device) -> None:
    """Raise `UserError` for converters whose layers `device` cannot compute, or the ranks cannot share."""
    problems = [*device_problems(run.converters, device), *block_problems(model, run.parallelism)]
    if len(adapting := [i for i, config in enumerate(run.converters) if adapts([config])]) > 1:
        problems.append((f"converters.{adapting[1]}", "a run has one rank and alpha: leave one converter of adapters"))
    if adapts(run.converters):
        problems += base_problems(run.checkpoint.initial_load_path, run.tokenizer)
    if problems:
        raise joined(problems)


def base_problems(path: str | None, tokenizer: Tokenizer.Config) -> Iterator[Problem]:
    """What a run of adapters lacks: weights, or the tokens of the tokenizer that comes with them."""
    if path is None:
        yield "checkpoint.initial_load_path", "adapters are for weights that are there: name their folder"
    elif "://" not in path and (found := tokenizer_in(Path(path).expanduser())) is not None:
        own, theirs = tokenizer.build(), Tokenizer.Config(path=str(found)).build()
        if own.encode(SAMPLE) != theirs.encode(SAMPLE):
            yield (
                "tokenizer.path",
                f"the weights in {path} come with a tokenizer, {found}, and adapters learn with its tokens; those of "
                f"this run are others ({own.description}): use --tokenizer.path {found.parent}",
            )


def device_problems(converters: list[Converter.Config], device: torch.device) -> Iterator[Problem]:
    """Converters that a device has no kernels for."""
    for i, config in enumerate(converters):
        if problem := config.build().device_problem(device):
            yield f"converters.{i}", problem


def block_problems(model: Decoder, parallelism: Parallelism) -> Iterator[Problem]:
    """Converted layers whose weight ranks would cut within a block: told once for each degree and size."""
    sizes = {id(layer.weight): product.multiple for layer, product in layer_products(model)}
    told: set[str] = set()
    for weight in weights(model):
        multiple, (*rows, columns) = sizes.get(id(weight.value), 1), weight.value.shape[-2:]
        multiples = [multiple, multiple]
        if not weight.value.is_floating_point():
            columns, multiples = columns // NF4_BLOCK_BYTES * NF4_BLOCK, [1, NF4_BLOCK]
        for axis, size, multiple in zip(
            weight.axes[-2:], (*rows, columns), multiples[-len(weight.axes) :], strict=True
        ):
            if multiple == 1:
                continue
            n, words = ranks_that_share(axis, parallelism)
            if n > 1 and size % (n * multiple) and (message := f"{words} cuts {axis} {size:,}") not in told:
                told.add(message)
                yield (
                    "converters",
                    f"{weight.name}: {message} into parts that are no multiples of {multiple}: use a lower degree, or "
                    "leave the layer out with filter_fqns",
                )
