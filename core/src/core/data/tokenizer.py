"""Text to token ids and back: the bundled SentencePiece model, a user's own, or a Hugging Face tokenizer.json.

The bundled model, `tokenizer.model`, was trained by `core.data.train_tokenizer`, which states the command.
"""

import hashlib
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, Protocol

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import absolute
from core.data.hf_tokenizer import HuggingFace
from core.data.library import library_errors
from core.data.sections import Section
from core.data.tiktoken_file import TIKTOKEN_LINE, tiktoken_json

MOST_MIB = 1024


class _Model(Protocol):
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    kind: str
    rules: str
    adds_bos: bool

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_marked(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def n_bytes(self) -> list[float]: ...


class Tokenizer(Configurable):
    """Turns text into token ids and back. `encode` adds no special tokens; those who join documents
    put bos and eos between."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        path: str | None = None
        """A SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder with one, where the latter goes first;
        None is the bundled model."""
        add_bos: bool | None = None
        """Whether a document and a prompt begin with the bos token; None is what the tokenizer itself does."""
        add_eos: bool | None = None
        """Whether a document ends with the eos token; None is wherever the tokenizer has one."""
        allow_special: bool = False
        """Read special tokens that are written out in a document (<|endoftext|>) as such; otherwise they are text, as
        they always are for SentencePiece."""

        def places(self) -> dict[str, Any]:
            return {"path": absolute(self.path)}

    def __init__(self, config: Config) -> None:
        self.config = config
        self._model: _Model
        if config.path is None:
            content = bundled_model()
            self._model, name = _SentencePiece(content, "the bundled model"), "bundled"
        else:
            path = Path(os.path.expanduser(config.path))
            path = tokenizer_file(path) if os.path.isdir(path) else path
            content, name = _read(path), str(path)
            if path.suffix == ".tiktoken" or TIKTOKEN_LINE.match(content):
                same, roles = tiktoken_json(content, name)
                self._model = HuggingFace(same, path, allow_special=config.allow_special, roles=roles)
            elif path.suffix == ".model":
                self._model = _SentencePiece(content, name)
            else:
                self._model = HuggingFace(content, path, allow_special=config.allow_special)
        self._name = f"the tokenizer {name}"
        self.vocab_size: int = self._model.vocab_size
        bos = self._model.adds_bos if config.add_bos is None else config.add_bos
        self.bos_id: int | None = self._token("bos", config.add_bos) if bos else None
        """What a document and a prompt begin with; None where they begin with their text."""
        self.eos_id: int | None = self._token("eos", config.add_eos) if config.add_eos is not False else None
        """What a document ends with."""
        self.fingerprint: str = hashlib.sha256(
            content + f"{self.bos_id} {self.eos_id}{self._model.rules}".encode()
        ).hexdigest()
        """Differs wherever the ids of a text may."""
        self._line_end: list[int] = self.encode("\n")
        no_eos = ", none that ends a document" if self.eos_id is None else ""
        self.description: str = f"{self._model.kind}, {self.vocab_size:,} tokens{no_eos} ({name})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the same file, and encodes on one core."""
        return one_threaded, (self.config,)

    def _token(self, name: str, asked: bool | None) -> int | None:
        """The id of bos or eos. Raises `UserError` where it is asked for and there is none."""
        found: int | None = getattr(self._model, f"{name}_id")
        if asked and found is None:
            raise UserError(f"tokenizer.add_{name} is set, and {self._name} names no {name} token: leave it out")
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, encoded on all cores."""
        with library_errors(f"{self._name} cannot encode a text"):
            return self._model.encode_batch(texts)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that a model continues: as of the beginning of a document, but special tokens that are
        written in it, of a chat say, are those tokens. In documents they are text."""
        with library_errors(f"{self._name} cannot encode a text"):
            ids = self._model.encode_marked(text)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each document as it stands in a token stream: bos, text, eos, as far as the tokenizer has them."""
        return self.encode_sections([Section(text) for text in texts])

    def encode_sections(self, sections: Sequence[Section]) -> list[list[int]]:
        """The ids of sections as they stand in a token stream, with bos and eos where a document begins and ends.

        What goes on is encoded as it would be behind a line end, so that a tokenizer which puts a space in front of
        every text puts none into the middle of one.
        """
        encoded = self.encode_batch([section.text if section.opens else f"\n{section.text}" for section in sections])
        before = [] if self.bos_id is None else [self.bos_id]
        after = [] if self.eos_id is None else [self.eos_id]
        for i, section in enumerate(sections):
            if not section.opens:
                joins = encoded[i][: len(self._line_end)] == self._line_end
                encoded[i] = encoded[i][len(self._line_end) :] if joins else self.encode(section.text)
            encoded[i] = before * section.opens + encoded[i] + after * section.closes
        return encoded

    @property
    def templating(self) -> HuggingFace:
        """The tokenizer as chat templates need it. Raises `UserError` for SentencePiece, which reads no special tokens
        in a text."""
        if not isinstance(self._model, HuggingFace):
            raise UserError(
                f"{self._name} is a SentencePiece model, which reads no special tokens in the text of a chat template: "
                "give a folder with a tokenizer.json, --tokenizer.path FOLDER"
            )
        return self._model

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bos, eos and other control tokens give none."""
        with library_errors(f"{self._name} cannot decode ids"):
            return self._model.decode(ids)

    def n_bytes(self) -> list[float]:
        """Bytes of text in UTF-8 that each id stands for inside a text.

        None for bos, eos and others that no text has; NaN for an unknown token, which may stand for any.
        """
        joins = {self.bos_id, self.eos_id}
        with library_errors(f"{self._name} does not say what its tokens stand for"):
            return [0.0 if token in joins else n for token, n in enumerate(self._model.n_bytes())]


def one_threaded(config: Tokenizer.Config) -> Tokenizer:
    """A tokenizer that encodes on one core, for one of several processes."""
    tokenizer: Tokenizer = config.build()
    if isinstance(tokenizer._model, _SentencePiece):
        tokenizer._model.n_threads = 1
    return tokenizer


def bundled_model() -> bytes:
    """The SentencePiece model that comes along."""
    return (importlib.resources.files("core.data") / "tokenizer.model").read_bytes()


def tokenizer_file(folder: Path) -> Path:
    """The file of a folder's tokenizer."""
    whole, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if os.path.exists(whole):
        return whole
    if os.path.exists(pieces):
        return pieces
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) > 1:
        names = ", ".join(path.name for path in ranks)
        raise UserError(f"the folder {folder} has several tokenizers, {names}: name one, --tokenizer.path FILE")
    return ranks[0] if ranks else whole


def _read(path: Path) -> bytes:
    if not os.path.exists(path):
        raise UserError(f"there is no tokenizer {path.absolute()}: give the place where it is, --tokenizer.path FILE")
    if path.suffix not in (".model", ".json", ".tiktoken"):
        raise UserError(f"{path} is no tokenizer: give a SentencePiece .model, a tokenizer.json or a folder with one")
    if not path.is_file():  # opening a pipe would wait for its writer
        raise UserError(f"the tokenizer {path} is no regular file")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_MIB * 2**20 + 1)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    if len(content) > MOST_MIB * 2**20:
        raise UserError(f"{path} has more than {MOST_MIB} MiB: it is no tokenizer")
    return content


class _SentencePiece:
    """A SentencePiece model.

    SentencePiece writes a space as U+2581, so that character itself would come back as a space. In a model that keeps
    white space exactly and has the 256 byte pieces it is therefore spelt in bytes, and every text comes back as it was.
    """

    kind = "SentencePiece"
    rules = ""
    _SPACE = "\u2581"
    n_threads = -1
    """Threads that encode a batch; -1 is one for each core."""

    def __init__(self, content: bytes, name: str) -> None:
        import sentencepiece

        with library_errors(f"{name} is no SentencePiece model"):
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = self._processor.get_piece_size()
            if self.vocab_size == 0:
                raise UserError(f"{name} is no SentencePiece model: it holds no pieces")
            self.bos_id = self._optional(self._processor.bos_id())
            self.eos_id = self._optional(self._processor.eos_id())
            self.adds_bos = self.bos_id is not None
            spelling = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in self._SPACE.encode()]
            probe = "  a  b  "
            exact = self._processor.decode(self._processor.encode(probe)) == probe
            self._spelling = spelling if exact and all(map(self._processor.is_byte, spelling)) else None

    @staticmethod
    def _optional(token: int) -> int | None:
        return token if token >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._processor.encode(list(texts), num_threads=self.n_threads)
        if self._spelling is not None:
            for number, text in enumerate(texts):
                if self._SPACE in text:
                    first, *others = self._processor.encode(text.split(self._SPACE))
                    encoded[number] = first + [token for ids in others for token in self._spelling + ids]
        return encoded

    def encode_marked(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def n_bytes(self) -> list[float]:
        return [self._n_bytes(token) for token in range(self.vocab_size)]

    def _n_bytes(self, token: int) -> float:
        processor = self._processor
        if processor.is_unknown(token):
            return nan
        if processor.is_control(token) or processor.is_unused(token):
            return 0
        return 1 if processor.is_byte(token) else len(processor.id_to_piece(token).replace(self._SPACE, " ").encode())
