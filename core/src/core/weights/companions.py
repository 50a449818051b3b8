"""What goes along with weights in a folder: the tokenizer's files, which tokens end a text, a license.

A checkpoint keeps those of its run in a folder of its own, `companions`; in folders of weights they lie beside them.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.checkpoint.find import Found
from core.checkpoint.manifest import COMPANIONS, CONFIG_FILE
from core.config.errors import UserError
from core.config.json_file import parse_json, read_json, typed
from core.config.links import file_in
from core.config.text_file import read_bytes
from core.data.hf_tokenizer import ROLE_FILES
from core.data.tiktoken_file import TIKTOKEN_LINE, tiktoken_json
from core.data.tokenizer import MOST_MIB, bundled_model, tokenizer_file
from core.data.tokenizer_json import Roles, read_model, tokenizer_json
from core.weights.begin_token import set_begin
from core.weights.peft_folder import describing, is_peft
from core.weights.saved import checkpoint_in

GENERATION_CONFIG = "generation_config.json"
TOKENIZERS = TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
COMPANION_FILES = (TOKENIZER_JSON, SENTENCEPIECE, *ROLE_FILES, "chat_template.jinja", GENERATION_CONFIG, *LICENSES)
"""Files that go along with weights."""
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of `generation_config.json`, and of Hugging Face's `config.json`."""
Files = dict[str, bytes]
"""Names and contents."""
Say = Callable[[str], object]


def companions_place(folder: str | Path) -> Path:
    """Where the companions of the weights in a folder lie: in it, or in the folder that a checkpoint has for them, of a
    run the newest."""
    inside = checkpoint_in(folder) / COMPANIONS
    return inside if inside.is_dir() else Path(folder)


def read_companions(folder: str | Path) -> Files:
    """The companions of the weights in a folder. Those of adapters in peft's form are those of the model that they are
    for, but for the files of a tokenizer, which adapters may have of their own."""
    if is_peft(folder):
        files = read_companions(describing(folder))
        own = _files_in(Path(folder))
        return {**without_tokenizer(files), **own} if set(own) & set(TOKENIZERS) else files
    return _files_in(companions_place(folder))


def _files_in(place: Path) -> Files:
    found = {name: file_in(place, name) for name in COMPANION_FILES}
    return {name: read_bytes(file, MOST_MIB) for name, file in found.items() if file is not None}


def without_tokenizer(files: Files) -> Files:
    """Those of these companions that belong to weights, whatever the tokenizer is."""
    return {name: files[name] for name in (GENERATION_CONFIG, *LICENSES) if name in files}


def tokenizer_files(files: Files) -> Files:
    """Those of these companions that belong to a tokenizer."""
    return {name: files[name] for name in files.keys() - without_tokenizer(files).keys()}


def tokenizer_in(folder: str | Path) -> Path | None:
    """The file of the tokenizer in a folder of weights, if there is one: a run has it in its checkpoints, and adapters
    in peft's form one of their own, or that of the model which they are for."""
    places = dict.fromkeys((companions_place(folder), companions_place(describing(folder))))
    files = (file_in(place, name) for place in places for name in TOKENIZERS)
    return next((file for file in files if file is not None), None)


def run_companions(tokenizer: str | None, began_with: str | None) -> Files:
    """What a run whose tokenizer is at this path keeps for those who get its weights. Of the bundled tokenizer that is
    nothing; of the folder that the run began with, what belongs to the same tokenizer.

    Raises `UserError` for a `generation_config.json` that cannot be one.
    """
    if tokenizer is None:
        return {}
    path = Path(os.path.expanduser(tokenizer))
    path = tokenizer_file(path) if path.is_dir() else path
    name = SENTENCEPIECE if path.suffix == ".model" else TOKENIZER_JSON
    files = read_companions(path.parent)
    if path.name != name:
        files = {each: files[each] for each in (*ROLE_FILES, *LICENSES) if each in files and name == TOKENIZER_JSON}
    files[name] = read_bytes(path, MOST_MIB)
    if TIKTOKEN_LINE.match(files[name]):  # a form that few read
        files[TOKENIZER_JSON], roles = tiktoken_json(files.pop(name), str(path))
        files.setdefault(ROLE_FILES[0], as_json(roles))
    if began_with is not None and "://" not in began_with and (folder := Path(began_with).expanduser()).is_dir():
        others = read_companions(folder)
        if name in files and others.get(name) == files[name]:
            files = others | files
    generation_config(files)
    return files


def companions_of(place: Path | Found, stated: Mapping[str, Any], say: Say) -> Files:
    """The companions of weights that a folder, or a checkpoint with this configuration, holds."""
    if not isinstance(place, Found):
        return read_companions(place)
    names = [name for name in place.storage.names(f"{place.folder}/{COMPANIONS}") if name in COMPANION_FILES]
    if names:
        return {name: place.storage.read(f"{place.folder}/{COMPANIONS}/{name}") for name in names}
    if not isinstance(tokenizer := stated.get("tokenizer"), dict):
        return {}
    if (path := tokenizer.get("path")) is None:
        return {SENTENCEPIECE: bundled_model()}
    try:
        return run_companions(path, None)
    except UserError as error:
        say(f"without a tokenizer: that of the run is not here any more: {error}")
        return {}


def companions_for_others(
    place: Path | Found, run: Mapping[str, Any], stated: Mapping[str, Any], say: Say
) -> tuple[Files, dict[str, Any]]:
    """What goes along with the weights of a place with this configuration, for a folder whose Hugging Face
    `config.json` states that: see `complete_companions`."""
    files, add_bos = companions_of(place, run, say), run.get("tokenizer", {}).get("add_bos")
    return complete_companions(files, max_length=stated.get("max_position_embeddings"), add_bos=add_bos, say=say)


def complete_companions(
    files: Files, *, max_length: int | None, add_bos: bool | None, say: Say
) -> tuple[Files, dict[str, Any]]:
    """These companions with what others expect to find among them, and what `config.json` states of `ROLES`.

    A SentencePiece model gets a `tokenizer.json` of the same ids, a tokenizer a `tokenizer_config.json` that names its
    special tokens, and all a `generation_config.json` with every token that ends a text. Without a tokenizer and a
    `generation_config.json` nothing is known, and nothing stated.
    """
    made, roles = dict(files), Roles()
    if SENTENCEPIECE in files and TOKENIZER_JSON not in files:
        model = read_model(files[SENTENCEPIECE])
        roles = model.roles
        given = {role: token for role, token in roles._asdict().items() if token is not None}
        named = {f"{role}_token": model.pieces[token].text for role, token in given.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
        try:
            made[TOKENIZER_JSON] = tokenizer_json(model, None if add_bos is False else roles.bos).encode()
            made.setdefault(
                ROLE_FILES[0], as_json(settings if max_length is None else settings | {"model_max_length": max_length})
            )
        except UserError as error:
            say(f"{SENTENCEPIECE} goes along as it is: {error}")
    elif TOKENIZER_JSON in files:
        roles = stated_roles(files)
        if add_bos is not None:
            made |= with_begin(files, roles.bos, add_bos, say)
        made.setdefault(ROLE_FILES[0], as_json({"tokenizer_class": "PreTrainedTokenizerFast"}))
    stated = generation_config(files)
    if not (stated or TOKENIZER_JSON in made or SENTENCEPIECE in made):
        return made, {}
    ids = ids_of(stated, GENERATION_CONFIG)
    found: dict[str, Any] = {}
    for role in ROLES:
        own = getattr(roles, role.partition("_")[0])
        more = [own] if own is not None and own not in ids[role] and (role == "eos_token_id" or not ids[role]) else []
        both = ids[role] + more
        found[role] = both[0] if len(both) == 1 else both or None
    if known := {role: token for role, token in found.items() if token is not None}:
        made[GENERATION_CONFIG] = as_json(stated | known)
    return made, found


def with_begin(files: Files, bos: int | None, begins: bool, say: Say) -> Files:
    """The files of a tokenizer that change so that it puts the token with the id `bos` in front of a text, or does
    not."""
    try:
        if bos is None:
            raise UserError("no file names the begin token")
        stated = set_begin(files[TOKENIZER_JSON], bos, begins)
    except UserError as error:
        say(f"tokenizer.add_bos {begins} is not said to others: {error}")
        return {}
    settings = parse_json(files.get(ROLE_FILES[0], b"{}"), ROLE_FILES[0])
    made = {} if stated is None else {TOKENIZER_JSON: as_json(stated)}
    if settings.get("add_bos_token", begins) != begins:
        made[ROLE_FILES[0]] = as_json(settings | {"add_bos_token": begins})
    return made


def published_companions(folder: Path) -> Files:
    """The companions in a Hugging Face folder. Ids that only its `config.json` states, which is not kept, are put into
    `generation_config.json`."""
    files, ids = read_companions(folder), stated_ids(folder)
    stated = generation_config(files)
    before = ids_of(stated, GENERATION_CONFIG)
    more = {role: found for role, found in ids.items() if set(found) - set(before[role])}
    if more:
        lone = {role: found[0] if len(found) == 1 else found for role, found in more.items()}
        files[GENERATION_CONFIG] = as_json(stated | lone)
    return files


def write_companions(files: Files, folder: Path) -> None:
    """Write companions into a folder that is there."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def generation_config(files: Files) -> dict[str, Any]:
    """What stands in `generation_config.json`; nothing where there is none. Raises `UserError` for one that is none."""
    stated = parse_json(files.get(GENERATION_CONFIG, b"{}"), GENERATION_CONFIG)
    ids_of(stated, GENERATION_CONFIG)
    return stated


def stated_roles(files: Files) -> Roles:
    """The ids of the special tokens that the files beside a `tokenizer.json` name."""
    stated = [parse_json(files[name], name) for name in ROLE_FILES if name in files]
    added = parse_json(files[TOKENIZER_JSON], TOKENIZER_JSON, MOST_MIB).get("added_tokens")
    ids = {each["content"]: each["id"] for each in typed(added or [], list[dict[str, Any]], TOKENIZER_JSON)}

    def token(role: str) -> int | None:
        named = next((each[f"{role}_token"] for each in stated if f"{role}_token" in each), None)
        return ids.get(named.get("content") if isinstance(named, dict) else named)

    return Roles(bos=token("bos"), eos=token("eos"), pad=token("pad"), unk=token("unk"))


def stated_ids(folder: str | Path) -> dict[str, list[int]]:
    """The ids that `generation_config.json` and `config.json` in a folder state for each of `ROLES`, each once, of the
    first file first; a checkpoint has the first one among its companions, and a folder of adapters stands before its
    base. Raises `UserError` for what is no id, or list of ids."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    base = describing(folder)
    of_both = ((companions_place(each), GENERATION_CONFIG) for each in (folder, base))
    for place, name in (*of_both, (Path(base), CONFIG_FILE)):
        if (file := file_in(place, name)) is not None:
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


def as_json(stated: dict[str, Any]) -> bytes:
    """The text of a small JSON file."""
    return (json.dumps(stated, ensure_ascii=False, indent=2) + "\n").encode()
