"""A SentencePiece model as Hugging Face's `tokenizer.json`, with the same ids.

A `.model` is a protocol buffer: pieces with scores and kinds (field 1), how the model was trained (2), and what is done
to a text before it is cut (3). Byte-pair models that leave the text as it is can be said in the other form: each way to
make a piece of two others is a merge, in the order of the scores. Others cannot, or not with the same ids: unigram
models weigh whole texts, and a normalisation of SentencePiece's own has no counterpart.

Two things that are text to SentencePiece are not to Hugging Face: the special tokens written out, and U+2581.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from core.config.errors import UserError

SPACE = "\u2581"
"""How a piece has a space."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""
BPE = 2
Value = int | bytes
"""Of a field: fields of 4 and 8 bytes are bytes, too."""


class Piece(NamedTuple):
    """A token, its rank among merges (the higher the earlier), and its kind."""

    text: str
    score: float
    kind: int


class Roles(NamedTuple):
    """The ids of special tokens, of those that there are."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None


class SentencePieceModel(NamedTuple):
    """What a `.model` says."""

    pieces: list[Piece]
    kind: int
    """How a text is cut: 1 is unigram, 2 byte pairs, 3 words, 4 characters."""
    splits_white_space: bool
    """Whether the space stands at the end of a piece."""
    charsmap: bytes
    """A normalisation, compiled."""
    adds_space: bool
    """Whether a space is put in front of a text."""
    collapses_spaces: bool
    roles: Roles


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message of a protocol buffer, by number. Raises `UserError` where it ends too early."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    try:
        while at < len(data):
            number, kind = divmod(varint(), 8)
            if kind == 0:
                yield number, varint()
                continue
            size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            if at + size > len(data):
                raise IndexError
            yield number, data[at : at + size]
            at += size
    except (IndexError, KeyError):
        raise UserError("this is no SentencePiece model: it ends in the middle of a field") from None


def read_model(content: bytes) -> SentencePieceModel:
    """What a `.model` says; a field that is not there has the value that SentencePiece gives it."""
    pieces: list[Piece] = []
    trained: dict[int, Value] = {}
    normalised: dict[int, Value] = {}
    for number, value in fields(content):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            piece: dict[int, Any] = dict(fields(value))
            [score] = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
        elif number in (2, 3):
            (trained if number == 2 else normalised).update(fields(value))
    charsmap = normalised.get(2, b"")

    def role(number: int, default: int) -> int | None:
        token = int(trained.get(number, default))
        return token if 0 <= token < len(pieces) and pieces[token].kind in (CONTROL, UNKNOWN) else None

    return SentencePieceModel(
        pieces=pieces,
        kind=int(trained.get(3, 1)),
        splits_white_space=bool(trained.get(24, 0)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        adds_space=bool(normalised.get(3, 1)),
        collapses_spaces=bool(normalised.get(4, 1)),
        roles=Roles(unk=role(40, 0), bos=role(41, 1), eos=role(42, 2), pad=role(43, -1)),
    )


def tokenizer_json(model: SentencePieceModel, bos: int | None) -> str:
    """The `tokenizer.json` of a SentencePiece model; a text begins with the token `bos` there, if one is given.

    Raises `UserError` for a model that has none with the same ids.
    """
    if problem := obstacle(model):
        raise UserError(f"this SentencePiece model has no tokenizer.json of the same ids: {problem}")
    special = [(number, piece) for number, piece in enumerate(model.pieces) if piece.kind in (UNKNOWN, CONTROL)]
    unknown = next(piece.text for _, piece in special if piece.kind == UNKNOWN)
    has_bytes = any(piece.kind == BYTE for piece in model.pieces)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    restored = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prepended = [{"type": "Prepend", "prepend": SPACE}] if model.adds_space else []
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.adds_space else []
    decoders = [restored, *([{"type": "ByteFallback"}] if has_bytes else []), {"type": "Fuse"}, *stripped]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    stated = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": piece.text, **flags} for number, piece in special],
        "normalizer": {"type": "Sequence", "normalizers": [*prepended, replaced]},
        "pre_tokenizer": None,
        "post_processor": None if bos is None else begins_with(bos, model.pieces[bos].text),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
            "merges": merges(model.pieces),
        },
    }
    return json.dumps(stated, ensure_ascii=False, indent=1) + "\n"


def obstacle(model: SentencePieceModel) -> str:
    """What keeps a model from being said in the other form; "" if nothing does."""
    texts = [piece.text for piece in model.pieces]
    kinds = [piece.kind for piece in model.pieces]
    if model.kind != BPE:
        return "it is not of byte pairs"
    if model.charsmap or model.collapses_spaces:
        return "it normalises the text"
    if model.splits_white_space:
        return "it has spaces at the ends of its pieces"
    if USER_DEFINED in kinds or UNUSED in kinds or kinds.count(UNKNOWN) != 1 or len(set(texts)) < len(texts):
        return "it has pieces that users defined, or that are not used, or not one for what is unknown"
    return ""


def merges(pieces: list[Piece]) -> list[list[str]]:
    """Every pair of pieces that makes another, that of the highest score first."""
    known = {piece.text for piece in pieces if piece.kind == NORMAL}
    found = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        if piece.kind == NORMAL:
            cuts = ((piece.text[:at], piece.text[at:]) for at in range(len(piece.text) - 1, 0, -1))
            found += [[left, right] for left, right in cuts if left in known and right in known]
    return found


def begins_with(number: int, token: str) -> dict[str, Any]:
    """The post-processor that puts a token in front of a text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
