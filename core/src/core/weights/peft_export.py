"""The adapters of a run as a folder that the package peft loads, whose form `core.weights.peft_folder` tells."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.config.errors import UserError
from core.weights.adapters import MergedWeights, SavedAdapters, in_training
from core.weights.hf_model import StoredModel
from core.weights.key_map import KeyMap, KeyPart, hf_key_map
from core.weights.peft_folder import PEFT_CONFIG, PEFT_ENDS, PEFT_PREFIX, PEFT_WEIGHTS, nested, sibling_parameters

TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""Modules that peft 0.21 takes for experts' in a model that has some, a dense or shared network's too."""


@torch.no_grad()
def write_peft(model: StoredModel, weights: MergedWeights, adapters: SavedAdapters, base: str, folder: Path) -> None:
    """Write the adapters of a run that began with the weights in the folder `base`.

    Raises `UserError` for what peft cannot have: lengths of experts' rows, experts that are a module each, and a bias
    on the choice of experts that moved.
    """
    check_biases(weights)
    key_map, settings = hf_key_map(model), adapters.settings
    stacks: dict[str, list[tuple[KeyPart, str]]] = defaultdict(list)
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    has_experts = any(places[-1][0].stored_row is not None for places in key_map.places.values())
    for layer in sorted(adapters.layers):
        piece = key_map.places[f"{layer}.weight"][-1][0]
        if piece.stored_row is not None:
            stacks[piece.key].append((piece, layer))
        elif piece.row is not None:
            raise UserError(f"{layer}: peft has no adapters of experts that are modules: leave --peft out")
        else:
            targets.append(piece.key.removesuffix(".weight"))
            if has_experts and targets[-1].rpartition(".")[2] in TAKEN_FOR_EXPERTS:
                raise UserError(
                    f"{layer}: of a model with experts peft takes {targets[-1]} for theirs: leave --peft out, or give "
                    "it no adapter"
                )
            tensors |= dense_tensors(targets[-1], layer, piece, weights, adapters)
    if stacks and settings["dora"]:
        layer = next(iter(stacks.values()))[0][1]
        raise UserError(f"{layer} has lengths of rows (dora), which peft does not have of experts: leave --peft out")
    for parameter, parts in stacks.items():
        tensors |= stack_tensors(parameter, parts, adapters, key_map, list(stacks))
    wide = {parameter: len(parts) for parameter, parts in stacks.items() if len(parts) > 1}
    stated: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "use_dora": settings["dora"],
        "target_modules": targets,
        "target_parameters": list(stacks) or None,
        "rank_pattern": {parameter: n * settings["rank"] for parameter, n in wide.items()},
        "alpha_pattern": {parameter: n * settings["alpha"] for parameter, n in wide.items()},
        "bias": "none",
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(stated, indent=2) + "\n")
    named = {f"{PEFT_PREFIX}{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


def check_biases(weights: MergedWeights) -> None:
    """Raise `UserError` for what a run saved beside adapters and what differs from its base."""
    for name in sorted(weights.own):
        found = weights.read(name)
        before = torch.zeros_like(found)
        if name in weights.base.pieces:
            weights.base.fill(name, before)
        if not torch.equal(found, before):
            raise UserError(f"{name} moved in training, to balance experts, and peft keeps adapters: leave --peft out")


def dense_tensors(
    target: str, layer: str, piece: KeyPart, weights: MergedWeights, adapters: SavedAdapters
) -> dict[str, Tensor]:
    """The adapter of a linear layer of ours, as that of the module `target` at Hugging Face."""
    tensors = {}
    for leaf, end in PEFT_ENDS.items():
        if (value := adapters.read(layer, leaf)) is None:
            continue
        if leaf == "magnitude":
            weight = torch.empty(weights.headers[f"{layer}.weight"].shape)
            weight = in_training(weights.base.fill(f"{layer}.weight", weight), quantised=adapters.quantised)
            value = value * weight.norm(dim=-1)
        if leaf != "lora_a":
            stored = torch.empty_like(value)
            view = piece.view(stored)
            view.copy_(value.reshape(view.shape))
            value = stored
        tensors[f"{target}{end}"] = value
    return tensors


def stack_tensors(
    parameter: str, parts: list[tuple[KeyPart, str]], adapters: SavedAdapters, key_map: KeyMap, wrapped: list[str]
) -> dict[str, Tensor]:
    """The adapters of our weights in a parameter of experts as one, of all their ranks: each half of the outputs is
    reached by its own.

    `wrapped` are all parameters that have adapters.
    """
    matrices = [(piece, adapters.read(layer, "lora_a"), adapters.read(layer, "lora_b")) for piece, layer in parts]
    all_a, blocks, at = [], None, 0
    for piece, a_GrI, b_GOr in matrices:
        assert a_GrI is not None and b_GOr is not None, parameter
        all_a.append(a_GrI)
        n_experts, n_out, rank = b_GOr.shape
        if blocks is None:
            blocks = b_GOr.new_zeros(n_experts, n_out * (2 if piece.half else 1), rank * len(parts))
        mine = blocks[..., at : at + rank]
        KeyPart(piece.key, half=piece.half, experts=True).view(mine).copy_(b_GOr)
        at += rank
    assert blocks is not None, parameter
    path = nested(parameter, [name for name in sibling_parameters(parameter, key_map) if name in wrapped])
    return {
        f"{path}{PEFT_ENDS['lora_a']}": torch.cat(all_a, 1).flatten(0, 1),
        f"{path}{PEFT_ENDS['lora_b']}": blocks.permute(1, 2, 0).flatten(1),
    }
