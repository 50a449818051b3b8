"""Weights in a folder in our format: `config.json`, which names the model's class, and safetensors under our own names
or the pieces of a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from core.checkpoint.find import Found
from core.checkpoint.manifest import CONFIG_FILE
from core.config.configurable import Configurable, owner_of
from core.config.decode import ConfigDecoder
from core.config.errors import UserError
from core.config.fields import field_types
from core.config.json_file import read_json
from core.config.links import file_in
from core.config.record import from_dict, to_dict, to_json
from core.weights.adapters import MergedWeights, SavedAdapters, adapter_settings
from core.weights.hf import load_from, save_by
from core.weights.hf_model import StoredModel, with_hf
from core.weights.key_map import hf_key_map, mtp_weights, own_key_map
from core.weights.peft_folder import PeftAdapters, PeftFolder, describing, is_peft
from core.weights.same_model import check_same_model
from core.weights.saved import newest
from core.weights.source import WeightSource


def silent(line: str) -> None:
    """Say nothing."""


def load_folder(model: StoredModel, folder: str | Path, *, allow_model_change: bool = False) -> None:
    """Copy the weights of a folder, ours, Hugging Face's, or that of a run or a checkpoint, into `model`.

    `config.json` says which it is, and of which model. Raises `UserError`, before a single weight is changed, when the
    folder is none of these, of another family, does not fit the model, or is of one that computes something else,
    unless `allow_model_change`: see `check_same_model`.
    """
    load_from(folder_source(model, newest(folder), allow_model_change=allow_model_change))


def folder_source(model: StoredModel, found: Path | Found, *, allow_model_change: bool = False) -> WeightSource:
    """The weights of `load_folder` for `model`, which needs no memory; errors and logs as there. Those of multi-token
    prediction may be missing."""
    if not isinstance(found, Found) and is_peft(found):
        return merged_peft(model, found, allow_model_change=allow_model_change)
    if not is_published(found):
        return own_source(model, found, allow_model_change=allow_model_change)
    check_same_model(model, to_dict(hf_config(type(model), found)), found, allow=allow_model_change)
    key_map = hf_key_map(model)
    return WeightSource(key_map, found, may_lack=mtp_weights(key_map.weights, model.config.n_layers))


def is_published(found: str | Path | Found) -> TypeGuard[str | Path]:
    """Whether a folder is one of Hugging Face, as its `config.json` says. Raises `UserError` when there is none."""
    return not isinstance(found, Found) and "model_type" in read_config(found)


def load_weights(model: StoredModel, folder: str | Path) -> None:
    """Copy the weights of a folder in our format into `model`: one that `save_weights` or `python -m <model>.convert
    from-hf` wrote, a checkpoint, or a run, of which the newest whole checkpoint is taken.

    Raises `UserError`, before a single weight is changed, when it is no such folder, does not fit the model, or is of
    one that computes something else.
    """
    load_from(own_source(model, newest(folder)))


def own_source(model: StoredModel, folder: str | Path | Found, *, allow_model_change: bool = False) -> WeightSource:
    """The weights in a folder in our format for `model`, which needs no memory; errors and logs as `load_weights`."""
    ours = f"{type(model).__module__}:{type(model).__qualname__}"
    if (found := class_of(folder)) != ours:
        raise UserError(f"{folder} holds the weights of {found}, not of {ours}")
    check_same_model(model, model_of(read_config(folder)), folder, allow=allow_model_change)
    key_map = own_key_map(model)
    may_lack = mtp_weights(key_map.weights, model.config.n_layers)
    return WeightSource(key_map, with_base(model, folder), may_lack=may_lack)


def with_base(model: StoredModel, place: str | Path | Found) -> str | Path | Found | MergedWeights:
    """A folder in our format, or the weights of a checkpoint of adapters merged into those that its run began with.

    Raises `UserError` where these are not there any more.
    """
    run = read_config(place)
    if not isinstance(place, Found) or adapter_settings(run) is None:
        return place
    base = run["checkpoint"]["initial_load_path"]
    if "://" not in base and not Path(base).exists():
        raise UserError(f"{place} holds adapters alone, and the weights that its run began with, {base}, are not there")
    return MergedWeights(SavedAdapters(place, run), folder_source(model, weights_under(base), allow_model_change=True))


def weights_under(folder: str | Path) -> Path | Found:
    """Where the weights are that a run of adapters began with, which may have begun with adapters of peft's."""
    return newest(describing(folder) if is_peft(folder) else folder)


def merged_peft(model: StoredModel, folder: Path, *, allow_model_change: bool = False) -> WeightSource:
    """The weights of the Hugging Face folder that one of peft's names, with the adapters merged into them."""
    peft = PeftFolder(folder)
    base = folder_source(model, newest(peft.place), allow_model_change=allow_model_change)
    key_map, adapters = own_key_map(model), PeftAdapters(peft, hf_key_map(model), base)
    may_lack = mtp_weights(key_map.weights, model.config.n_layers)
    return WeightSource(key_map, MergedWeights(adapters, base), may_lack=may_lack)


def save_weights(
    model: StoredModel, folder: str | Path, *, dtype: torch.dtype | None = None, shard_gib: float = 5.0
) -> None:
    """Write `model` as a folder in our format. `dtype` casts the weights, but not the buffers.

    A tied head is left out. Raises `UserError` when `folder` already holds weights.
    """
    save_by(model, own_key_map(model), folder, dtype, shard_gib)
    (Path(folder) / "config.json").write_text(to_json(model.config))


def hf_config(family: type, folder: str | Path, say: Callable[[str], object] = silent) -> Configurable.Config:
    """The configuration of a model of this family in the `config.json` of a Hugging Face folder; `say` is told what of
    it was left out.

    Raises `UserError`, which names the file, when it is of another family or has a value that cannot be understood.
    """
    reader, stated = with_hf(family), read_config(folder)
    try:
        return reader.from_published(stated, Path(folder), say)
    except UserError as error:
        raise UserError(f"{folder}/{CONFIG_FILE}: {error}") from error


def class_of(folder: str | Path | Found) -> str:
    """The class of the model whose weights a folder in our format holds, as "module:Class".

    Raises `UserError` for a folder of another kind, that of a run may have a `config.json` and no weights, and for a
    run whose class is not to be had.
    """
    config = read_config(folder)
    try:
        name = model_of(config).get("class") or told_class(config)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    if not name:
        raise UserError(f"{folder}/config.json states no class: this is no folder of our weights")
    if not isinstance(folder, Found) and not any(Path(folder).glob("*.safetensors*")):
        raise UserError(f"{folder} has no weights, just the config.json of {name}")
    return str(name)


def own_config(families: Mapping[str, type], place: Path | Found, trust: Sequence[str]) -> Any:
    """The configuration of the model whose weights a folder in our format, or a checkpoint, holds, which is of one of
    these families; raises `UserError` for another."""
    known = {f"{family.__module__}:{family.__qualname__}" for family in families.values()}
    if (found := class_of(place)) not in known:
        raise UserError(f"{place} holds the weights of {found}, not of {' or '.join(sorted(known))}")
    packages = {family.__module__.partition(".")[0] for family in families.values()}
    return from_dict(model_of(read_config(place)), trust=[*packages, *trust])


def told_class(run: dict[str, Any]) -> str:
    """The class of the model of a run that takes no other, and so does not state it; "" where nothing says which.

    Raises `UserError` where the class of the run is none, or nobody trusts its package.
    """
    if "class" not in run or (model := model_of(run)) is run:
        return ""
    decoder = ConfigDecoder()
    kind = field_types(decoder.class_of(run, Configurable.Config)).get("model")
    try:
        owner = owner_of(decoder.class_of(model, kind))
    except UserError:
        return ""  # it takes models of several classes
    return f"{owner.__module__}:{owner.__qualname__}" if owner else ""


def model_of(stated: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the model in that of a run; that of a model is itself."""
    return stated["model"] if isinstance(stated.get("model"), dict) else stated


def read_config(folder: str | Path | Found) -> dict[str, Any]:
    """What stands in a folder's `config.json`. Raises `UserError` when there is none."""
    if isinstance(folder, Found):
        return folder.config()
    return read_json(file_in(folder, CONFIG_FILE) or Path(folder) / CONFIG_FILE)
