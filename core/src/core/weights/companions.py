"""What goes along with weights in a folder: the tokenizer's files, which tokens end a text, a license."""

from pathlib import Path
from typing import Any

from core.checkpoint.manifest import CONFIG_FILE
from core.config.json_file import read_json, typed
from core.config.links import file_in

GENERATION_CONFIG = "generation_config.json"
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of `generation_config.json`, and of Hugging Face's `config.json`."""


def stated_ids(folder: str | Path) -> dict[str, list[int]]:
    """The ids that `generation_config.json` and `config.json` in a folder state for each of `ROLES`, each once, of
    the first file first. Raises `UserError` for what is no id, or list of ids."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for name in (GENERATION_CONFIG, CONFIG_FILE):
        if (file := file_in(folder, name)) is not None:
            for role, ids in ids_of(read_json(file), file).items():
                found[role] += [token for token in ids if token not in found[role]]
    return found


def ids_of(stated: dict[str, Any], name: object) -> dict[str, list[int]]:
    """The ids that one of these files, which errors call `name`, states for each of `ROLES`."""
    found = {}
    for role in ROLES:
        ids = typed(stated.get(role), int | list[int] | None, f"{name}: {role}")
        found[role] = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found
