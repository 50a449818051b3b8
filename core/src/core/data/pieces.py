"""Ids of a text out of those of its pieces, each of which is encoded once: words of a text occur again and again.

A tokenizer of bytes cuts a text into words by a regular expression before it merges bytes, and a byte merges with none
of another word. Those of GPT-2 and of all that follow it cut behind ASCII letters, and behind ASCII digits, wherever
another ASCII character than an apostrophe comes next, whatever else they do: each of their alternatives that has taken
a letter or a digit goes on over such alone, and what it looks at further on is white space, which is behind the cut.
So a text may be taken apart there, without the tokenizer, and the ids of a piece do not hang on its neighbours.

DeepSeek-V3's takes digits out first, and then Chinese and Japanese; white space in front of such ends its stretch and
is one word. So in front of a single space a text is taken apart only where another ASCII character comes next.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from core.data.tiktoken_file import PUBLISHED

_WORD = r" ?[^\sA-Za-z0-9]*+(?:[A-Za-z]++|[0-9]++)(?=[\x00-&(-\x7f]|\Z)"
_ENDS = r"\Z|(?<=[A-Za-z])[\x00-&(-@\[-`{-\x7f]|(?<=[0-9])[\x00-&(-/:-\x7f]"
TEXT_PIECE = re.compile(rf"{_WORD}|[\s\S]+?(?= \S|{_ENDS})")
"""A piece: most often what is no letter or digit, and then a run of these."""
DEEPSEEK_PIECE = re.compile(rf"{_WORD}|[\s\S]+?(?= [!-/:-~]|{_ENDS})")
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    r"| ?[\p{P}\p{S}]+"
    "[\r\n]*|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
"""What the tokenizers of DeepSeek-V3 and R1 cut out one after another."""
_KEPT_CHARACTERS = 48
"""A longer piece is most likely the only one of its kind."""
_MOST_TEXT_PIECES = 2**17
"""So many are kept, some 30 MB."""


def piece_of(tokenizer: Any) -> re.Pattern[str] | None:
    """The pieces of which the ids of a text are those, one behind the other: of a `tokenizers.Tokenizer` whose words
    are those of GPT-2, of DeepSeek-V3, or of one of the tokenizers that tiktoken has published, and that has no chance
    in it; None for any other."""
    model, normaliser, words = tokenizer.model, tokenizer.normalizer, _stated(tokenizer.pre_tokenizer)
    if type(model).__name__ != "BPE" or model.dropout is not None:
        return None
    if normaliser is not None and _stated(normaliser) not in ({"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        return None
    parts = words.get("pretokenizers", [words])
    if any(part.get("add_prefix_space") for part in parts):
        return None
    *splits, last = [(part.get("type"), part.get("use_regex")) for part in parts]
    if not splits:
        return TEXT_PIECE if last == ("ByteLevel", True) else None
    isolated = all((part.get("behavior"), part.get("invert")) == ("Isolated", False) for part in parts[:-1])
    if last != ("ByteLevel", False) or set(splits) != {("Split", None)} or not isolated:
        return None
    patterns = tuple(part.get("pattern", {}).get("Regex") for part in parts[:-1])
    if patterns == DEEPSEEK:
        return DEEPSEEK_PIECE
    return TEXT_PIECE if len(patterns) == 1 and patterns[0] in {each.pattern for each in PUBLISHED.values()} else None


def _stated(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer is, as tokenizer.json says it."""
    return {} if part is None else json.loads(part.__getstate__())


class Pieces:
    """Encodes texts out of the ids of pieces that it has met."""

    def __init__(
        self, encode: Callable[[list[str]], list[list[int]]], marks: Sequence[str], piece: re.Pattern[str] = TEXT_PIECE
    ) -> None:
        """`encode` encodes texts as a whole, as those that hold one of the `marks` are, tokens that are looked for
        before a text is cut into words; others are pieces, one behind the other."""
        self._encode, self._marks, self._piece = encode, list(marks), piece
        self._known: dict[str, list[int]] = {}

    def _has_mark(self, text: str) -> bool:
        """Whether a token is looked for in a text that is there, as it stands or as NFC writes it."""
        written = text if text.isascii() else f"{text}\0{unicodedata.normalize('NFC', text)}"
        return any(mark in written for mark in self._marks)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        marked = {i: text for i, text in enumerate(texts) if self._marks and self._has_mark(text)}
        pieces = [[] if i in marked else self._piece.findall(text) for i, text in enumerate(texts)]
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
