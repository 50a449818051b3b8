"""Folders of transformers: the model that one describes, without memory, and the values that its weights start with."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.config.errors import UserError, did_you_mean
from core.config.json_file import read_json
from core.data.tokenizer import tokenizer_file

Attention = Literal["auto", "sdpa", "eager"]

LAYERS_OF_MASKS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, as transformers names them, in which a mask alone decides which tokens a token sees."""
SEE_AHEAD = ("cpmant", "xlm", "xlnet")
"""Types whose tokens see later ones by masks of their own making."""


def folder_problem(path: str) -> str:
    """What keeps a folder from describing a model of transformers' own code; empty if nothing does."""
    if not path:
        return "path is empty: --model.path FOLDER names a folder with a config.json of transformers"
    if not (Path(path).expanduser() / "config.json").is_file():
        return f"{path} has no config.json: name a folder that transformers wrote, or one from the hub"
    try:
        stated = read_json(Path(path).expanduser() / "config.json")
        kind = str(stated.get("model_type"))
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING_NAMES:
            remote = " and the code that it names (auto_map) is never run" if "auto_map" in stated else ""
            near = did_you_mean(kind, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
            return f"{path}: transformers has no causal language model of type {kind}{remote}{near and f'; {near}'}"
        if kind in SEE_AHEAD:
            return f"{path}: tokens of {kind} see later ones, so that there is nothing to predict: name another model"
        if "quantization_config" in stated:
            return f"{path} stores its weights in few bits: name a folder with plain weights"
        if stated.get("output_router_logits"):
            return (
                f"{path} asks for a loss of its routers (output_router_logits), which is not computed: set it to false"
            )
        text_config(path)
    except UserError as error:
        return str(error)
    return ""


def stated_config(path: str) -> Any:
    """The configuration that a folder describes, as transformers reads it; code of the folder is not run.

    Raises `UserError` for what it cannot read.
    """
    try:
        return AutoConfig.from_pretrained(Path(path).expanduser(), trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"transformers cannot read {path}/config.json: {error}") from error


def text_config(path: str) -> Any:
    """The part of the configuration of a folder that the language model is made by, read once for each content."""
    file = Path(path).expanduser() / "config.json"
    try:
        return _text_config(path, file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


@lru_cache
def _text_config(path: str, content: bytes) -> Any:
    del content
    return stated_config(path).get_text_config()


def model_class(path: str) -> Any:
    """The class of transformers that the model of a folder is made of."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(stated_config(path))]


@cache
def accepts(path: str, argument: str) -> bool:
    """Whether the forward of a folder's model takes an argument of this name."""
    return argument in inspect.signature(model_class(path).forward).parameters


@cache
def masks_of(path: str, attention: Attention) -> list[tuple[str, bool]]:
    """The masks that the model of a folder has transformers make: the function that it asks, and whether it hands it
    the positions of tokens. The model itself is asked, since no setting says so."""
    model, told = without_memory(path, attention), []
    vars(model.config)["pad_token_id"] = None  # a model that has one looks for it in the tokens, which have no numbers
    module = sys.modules[type(model).__module__]
    makers = {name: each for name, each in vars(module).items() if name.startswith("create_") and "mask" in name}

    def asked(name: str, *args: Any, position_ids: Any = None, **kwargs: Any) -> None:
        told.append((name, position_ids is not None))

    vars(module).update({name: partial(asked, name) for name in makers})
    ids_BL = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    positions = {"position_ids": ids_BL} if accepts(path, "position_ids") else {}
    try:
        model.to("meta")(input_ids=ids_BL, use_cache=False, **positions)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        pass  # without numbers a model need not come to its end: masks are made before the first block
    finally:
        vars(module).update(makers)
    return told


def sees_ahead(path: str, attention: Attention) -> bool:
    """Whether tokens of the model of a folder see later ones, as in a BERT that is no decoder."""
    makers = {maker for maker, _ in masks_of(path, attention)}
    return makers == {"create_bidirectional_mask"}  # beside another it is for what an encoder has read


def keeps_documents_apart(path: str, attention: Attention) -> bool:
    """Whether the model of a folder lets a token see its own document alone: positions tell documents apart, if all of
    its masks are made of them, and if no layer has another way to earlier tokens, as convolutions and recurrent states
    are, which run on from one document into the next."""
    kinds = set(getattr(text_config(path), "layer_types", None) or ())
    if model_class(path)._is_stateful or not kinds <= LAYERS_OF_MASKS or not accepts(path, "position_ids"):
        return False
    masks = masks_of(path, attention)
    return bool(masks) and all(has_positions for _, has_positions in masks)


def tokenizer_in(path: str) -> bool:
    """Whether a folder has a tokenizer."""
    return tokenizer_file(Path(path).expanduser()).exists()


def without_memory(path: str, attention: Attention) -> Any:
    """The model that a folder describes, its weights on the meta device, and its buffers on the CPU with their values.

    Raises `UserError` where transformers cannot build it.
    """
    with _weights_on_meta(), torch.random.fork_rng(devices=[]):
        return _built(path, attention)


def start_values(path: str, attention: Attention, start: Literal["weights", "random"], seed: int) -> dict[str, Tensor]:
    """The values, of any shape, that weights and buffers of a run start with, by their names: those in the folder, in
    the type that they are stored in, or drawn anew as transformers draws them.

    Raises `UserError` where the folder does not hold them all.
    """
    if start == "random":
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            return _built(path, attention).state_dict()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            Path(path).expanduser(),
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto",
            attn_implementation=None if attention == "auto" else attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} has no weights that transformers reads: {error}; --model.start random draws them anew"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(kind, ()))):
            raise UserError(f"{path} does not fit the model: {kind.replace('_', ' ')} {', '.join(names[:6])}")
    return model.state_dict()


def _built(path: str, attention: Attention) -> Any:
    try:
        with torch.device("cpu"):
            return AutoModelForCausalLM.from_config(
                stated_config(path),
                trust_remote_code=False,
                attn_implementation=None if attention == "auto" else attention,
                dtype=torch.float32,
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"transformers cannot build the model of {path}: {error}") from error


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """While this runs, a weight that a module gets has no memory; buffers do. (Under the meta device, buffers that are
    computed once would have no values.)"""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        if weight is not None and not weight.is_meta:
            weight = nn.Parameter(weight.to("meta"), requires_grad=weight.requires_grad)
        register(module, name, weight)

    nn.Module.register_parameter = on_meta  # pyrefly: ignore[bad-assignment] - its first argument has another name
    try:
        yield
    finally:
        nn.Module.register_parameter = register
