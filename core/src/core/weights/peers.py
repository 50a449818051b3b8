"""The weights of a model as another program left them, found by its form: `python -m <model>.convert from-dcp`, ...

No program but Hugging Face's says in a folder all that a model is, so a recipe or a file says it, and what the folder
does say must agree.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from core.config.errors import UserError
from core.config.json_file import read_json
from core.config.links import file_in
from core.config.validate import validate
from core.runtime.meta import meta_model
from core.weights.dcp_files import DcpFiles
from core.weights.hf_model import StoredModel
from core.weights.key_map import form_key_map
from core.weights.peer_files import NanotronFiles, TorchFile
from core.weights.source import StoredFiles, WeightSource

PEERS: Mapping[str, Callable[[Path], StoredFiles]] = {
    "dcp": DcpFiles,
    "litgpt": partial(TorchFile, name="lit_model.pth"),
    "megatron": DcpFiles,
    "nanotron": NanotronFiles,
}
"""What `from-<name>` reads; dcp is torchtitan."""
LITGPT = {
    "n_layer": "n_layers",
    "n_embd": "dim",
    "n_head": "attention.n_heads",
    "n_query_groups": "attention.n_kv_heads",
    "head_size": "attention.head_dim",
    "norm_eps": "norm_eps",
    "rope_base": "rope.theta",
}
NANOTRON = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "dim",
    "num_attention_heads": "attention.n_heads",
    "num_key_value_heads": "attention.n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope.theta",
}
"""What these programs state beside the weights, and our settings."""
PADDED_TO = 64
"""Vocabularies are padded to a multiple of this, or of a multiple."""


def peer_source(
    peer: str, family: Any, config: Any, src: Path, say: Callable[[str], object]
) -> tuple[StoredModel, WeightSource]:
    """The model of this configuration, which needs no memory, and its weights in a folder that `peer` wrote.

    `say` is told of a padded vocabulary, which the model then has, too. Raises `UserError` where the peer has no such
    family, or the folder is of another model.
    """
    forms = family.peer_forms()
    if peer not in forms:
        known = ", ".join(f"from-{name}" for name in forms) or "none"
        raise UserError(f"{family.__qualname__} is not read from-{peer}: it has {known}")
    files = PEERS[peer](src)
    if peer == "litgpt":
        check_stated(stated_yaml(src / "model_config.yaml"), LITGPT, config, src)
    if peer == "nanotron" and (file := file_in(Path(str(files)), "model_config.json")) is not None:
        check_stated(read_json(file), NANOTRON, config, file)
    validate(config)
    form = forms[peer]
    model = meta_model(config)
    try:
        key_map = form_key_map(model, form)
        found = key_map.places["tok_embeddings.weight"]
    except KeyError as error:
        raise UserError(f"what {peer} writes has no place for weights such as {error.args[0]}") from error
    rows = next((files.headers[part.key].shape[0] for [part] in found if part.key in files.headers), config.vocab_size)
    if rows > config.vocab_size and rows % PADDED_TO == 0:
        say(f"the vocabulary of {config.vocab_size:,} tokens is padded to {rows:,} rows: the model has as many")
        config.vocab_size = rows
        model = meta_model(config)
        key_map = form_key_map(model, form)
    return model, WeightSource(key_map, files)


def check_stated(stated: Mapping[str, Any], names: Mapping[str, str], config: Any, place: Path) -> None:
    """Raise `UserError` for all that a program states beside its weights and the configuration states otherwise."""
    wrong = []
    for theirs, ours in names.items():
        if (value := stated.get(theirs)) is not None and float(value) != float(attrgetter(ours)(config)):
            wrong.append(f"{theirs} is {value}, {ours} is {attrgetter(ours)(config)}")
    scaled = stated.get("rope_adjustments") or stated.get("rope_scaling")
    if bool(scaled) != (config.rope.scaling != "none"):
        wrong.append(f"its rotary embedding is {'' if scaled else 'not '}scaled, rope.scaling is {config.rope.scaling}")
    if wrong:
        raise UserError("\n  ".join([f"{place} is of another model than --config:", *wrong]))


def stated_yaml(file: Path) -> dict[str, Any]:
    """The numbers that stand at the top of a YAML file, and whether a group stands there: all that is asked of it."""
    try:
        text = file.read_text()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    scalars = dict(re.findall(r"^(\w+): *([-+0-9.e]+)$", text, re.MULTILINE))
    return scalars | {name: True for name in re.findall(r"^(\w+):\n +\w", text, re.MULTILINE)}
