"""Folders of the package peft: adapters of a model at Hugging Face, and the folder that has its own weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config.errors import UserError, at_most
from core.config.json_file import read_json
from core.config.links import file_in
from core.weights.adapters import MergedWeights, adapter_settings
from core.weights.files import Folder
from core.weights.hf_model import StoredModel
from core.weights.key_map import hf_key_map
from core.weights.shard_file import RowSpan

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PEFT_ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
UNREAD = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "fan_in_fan_out", "lora_bias")
"""Settings of peft's that change what adapters compute, and that are not read."""


@torch.no_grad()
def write_peft(model: StoredModel, weights: MergedWeights, run: dict[str, Any], folder: Path) -> None:
    """Write the adapters of a run, whose `config.json` states `run`, as a folder that peft loads.

    Raises `UserError` for adapters of experts, which peft keeps otherwise.
    """
    settings = adapter_settings(run)
    assert settings is not None, "a run without adapters"
    places, tensors, targets = hf_key_map(model).places, {}, []
    for layer in (name.removesuffix(".lora_a") for name in weights.saved.headers if name.endswith(".lora_a")):
        (piece, *more) = places[f"{layer}.weight"][0]
        if more or piece.row is not None or piece.stored_row is not None:
            raise UserError(f"{layer} has an adapter for each expert, which peft does not keep: leave --peft out")
        target = piece.key.removesuffix(".weight")
        targets.append(target)
        for leaf, end in PEFT_ENDS.items():
            if (name := f"{layer}.{leaf}") not in weights.saved.headers:
                continue
            value = weights.saved.read(name)
            if leaf == "magnitude":
                shape = weights.headers[f"{layer}.weight"].shape
                value = value * weights.base.fill(f"{layer}.weight", torch.empty(shape)).norm(dim=-1)
            if leaf != "lora_a":
                stored = torch.empty_like(value)
                view = piece.view(stored)
                view.copy_(value.reshape(view.shape))
                value = stored
            tensors[f"{PEFT_PREFIX}{target}{end}"] = value.contiguous()
    stated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run["checkpoint"]["initial_load_path"],
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "use_dora": settings["dora"],
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(stated, indent=2) + "\n")
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


class PeftWeights:
    """The weights of a Hugging Face folder with the adapters of a folder of peft's merged into them."""

    def __init__(self, path: Path) -> None:
        """Raises `UserError` for a folder that is not there, or adapters of another kind."""
        self.path, stated = path, read_json(path / PEFT_CONFIG)
        wrong = [name for name in UNREAD if stated.get(name)]
        wrong += [] if stated.get("peft_type") == "LORA" else [f"peft_type {stated.get('peft_type')}"]
        if wrong:
            raise UserError(f"{path}/{PEFT_CONFIG} has {', '.join(wrong)}, which is not read: merge with peft first")
        self.place = Path(str(stated.get("base_model_name_or_path")))
        if not self.place.is_dir():
            raise UserError(
                f"{path}/{PEFT_CONFIG}: base_model_name_or_path {self.place} is no folder here: write there the one "
                "with the model's weights"
            )
        self.base = Folder(self.place)
        self.promised = self.base.promised
        rank = stated["r"]
        self.scale = stated["lora_alpha"] / (rank**0.5 if stated.get("use_rslora") else rank)
        self.adapters = self._load()
        ends = {key.removesuffix(PEFT_ENDS["lora_a"]) for key in self.adapters}
        self.headers = {  # of those that are merged no bytes of the file are copied
            key: header._replace(at=0) if key.removesuffix(".weight") in ends else header
            for key, header in self.base.headers.items()
        }

    def __str__(self) -> str:
        return f"{self.place} with the adapters of {self.path}"

    def read(self, key: str, rows: RowSpan = None) -> Tensor:
        """A weight, or rows of it."""
        weight = self.base.read(key, rows)
        target = key.removesuffix(".weight")
        if f"{target}{PEFT_ENDS['lora_a']}" not in self.adapters:
            return weight
        a, b, *lengths = (self.adapters[f"{target}{end}"].float() for end in self._ends(target))
        span = slice(None) if rows is None else rows
        merged = weight.float() + self.scale * (b[span] @ a)
        if lengths:
            merged = (lengths[0].flatten()[span] / merged.norm(dim=-1)).unsqueeze(-1) * merged
        return merged.to(weight.dtype)

    def _ends(self, target: str) -> Iterator[str]:
        """The ends of the names of what there is of an adapter: A, B, and lengths of rows."""
        return (end for end in PEFT_ENDS.values() if f"{target}{end}" in self.adapters)

    def _load(self) -> dict[str, Tensor]:
        if (file := file_in(self.path, PEFT_WEIGHTS)) is None:
            raise UserError(f"{self.path} has no {PEFT_WEIGHTS}")
        try:
            found = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        known = [f"{key.removesuffix('.weight')}{end}" for key in self.base.headers for end in PEFT_ENDS.values()]
        if lost := sorted(found.keys() - set(known)):
            raise UserError(f"{file}: {', '.join(at_most(3, lost))} is of no weight in {self.place}")
        return found


def is_peft(folder: Path) -> bool:
    """Whether a folder has adapters in the form of peft."""
    return file_in(folder, PEFT_CONFIG) is not None
