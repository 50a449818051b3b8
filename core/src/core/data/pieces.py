"""Ids of a text out of those of its pieces, each of which is encoded once: words of a text occur again and again.

A tokenizer of bytes cuts a text into words by a regular expression before it merges bytes, and a byte merges with none
of another word. Those of GPT-2 and of all that follow it cut behind ASCII letters, and behind ASCII digits, wherever
another ASCII character than an apostrophe comes next, whatever else they do: each of their alternatives that has taken
a letter or a digit goes on over such alone, and what it looks at further on is white space, which is behind the cut.
So a text may be taken apart there, without the tokenizer, and the ids of a piece do not hang on its neighbours.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from core.data.tiktoken_file import PUBLISHED

_ENDS = r"(?= \S|\Z|(?<=[A-Za-z])[\x00-&(-@\[-`{-\x7f]|(?<=[0-9])[\x00-&(-/:-\x7f])"
TEXT_PIECE = re.compile(rf" ?[^\sA-Za-z0-9]*+(?:[A-Za-z]++|[0-9]++)(?=[\x00-&(-\x7f]|\Z)|[\s\S]+?{_ENDS}")
"""A piece: most often what is no letter or digit, and then a run of these."""
_KEPT_CHARACTERS = 48
"""A longer piece is most likely the only one of its kind."""
_MOST_TEXT_PIECES = 2**17
"""So many are kept, some 30 MB."""


def joins_pieces(tokenizer: Any) -> bool:
    """Whether the ids of a text are those of its pieces, one behind the other: of a `tokenizers.Tokenizer` whose words
    are those of GPT-2, or of one of the tokenizers that tiktoken has published, and that has no chance in it."""
    model, normaliser, words = tokenizer.model, tokenizer.normalizer, _stated(tokenizer.pre_tokenizer)
    if type(model).__name__ != "BPE" or model.dropout is not None:
        return False
    if normaliser is not None and _stated(normaliser) != {"type": "NFC"}:
        return False
    parts = words.get("pretokenizers", [words])
    if any(part.get("add_prefix_space") for part in parts):
        return False
    match [(part.get("type"), part.get("use_regex")) for part in parts]:
        case [("ByteLevel", True)]:
            return True
        case [("Split", None), ("ByteLevel", False)]:
            split = parts[0]
            known = split.get("pattern", {}).get("Regex") in {each.pattern for each in PUBLISHED.values()}
            return known and (split.get("behavior"), split.get("invert")) == ("Isolated", False)
    return False


def _stated(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer is, as tokenizer.json says it."""
    return {} if part is None else json.loads(part.__getstate__())


class Pieces:
    """Encodes texts out of the ids of pieces that it has met."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], marks: Sequence[str]) -> None:
        """`encode` encodes texts as a whole, as those that hold one of the `marks` are, tokens that are looked for
        before a text is cut into words."""
        self._encode, self._marks = encode, list(marks)
        self._known: dict[str, list[int]] = {}

    def _has_mark(self, text: str) -> bool:
        """Whether a token is looked for in a text that is there, as it stands or as NFC writes it."""
        written = text if text.isascii() else f"{text}\0{unicodedata.normalize('NFC', text)}"
        return any(mark in written for mark in self._marks)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        marked = {i: text for i, text in enumerate(texts) if self._marks and self._has_mark(text)}
        pieces = [[] if i in marked else TEXT_PIECE.findall(text) for i, text in enumerate(texts)]
        known = self._known
        new = list({piece for each in pieces for piece in each if piece not in known})
        known.update(zip(new, self._encode(new), strict=True))
        found = [list(chain.from_iterable(map(known.__getitem__, each))) for each in pieces]
        for i, ids in zip(marked, self._encode(list(marked.values())), strict=True):
            found[i] = ids
        for piece in new:
            if len(piece) > _KEPT_CHARACTERS:
                del known[piece]
        if len(known) > _MOST_TEXT_PIECES:
            known.clear()
        return found
