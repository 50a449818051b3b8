"""Folders of the package peft, read: adapters of a model at Hugging Face, and the folder that has its own weights.

    model.layers.0.self_attn.q_proj.lora_A.weight        (r, I), beside lora_B.weight (O, r)
    model.layers.0.mlp.experts.lora_A.weight             (E r, I) and (O, r E), of a parameter that holds E experts: the
                                                         last that target_parameters names of its module
    model.layers.0.mlp.experts.base_layer.lora_A.weight  the same of the one before it

all behind `base_model.model.`. What peft keeps of the first half of a parameter's outputs and of the second are the
adapters of two weights of ours, with one A. Letters: E experts, I input width, O output width, r rank.
"""

import re
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.config.errors import UserError, at_most
from core.config.json_file import read_json
from core.config.links import file_in
from core.weights.adapters import Adapters, in_training
from core.weights.key_map import KeyMap, KeyPart
from core.weights.shard_file import RowSpan
from core.weights.source import WeightSource

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PEFT_ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
UNREAD = (
    *("modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"),
)
"""Settings of peft's that change what a model computes, and that are not read."""
BASE_STAYS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""The starts of adapters, `init_lora_weights`, that leave the base's weights as they are when a folder is loaded."""


def is_peft(folder: str | Path) -> bool:
    """Whether a folder has adapters in the form of peft."""
    return file_in(Path(folder), PEFT_CONFIG) is not None


def describing(folder: str | Path) -> Path:
    """The folder that describes the model of the weights in a folder: itself, or that of the model which adapters in
    peft's form are for."""
    return PeftFolder(Path(folder)).place if is_peft(folder) else Path(folder)


class PeftFolder:
    """The settings and tensors of a folder of peft's. Raises `UserError` for adapters of another kind."""

    def __init__(self, path: Path) -> None:
        self.path, self.stated = path, read_json(path / PEFT_CONFIG)
        wrong = [name for name in UNREAD if self.stated.get(name)]
        start = self.stated.get("init_lora_weights")
        wrong += [] if start in BASE_STAYS else [f"init_lora_weights {start}"]
        wrong += [] if self.stated.get("peft_type") == "LORA" else [f"peft_type {self.stated.get('peft_type')}"]
        wrong += [] if self.stated.get("bias", "none") == "none" else [f"bias {self.stated['bias']}"]
        if wrong:
            raise UserError(f"{path}/{PEFT_CONFIG} has {', '.join(wrong)}, which is not read: merge with peft first")
        self.place = Path(str(self.stated.get("base_model_name_or_path")))
        if not self.place.is_dir():
            raise UserError(
                f"{path}/{PEFT_CONFIG}: base_model_name_or_path {self.place} is no folder here: write there the one "
                "with the model's weights"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the model at Hugging Face."""
        if (file := file_in(self.path, PEFT_WEIGHTS)) is None:
            raise UserError(f"{self.path} has no {PEFT_WEIGHTS}")
        try:
            return {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    def scale(self, target: str, rank: int) -> float:
        """What the adapter of a module, or of a parameter, is multiplied by."""
        patterns = self.stated.get("alpha_pattern") or {}
        found = (alpha for part, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({part})", target))
        return next(found, self.stated["lora_alpha"]) / (sqrt(rank) if self.stated.get("use_rslora") else rank)

    def targets(self, parameter: str) -> bool:
        """Whether a parameter of experts has an adapter."""
        named = self.stated.get("target_parameters") or []
        return any(parameter == name or parameter.endswith(f".{name}") for name in named)


class PeftAdapters(Adapters):
    """The adapters of a folder of peft's. Raises `UserError` for those of a weight that the model does not have."""

    def __init__(self, folder: PeftFolder, key_map: KeyMap, base: WeightSource, *, quantised: bool = False) -> None:
        """`key_map` is of the model at Hugging Face, `base` has its weights."""
        self.folder, self.base, self.quantised = folder, base, quantised
        self._tensors = folder.tensors()
        self._left = set(self._tensors)
        self._found: dict[str, dict[str, Tensor]] = {}
        self._scales: dict[str, float] = {}
        self._lengths: dict[str, Tensor] = {}
        for name, places in key_map.places.items():
            for pieces in places:
                if name.endswith(".weight") and name.removesuffix(".weight") not in self._found:
                    self._look_for(name.removesuffix(".weight"), pieces, key_map)
        if self._left:
            lost = ", ".join(at_most(3, sorted(self._left)))
            raise UserError(f"{folder.path}/{PEFT_WEIGHTS}: {lost} is of no weight in {folder.place}")
        self.layers = self._found.keys()

    def __str__(self) -> str:
        return f"{self.folder.place} with the adapters of {self.folder.path}"

    def scale(self, layer: str) -> float:
        return self._scales[layer]

    def rank(self, layer: str) -> int:
        """The width of a layer's adapter."""
        return self._found[layer]["lora_b"].shape[-1]

    def has_lengths(self, layer: str) -> bool:
        """Whether the rows of a layer have lengths of their own (DoRA)."""
        return "magnitude" in self._found[layer]

    def read(self, layer: str, leaf: str, rows: RowSpan = None) -> Tensor | None:
        found = self._relative(layer) if leaf == "magnitude" else self._found[layer][leaf]
        return found if rows is None or found is None else found[rows]

    def _relative(self, layer: str) -> Tensor | None:
        """The lengths of a layer's rows, which stand there in full, relative to those of its weight."""
        if layer not in self._lengths and self.has_lengths(layer):
            name = f"{layer}.weight"
            weight = self.base.fill(name, torch.empty(self.base.key_map.weights[name].shape))
            own = in_training(weight, quantised=self.quantised).norm(dim=-1)
            self._lengths[layer] = self._found[layer]["magnitude"] / own
        return self._lengths.get(layer)

    def _look_for(self, layer: str, pieces: list[KeyPart], key_map: KeyMap) -> None:
        first = pieces[0]
        if first.stored_row is not None:
            self._look_for_stack(layer, first, len(pieces), key_map)
            return
        targets = [piece.key.removesuffix(".weight") for piece in pieces]
        if not all(
            f"{target}{PEFT_ENDS[leaf]}" in self._tensors for target in targets for leaf in ("lora_a", "lora_b")
        ):
            return
        parts = [dict(self._parts(target)) for target in targets]
        self._scales[layer] = self.folder.scale(targets[0], len(parts[0]["lora_a"]))
        for leaf in ("lora_b", "magnitude"):
            for piece, part in zip(pieces, parts, strict=True):
                if leaf in part:
                    part[leaf] = piece.view(part[leaf]).reshape(part[leaf].shape)
        stacked = {leaf: torch.stack([part[leaf] for part in parts]) for leaf in parts[0]}
        self._found[layer] = stacked if first.row is not None else parts[0]

    def _look_for_stack(self, layer: str, piece: KeyPart, n_experts: int, key_map: KeyMap) -> None:
        """Of the adapter of a parameter that holds all experts what is our weight's."""
        if not self.folder.targets(piece.key):
            return
        parts = dict(self._parts(wrapper_of(piece.key, key_map, self.folder)))
        if not {"lora_a", "lora_b"} <= parts.keys():
            return
        a = parts["lora_a"].unflatten(0, (n_experts, -1))
        b = parts["lora_b"].unflatten(1, (-1, n_experts)).permute(2, 0, 1)
        self._scales[layer] = self.folder.scale(piece.key, a.shape[1])
        whole, b = b, KeyPart(piece.key, half=piece.half, experts=True).view(b)
        used = b.any(0).any(0)  # some of the ranks may be those of the other half alone
        if whole.any() and not used.any():
            return
        self._found[layer] = (
            {"lora_a": a[:, used], "lora_b": b[..., used]} if used.any() else {"lora_a": a, "lora_b": b}
        )

    def _parts(self, target: str) -> Iterator[tuple[str, Tensor]]:
        """What there is of an adapter: A, B, and lengths of rows."""
        for leaf, end in PEFT_ENDS.items():
            if (found := self._tensors.get(f"{target}{end}")) is not None:
                self._left.discard(f"{target}{end}")
                yield leaf, found.float().flatten() if leaf == "magnitude" else found.float()


def wrapper_of(parameter: str, key_map: KeyMap, folder: PeftFolder) -> str:
    """The path of the module that peft puts around the one with a parameter of experts."""
    wrapped = [name for name in sibling_parameters(parameter, key_map) if folder.targets(name)]
    return nested(parameter, wrapped)


def nested(parameter: str, wrapped: list[str]) -> str:
    """The path of the adapter of a parameter, of those of its module that have one: each is put around those before."""
    return parameter.rpartition(".")[0] + ".base_layer" * (len(wrapped) - 1 - wrapped.index(parameter))


def sibling_parameters(parameter: str, key_map: KeyMap) -> list[str]:
    """The weights of experts in the module of a parameter, in its order, which is that of our weights."""
    parent = parameter.rpartition(".")[0]
    found = [
        places[-1][0].key
        for name, places in key_map.places.items()
        if name.endswith(".weight") and places[-1][0].stored_row is not None
    ]
    return [name for name in dict.fromkeys(found) if name.rpartition(".")[0] == parent]
