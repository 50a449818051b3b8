"""Hugging Face checkpoints: one key table per model, read both ways, safetensors in and out."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFModel(Protocol):
    """What a model must have to be read and written: named weights, a key table, its Hugging Face configuration."""

    HF_KEYS: ClassVar[dict[str, str]]
    HF_HALVES: ClassVar[frozenset[str]]

    def rope_dim(self) -> int: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, nn.Parameter]]: ...

    def to_hf_config(self) -> dict: ...


class HFConfig(dict[str, Any]):
    """A Hugging Face `config.json`; asking it for a key that it does not state is a `UserError` that names the key."""

    def __getitem__(self, key: str) -> Any:
        if self.get(key) is None:
            raise UserError(f"this config.json does not state {key}")
        return super().__getitem__(key)


def checked_hf_config(hf: dict[str, Any], fixed: dict[str, Any]) -> HFConfig:
    """`hf`, which must agree with `fixed` wherever it states the same key.

    Raises a `UserError` that lists all differences.
    """
    wrong = [f"{key} is {hf[key]!r}, not {value!r}" for key, value in fixed.items() if hf.get(key, value) != value]
    if "model_type" not in hf:
        wrong.append("model_type is missing")
    if wrong:
        raise UserError(f"this config.json is not one of {fixed['model_type']}: " + "; ".join(wrong))
    return HFConfig(hf)


DECODER_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Hugging Face's names in `config.json` for what every decoder states."""


def decoder_from_hf(hf: HFConfig) -> dict[str, Any]:
    """The fields that every decoder's Config has, out of a Hugging Face `config.json`."""
    return {ours: hf[theirs] for ours, theirs in DECODER_KEYS.items()}


def decoder_to_hf(config: Any) -> dict[str, Any]:
    """What every decoder's Config states in a Hugging Face `config.json`."""
    return {theirs: getattr(config, ours) for ours, theirs in DECODER_KEYS.items()}


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads x head_dim, ...) of pairs that are rotated together, (0, 1), (2, 3), ..., as two halves per head."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pattern_of(name: str) -> tuple[str, str]:
    """A name as a key table has it, with `{i}` for the number of the block, and that number; "" where there is none."""
    number = re.search(r"\.(\d+)\.", name)
    return (name, "") if number is None else (name[: number.start(1)] + "{i}" + name[number.end(1) :], number[1])


def to_hf_name(name: str, keys: dict[str, str]) -> str:
    """Hugging Face's name of the weight `name`; raises `KeyError` for a weight the table does not have."""
    pattern, number = pattern_of(name)
    return keys[pattern].replace("{i}", number)


def load_hf(model: HFModel, folder: str | Path) -> None:
    """Copy the weights of a Hugging Face folder, one safetensors file or several with an index, into `model`.

    Values are cast to the type of the model's weights. Raises `UserError` as `check_hf` does, before a single weight is
    changed.
    """
    stored = check_hf(model, folder)
    wanted, halves = _named(model), _halves(model)
    for key, value in wanted.items():
        assert not value.is_meta, f"{key} has no memory to load into: materialise the model first"
    for file in sorted(set(stored.values())):
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for key in tensors.keys():
                value = tensors.get_tensor(key)
                wanted[key].copy_(pairs_from_halves(value, model.rope_dim()) if key in halves else value)


def check_hf(model: HFModel, folder: str | Path) -> dict[str, Path]:
    """The file of every key in a Hugging Face folder, which must fit `model`; a model on the meta device will do.

    A tied head may be absent, or equal to the embedding. Raises `UserError` that names the file and the key: a missing
    or unreadable file, a missing, unknown, double or wrongly shaped key, all that do not fit at once.
    """
    folder = Path(folder)
    wanted = _named(model)
    stored = dict(_headers(folder))
    problems = [f"{key} is missing" for key in wanted if key not in stored and key not in _tied(model)]
    for key, (file, shape) in stored.items():
        if key not in wanted:
            problems.append(f"{file.name}: {key} is unknown to {type(model).__name__}")
        elif shape != list(wanted[key].shape):
            problems.append(f"{file.name}: {key} has shape {shape}, the model wants {list(wanted[key].shape)}")
    if problems:
        raise UserError(f"{folder} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    files = {key: file for key, (file, _) in stored.items()}
    _check_tied(model, files)
    return files


def save_hf(model: HFModel, folder: str | Path, *, dtype: torch.dtype | None = None, shard_gib: float = 5.0) -> None:
    """Write `model` as a Hugging Face folder: config.json and safetensors, with an index when there are several files.

    A tied head is left out, as transformers does. `dtype` casts the weights. Raises `UserError` when `folder` already
    holds weights.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} already holds safetensors files: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tied, halves = _tied(model), _halves(model)
    tensors = {key: value for key, value in _named(model).items() if key not in tied}
    shards = list(_shards(tensors, int(shard_gib * 2**30), dtype))
    place = {}
    for i, keys in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        values = {}
        for key in keys:
            value = tensors[key].detach()
            value = halves_from_pairs(value, model.rope_dim()) if key in halves else value
            values[key] = value.to("cpu", dtype).contiguous()
        save_file(values, folder / name, metadata={"format": "pt"})
        place |= {key: name for key in keys}
    if len(shards) > 1:
        size = sum(_bytes(value, dtype) for value in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    stored = dtype or next(iter(tensors.values())).dtype
    config = {**model.to_hf_config(), "dtype": str(stored).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _named(model: HFModel) -> dict[str, Tensor]:
    return {to_hf_name(name, model.HF_KEYS): value for name, value in model.state_dict().items()}


def _halves(model: HFModel) -> set[str]:
    """Keys of the weights whose rows are ordered otherwise here."""
    names = (name for name in model.state_dict() if pattern_of(name)[0] in model.HF_HALVES)
    return {to_hf_name(name, model.HF_KEYS) for name in names}


def _tied(model: HFModel) -> dict[str, str]:
    """Keys whose weight is another key's: {"lm_head.weight": "model.embed_tokens.weight"} for a tied head."""
    first: dict[nn.Parameter, str] = {}
    tied = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        key = to_hf_name(name, model.HF_KEYS)
        source = first.setdefault(weight, key)
        if source != key:
            tied[key] = source
    return tied


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = _indexed(folder / INDEX)
        files = [folder / name for name in names]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(f"{folder / INDEX} names {outside[0]!r}, which is not a file beside it")
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}")
    return files


def _indexed(index: Path) -> list[str]:
    """Names of the files that an index names."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} has no weight_map of keys to files: {error!r}") from error


def _headers(folder: Path) -> Iterator[tuple[str, tuple[Path, list[int]]]]:
    """(key, (file, shape)) of every stored tensor, without reading the tensors."""
    seen: dict[str, Path] = {}
    for file in _files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        for key, shape in shapes.items():
            if key in seen:
                raise UserError(f"{key} stands in {seen[key].name} and in {file.name}")
            seen[key] = file
            yield key, (file, list(shape))


def _check_tied(model: HFModel, files: dict[str, Path]) -> None:
    for key, source in _tied(model).items():
        if key in files and not torch.equal(*(_read(files[name], name) for name in (key, source))):
            raise UserError(f"{files[key].name}: {key} differs from {source}, which the model ties it to")


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def _bytes(value: Tensor, dtype: torch.dtype | None) -> int:
    return value.numel() * (dtype or value.dtype).itemsize


def _shards(tensors: dict[str, Tensor], limit: int, dtype: torch.dtype | None) -> Iterator[list[str]]:
    """Keys in order, cut so that no file exceeds `limit` bytes unless one tensor alone does."""
    shard: list[str] = []
    size = 0
    for key, value in tensors.items():
        if shard and size + _bytes(value, dtype) > limit:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += _bytes(value, dtype)
    yield shard
