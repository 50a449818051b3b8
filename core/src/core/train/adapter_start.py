"""A run of adapters that begins with those of a folder of peft's: compared with the recipe, and filled in."""

from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path

import torch
from torch import Tensor

from core.config.errors import at_most, joined
from core.config.fields import Problem
from core.nn.decoder import Decoder
from core.parallel.layout import RankView
from core.quantization.converter import converted_model, kinds
from core.quantization.lora import LoRAConverter
from core.step.checks import Run
from core.weights.folder import folder_source, weights_under
from core.weights.key_map import hf_key_map
from core.weights.peft_folder import PeftAdapters, PeftFolder, is_peft


def adapters_at_start(run: Run, model: Decoder) -> PeftAdapters | None:
    """The adapters that a run begins with, where `checkpoint.initial_load_path` is a folder of peft's; else None.

    `model` has no memory, nor adapters. Raises `UserError` where those of the folder are not those of the recipe.
    """
    path, found = run.checkpoint.initial_load_path, [c for c in run.converters if isinstance(c, LoRAConverter.Config)]
    if path is None or not found or not is_peft(path):
        return None
    (config,) = found
    folder = PeftFolder(Path(path))
    base = folder_source(model, weights_under(path), allow_model_change=run.checkpoint.allow_model_change)
    adapters = PeftAdapters(folder, hf_key_map(model), base, quantised=config.quantize_base)
    names = [name for name, _ in converted_model(model.config, run.converters)[0].named_parameters()]
    layers = {name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a")}
    at = f"converters.{run.converters.index(config)}"
    if problems := list(adapter_differences(config, adapters, layers, at, path)):
        raise joined(problems)
    return adapters


def adapter_differences(
    config: LoRAConverter.Config, adapters: PeftAdapters, layers: set[str], at: str, path: str
) -> Iterator[Problem]:
    """What differs between a recipe, whose adapters are of these layers, and the adapters in the folder `path`."""
    for names, words in ((adapters.layers - layers, "and the recipe none"), (layers - adapters.layers, "")):
        if names:
            told = ", ".join(at_most(6, kinds(sorted(names))))
            has = (
                f"{path} has adapters of {told}, {words}"
                if words
                else f"the recipe has adapters of {told}, {path} none"
            )
            yield f"{at}.patterns", f"{has}: change patterns or filter_fqns"
            return
    ranks = {layer: rank for layer in sorted(layers) if (rank := adapters.rank(layer)) != config.rank}
    for layer, rank in list(ranks.items())[:1]:
        yield f"{at}.rank", f"rank {config.rank}, and {path} has {rank} for {layer}: set rank {rank}"
        return
    scales = {layer: adapters.scale(layer) * config.rank for layer in sorted(layers)}
    for layer, alpha in scales.items():
        if not isclose(alpha, config.alpha, rel_tol=1e-6):
            yield f"{at}.alpha", f"alpha {config.alpha:g}, and {path} has {alpha:g} for {layer}: set alpha {alpha:g}"
            break
    lengths = {layer for layer in layers if adapters.has_lengths(layer)}
    if config.dora != bool(lengths):
        yield f"{at}.dora", f"dora {config.dora}, and {path} has use_dora {bool(lengths)}: set dora {bool(lengths)}"


@torch.no_grad()
def fill_adapters(adapters: PeftAdapters, weights: Mapping[str, Tensor], layout: RankView) -> None:
    """Fill this rank's slices of adapters, which have the names of a checkpoint, of any shape."""
    for name, weight in weights.items():
        layer, _, leaf = name.removeprefix("model.").rpartition(".")
        if layer in adapters.layers and (value := adapters.read(layer, leaf)) is not None:
            piece = layout.local_slice(weight)
            piece.value.copy_(piece.of(value))
