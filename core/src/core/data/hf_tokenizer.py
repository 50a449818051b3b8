"""A Hugging Face `tokenizer.json`, with what the files beside it say of its special tokens."""

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from core.config.errors import UserError
from core.config.fields import short_repr
from core.config.json_file import read_json, typed
from core.config.text_file import read_text
from core.data.library import library_errors
from core.data.pieces import Pieces, piece_of

_BYTE = re.compile("<0x[0-9A-F]{2}>")
TEMPLATE_MIB = 1
ROLE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""The files beside a tokenizer.json that name its special tokens; the first that names one counts."""


class HuggingFace:
    """A `tokenizer.json`; bos and eos are those that the `tokenizer_config.json` beside it names, or else the
    `special_tokens_map.json`, or else for bos the one that the tokenizer puts before a text.

    A text begins with bos where the tokenizer itself puts it: by its post-processor, or without one by `add_bos_token`.
    """

    kind = "Hugging Face tokenizer"
    rules: str
    """What the ids of a text hang on beside the file; part of the fingerprint."""

    def __init__(self, content: bytes, path: Path, *, allow_special: bool, roles: dict[str, Any] | None = None) -> None:
        """Special tokens that are written in a text are text, unless `allow_special`; `roles` are those of special
        tokens that no file beside says."""
        self._as_text, self.rules = not allow_special, " special tokens are text" * (not allow_special)
        if importlib.util.find_spec("tokenizers") is None:
            raise UserError(f"{path} needs the package tokenizers: in the checkout run pip install './core[hf]'")
        import tokenizers

        with library_errors(f"{path} is no tokenizer.json of Hugging Face"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
            if not ids:
                raise UserError(f"{path} has no tokens")
            self.vocab_size = 1 + max(ids)
            self._tokenizer.encode_special_tokens = self._as_text
            added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
            self.special_texts: list[str] = [token.content for token in added.values() if token.special]
            begun = self._begun()
            looked_for = [token.content for token in added.values() if not (self._as_text and token.special)]
            piece = piece_of(self._tokenizer)
            self._pieces = None if piece is None else Pieces(self._encode_whole, looked_for, piece)
        files = [path.with_name(name) for name in ROLE_FILES]
        stated = {file: read_json(file) for file in files if os.path.exists(file)} | {path: roles or {}}
        self.bos_id = self._special(stated, "bos_token")
        self.eos_id = self._special(stated, "eos_token")
        self.special_tokens = special_tokens(stated)
        self.chat_templates = find_templates(path.parent, stated.get(files[0], {}))
        if self.bos_id is None and len(begun) == 1:
            [self.bos_id] = begun
        self.adds_bos = self.bos_id in begun[:1]
        if self.bos_id is not None and self._tokenizer.post_processor is None:
            self.adds_bos = stated.get(files[0], {}).get("add_bos_token") is True

    def _begun(self) -> list[int]:
        """The ids that the post-processor puts before a text."""
        plain, whole = (self._tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        n_added = len(whole) - len(plain)
        return next((whole[:n] for n in range(n_added + 1) if whole[n : n + len(plain)] == plain), [])

    def _special(self, stated: dict[Path, dict[str, Any]], name: str) -> int | None:
        settings, special = next(((file, each) for file, each in stated.items() if name in each), (Path(), {}))
        token = typed(special.get(name), str | dict[str, Any] | None, f"{settings}: {name}")
        text = typed(token.get("content"), str, f"{settings}: {name}.content") if isinstance(token, dict) else token
        if text is None:
            return None
        number = self._tokenizer.token_to_id(text)
        if number is None:
            raise UserError(
                f"{settings} names the token {short_repr(text)}, which the tokenizer.json beside it does not have"
            )
        return number

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode_whole(texts) if self._pieces is None else self._pieces.encode_batch(texts)

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Without the places of tokens in the text, which take time."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which special tokens that are written there are those tokens."""
        return self.encode_placed(text, special=True)[0]

    def encode_placed(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the characters that each is of; special tokens in it are such if `special`."""
        self._tokenizer.encode_special_tokens = not special
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = self._as_text
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def n_bytes(self) -> list[float]:
        """Of a vocabulary over bytes a character of a token is a byte. In another one a token has the bytes by which
        two others grow apart when it stands between them."""
        stated = json.loads(self._tokenizer.to_str())
        decoder = json.dumps(stated["decoder"])
        tokens = [self._tokenizer.id_to_token(token) or "" for token in range(self.vocab_size)]
        if '"ByteLevel"' in decoder:
            counts = [float(len(token)) for token in tokens]
        else:
            side = self.encode_batch(["a"])[0][-1]
            apart = self._tokenizer.decode_batch([[side, token, side] for token in range(self.vocab_size)], False)
            together = len(self._tokenizer.decode([side, side], False).encode())
            counts = [float(len(text.encode()) - together) for text in apart]
            if '"ByteFallback"' in decoder:
                counts = [1.0 if _BYTE.fullmatch(token) else n for token, n in zip(tokens, counts, strict=True)]
        for token in stated["added_tokens"]:
            counts[token["id"]] = float(len(token["content"].encode()))
        model = stated["model"]
        unknown = model.get("unk_id", self._tokenizer.token_to_id(model.get("unk_token") or ""))
        if unknown is not None:
            counts[unknown] = nan
        return counts


def special_tokens(stated: dict[Path, dict[str, Any]]) -> dict[str, str]:
    """The texts of special tokens by their roles, `bos_token` say, as a chat template knows them."""
    found: dict[str, str] = {}
    for settings in reversed(stated.values()):
        for name, token in settings.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def find_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The chat templates beside a tokenizer by their names: of files, else of `tokenizer_config.json`."""
    file, others = folder / "chat_template.jinja", folder / "additional_chat_templates"
    if os.path.isfile(file):
        found = {"default": file, **{each.stem: each for each in sorted(others.glob("*.jinja"))}}
        return {name: read_text(path, TEMPLATE_MIB) for name, path in found.items()}
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        named = typed(stated, list[dict[str, str]], "chat_template")
        return {each.get("name", ""): each.get("template", "") for each in named}
    return {"default": stated} if isinstance(stated, str) else {}
