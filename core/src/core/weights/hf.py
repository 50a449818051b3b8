"""A model's weights out of a Hugging Face folder, and into a new one."""

import json
from pathlib import Path

import torch

from core.config.errors import UserError
from core.runtime.activity import followed, working
from core.weights.export import dtypes, outputs
from core.weights.files import write_files
from core.weights.hf_model import StoredModel, with_hf
from core.weights.key_map import KeyMap, hf_key_map
from core.weights.shard_file import Output
from core.weights.source import WeightSource


def load_hf(model: StoredModel, folder: str | Path) -> None:
    """Copy the weights of a Hugging Face folder, one safetensors file or several with an index, into `model`.

    Values are decoded, and cast to the type of the model's weights. What Hugging Face has no place for stays as it is.
    Raises `UserError` as `check_hf` does, before a single weight is changed.
    """
    load_from(WeightSource(hf_key_map(model), folder))


def check_hf(model: StoredModel, folder: str | Path) -> dict[str, Path]:
    """The file of every key in a Hugging Face folder, which must fit `model`; a model on the meta device will do.

    A tied head may be absent, or equal to the embedding. Raises `UserError` that names the file and the key: a missing
    or unreadable file, a missing, unknown, double or wrongly shaped key, all that do not fit at once.
    """
    return {key: header.file for key, header in WeightSource(hf_key_map(model), folder).folder.headers.items()}


def save_hf(
    model: StoredModel, folder: str | Path, *, dtype: torch.dtype | None = None, shard_gib: float = 5.0
) -> None:
    """Write `model` as a Hugging Face folder: config.json and safetensors, with an index when there are several files.

    A tied head is left out, as transformers does. `dtype` casts the weights, but not the buffers. Raises `UserError`
    when `folder` already holds weights, or when Hugging Face has no such model.
    """
    stated = with_hf(model).to_hf_config()  # raises before a file is written
    written = save_by(model, hf_key_map(model), folder, dtype, shard_gib)
    write_hf_config(stated, written, Path(folder))


def write_hf_config(stated: dict, written: list[Output], folder: Path) -> None:
    """Write the Hugging Face `config.json` that a model states; the type it gives is that of the largest tensor."""
    config = {**stated, "dtype": largest_dtype(written)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def largest_dtype(written: list[Output]) -> str:
    """The name of the type of the largest tensor, of those that are not in few bits."""
    plain = [output for output in written if output.dtype.is_floating_point]
    return str(max(plain, key=lambda output: output.n_bytes).dtype).removeprefix("torch.")


def load_from(source: WeightSource) -> None:
    """Copy the weights that were found into those of the model that they were looked for."""
    weights = source.key_map.weights
    for name, weight in weights.items():
        assert not weight.is_meta, f"{name} has no memory to load into: materialise the model first"
    with working("loading weights"):
        for name in followed(list(source.pieces), lambda name: weights[name].nbytes):
            source.fill(name, weights[name])


def save_by(
    model: StoredModel, key_map: KeyMap, folder: str | Path, dtype: torch.dtype | None, shard_gib: float
) -> list[Output]:
    """Write a model's weights in this layout; returns what was written."""
    folder, weights = Path(folder), key_map.weights
    if folder.exists() and any(folder.glob("*.safetensors*")):  # an index alone would be read, too
        raise UserError(f"{folder} already holds safetensors files: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    types = dtypes(model, key_map, {name: weight.dtype for name, weight in weights.items()}, dtype)
    made = outputs(key_map, types, lambda name, rows: weights[name] if rows is None else weights[name][rows])
    write_files(folder, made, shard_gib)
    return made
