"""What a folder of weights says of the model in it, and of its tokenizer."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from filecmp import cmp
from pathlib import Path
from types import ModuleType
from typing import ClassVar, cast

import torch
from torch import nn

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.fields import Problem
from core.config.recipe import published
from core.config.record import from_dict
from core.config.validate import validate
from core.data.tokenizer import Tokenizer
from core.generate.cache import CachedDecoder, CachedReader
from core.generate.columns import lay_by_columns, max_moving_bytes
from core.nn.decoder import Block, Decoder
from core.nn.init import materialise
from core.nn.kernel_checks import check_kernels
from core.nn.weights import parameter_count
from core.runtime.device import describe, free_memory, select_device
from core.runtime.live import line_on
from core.runtime.meta import meta_model
from core.runtime.units import size_text
from core.weights.adapters import adapter_settings
from core.weights.companions import stated_ids, tokenizer_in
from core.weights.folder import load_folder, model_of, read_config, silent
from core.weights.peft_folder import describing
from core.weights.saved import described_in

MANY_BYTES = 2**28
"""Of so many it is shown how far their loading is."""


class FolderModel(Configurable, ABC):
    """What a command does with the model of a folder of weights."""

    models: ClassVar[type[Configurable.Config]] = Decoder.Config
    """What models it reads: the class of their configurations."""
    cached: ClassVar[CachedReader] = CachedDecoder
    """How such a model reads texts piece by piece."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        checkpoint: str | None = None
        """Folder of the weights: a run, of which the newest whole checkpoint is taken, a checkpoint, what `convert`
        wrote, a Hugging Face folder, or one of peft's with adapters for such a folder."""
        allow_model_change: bool = False
        """Compute with settings of the model, such as another rope base or window, that are not those of the
        weights."""
        device: str = "auto"
        """auto (the accelerator, or else the CPU), cpu, or cuda."""
        model: Decoder.Config
        """The model and its sizes."""
        tokenizer: Tokenizer.Config
        """How text becomes token ids; without a path the tokenizer of the checkpoint, if there is one in its folder."""

        def problems(self) -> Iterator[Problem]:
            if self.checkpoint is None:
                yield "checkpoint", "no weights: give their folder, --checkpoint FOLDER"

    def __init__(self, config: Config) -> None:
        validate(config)
        self.folder = existing(config.checkpoint or "")
        self.described = describing(self.folder)
        self.device = select_device(config.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.tokenizer, self.own_tokenizer = folder_tokenizer(config.tokenizer, self.folder, config.model.vocab_size)
        self._stored = config.model, config.allow_model_change

    def summary(self, model: Decoder) -> Iterator[str]:
        """Which tokenizer, which model, where, and what its layers were in training."""
        own = ", that of the checkpoint" if self.own_tokenizer else ""
        yield f"tokenizer  {self.tokenizer.description}{own}"
        named = f"{type(model).__name__} of {parameter_count(model):,} parameters from {self.folder}"
        yield f"model      {named}, {dtype_name(self.dtype)} on {describe(self.device)}"
        if self.described != self.folder:
            yield f"adapters   of peft's, merged into the weights of {self.described}"
            base = tokenizer_in(self.described)
            if self.own_tokenizer is not None and base is not None and not cmp(self.own_tokenizer, base, shallow=False):
                yield f"           with a tokenizer of their own, whose files are not those of {self.described}"
        run = read_config(described_in(self.described))
        adapters = adapter_settings(run)
        if adapters is not None:
            yield f"adapters   of rank {adapters['rank']}, merged into the weights that the run began with"
        stated = [each["class"] for each in run.get("converters", []) if each != adapters]
        if stated:
            yield f"trained    by {', '.join(name.rpartition(':')[2] for name in stated)}, computed without here"

    @abstractmethod
    def run(self) -> None:
        """Do what the command is for."""

    def load(self, *, ragged: bool) -> Decoder:
        """The model with its weights: see `loaded_model`."""
        config, allow = self._stored
        return loaded_model(config, self.folder, self.device, self.dtype, ragged=ragged, allow_model_change=allow)


def described(
    folder: str | Path, configs: ModuleType, trust: Collection[str], models: type[Configurable.Config] = Decoder.Config
) -> tuple[Decoder.Config, Tokenizer.Config]:
    """The model whose weights a folder holds, one of `models`, and the tokenizer of its run, or else the default.

    The folder is that of a run, of a checkpoint, of our weights, of Hugging Face, there of a family that the recipes in
    `configs` have, or of adapters of peft's for such a folder. Raises `UserError` for another one.
    """
    place = described_in(describing(folder))
    stated = read_config(place)
    if "model_type" in stated:
        try:
            return cast(Decoder.Config, published(stated, configs, place, silent)), Tokenizer.Config()
        except UserError as error:
            raise UserError(f"{place}/config.json: {error}") from error
    model = model_of(stated)
    if model is stated and "class" not in model:
        raise UserError(f"{place}/config.json describes no model: it states neither a class nor a model_type")
    trust = [configs.__name__.partition(".")[0], *trust]
    try:
        config = from_dict(model, models, trust=trust)
        read = from_dict(stated.get("tokenizer", {"path": None}), Tokenizer.Config, trust=trust)
        tokenizer = cast(Tokenizer.Config, read)
    except UserError as error:
        raise UserError(f"{place}/config.json describes no model:\n{error}") from error
    if tokenizer_in(folder) is not None:
        tokenizer = replace(tokenizer, path=None)  # the place in the configuration may be that of another machine
    return cast(Decoder.Config, config), tokenizer


def existing(folder: str) -> Path:
    """A folder that is there; raises `UserError` for another."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: --checkpoint names one with config.json and weights")
    return path


def folder_tokenizer(config: Tokenizer.Config, folder: Path, vocab_size: int) -> tuple[Tokenizer, Path | None]:
    """The tokenizer for weights in a folder whose model has `vocab_size` rows, and its file where it is that of the
    folder. Raises `UserError` where it is not that of the model."""
    own = tokenizer_in(folder) if config.path is None else None
    tokenizer: Tokenizer = replace(config, path=config.path if own is None else str(own)).build()
    check_tokenizer(tokenizer, vocab_size, describing(folder), found=own is not None or config.path is not None)
    return tokenizer, own


def loaded_model(
    config: Decoder.Config,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ragged: bool,
    allow_model_change: bool = False,
) -> Decoder:
    """A model with the weights of a folder, in evaluation mode; `ragged` prompts of several lengths share a batch.

    Raises `UserError` where they do not fit it or the memory."""
    model: Decoder = meta_model(config)
    blocks = cast(Iterable[Block], model.layers.values())
    asked = {"device": device, "dtype": dtype, "documents": ragged, "cached": True}
    check_kernels((block.attention for block in blocks), **asked)
    n_bytes = allocate(model, device, dtype)
    with line_on(sys.stderr) if n_bytes > MANY_BYTES else nullcontext():
        load_folder(model, folder, allow_model_change=allow_model_change)
        lay_by_columns(model)
    return model.eval()


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Give a meta model memory, and return its bytes. Raises `UserError` where there is not enough."""
    n_bytes = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    moving = max_moving_bytes(model) if device.type == "cpu" and dtype == torch.float32 else 0
    free = free_memory(device)
    if free is not None and n_bytes + moving > free:
        twice = f", of which {size_text(moving)} for a moment" if moving else ""
        raise UserError(
            f"the weights take {size_text(n_bytes + moving)} in {dtype_name(dtype)}{twice}, {device} has "
            f"{size_text(free)} left: choose a smaller model or another device"
        )
    materialise(model, device, dtype)
    return n_bytes


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def end_ids(tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and all that `generation_config.json` and `config.json` name."""
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return frozenset([*own, *stated_ids(folder)["eos_token_id"]])


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, folder: Path, *, found: bool) -> None:
    """Raise `UserError` when a tokenizer is not that of the model, which has `vocab_size` rows.

    One that was not `found`, by a path or in the folder, is the bundled one, and that of a run which says so."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, model.vocab_size is {vocab_size:,}: "
            "they do not belong together; choose the model's own with --tokenizer.path"
        )
    if not found and tokenizer.vocab_size != vocab_size and "tokenizer" not in read_config(described_in(folder)):
        raise UserError(
            f"{folder} has no tokenizer, and the bundled one of {tokenizer.vocab_size:,} tokens is not that of a model "
            f"of {vocab_size:,}: choose the model's own with --tokenizer.path"
        )
