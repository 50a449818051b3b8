"""Pieces of texts, compared with how `tokenizers` cuts and encodes whole texts."""

import inspect
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from core.data import packing
from core.data.hf_tokenizer import HuggingFace
from core.data.pieces import DEEPSEEK, DEEPSEEK_PIECE, TEXT_PIECE, Pieces, piece_of
from core.data.tiktoken_file import PUBLISHED

tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
TEXT = inspect.getsource(packing) + "don't I'LL they've 12345 x\r\n\n  naïve 日本語🐋 ÀÉ _a-b_ \t\t tab\n\n\nend  "
LETTERS = [
    *"abcxyzABZ0189 \n\r\t'’\"()[]{}<>.,;:!?/\\-_=+*&^%$#@~`|\x00\x0b\x1c\x1f\x7f\x85\xa0",
    *"éßſKǅªµ日本ー中のがàе́д٣४Ⅷ²½\u2003\u2028\u3000\u200b\u200d\ufeff\u0301\u0903\U0001f40b\U0001d7d9",
]
WORDS = [*LETTERS, *[" "] * 12, *"aAbB1" * 3, "'s", "'LL", "'re", "  ", "\n    ", "\r\n", "foo", " Bar", "1234"]
KINDS = ["GPT-2", "DeepSeek-V3", *(each.name for each in PUBLISHED.values())]


def cutter(kind: str) -> Any:
    """What cuts words as the tokenizer of this name does."""
    pre = tokenizers.pre_tokenizers
    if kind == "GPT-2":
        return pre.ByteLevel(add_prefix_space=False)
    patterns = DEEPSEEK if kind == "DeepSeek-V3" else {each.pattern for each in PUBLISHED.values() if each.name == kind}
    splits = [pre.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    assert len(splits) == (3 if kind == "DeepSeek-V3" else 1)
    return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def texts(n: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(n)] + [TEXT, ""]


def words_of(cut: Any, text: str) -> list[str]:
    return [word for word, _ in cut.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_is_cut_as_it_is_in_its_text(kind: str) -> None:
    cut, piece_of_kind = cutter(kind), DEEPSEEK_PIECE if kind == "DeepSeek-V3" else TEXT_PIECE
    for text in texts(1500):
        pieces = piece_of_kind.findall(text)
        assert "".join(pieces) == text
        assert [word for piece in pieces for word in words_of(cut, piece)] == words_of(cut, text), repr(text)
    assert max(map(len, piece_of_kind.findall(TEXT))) < 30, "hardly anything is taken apart"


def trained(kind: str, *, normalizer: Any = None) -> Any:
    """A tokenizer of some merges."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.normalizer = cutter(kind), normalizer
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    return made


def read(made: Any, path: Path, *, allow_special: bool = False) -> HuggingFace:
    made.save(str(path))
    return HuggingFace(path.read_bytes(), path, allow_special=allow_special)


def whole(made: Any, some: Sequence[str]) -> list[list[int]]:
    made.encode_special_tokens = True
    return [each.ids for each in made.encode_batch(list(some), add_special_tokens=False)]


def test_ids_are_those_of_whole_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.data.pieces._MOST_TEXT_PIECES", 500)
    made = trained("GPT-2", normalizer=tokenizers.normalizers.NFC())
    made.add_tokens(["<think>", "x y", tokenizers.AddedToken("Kelvin;", normalized=True)])
    made.add_special_tokens(["<|end|>"])
    some = [*texts(800), "so <think>, she said", "of \u212aelvin\u037e", "xx yy", "a<|end|>b", " ".join(WORDS)]
    for allow_special in (False, True):
        found = read(made, tmp_path / "tokenizer.json", allow_special=allow_special)
        assert found._pieces is not None
        for first in range(0, len(some), 100):
            part = some[first : first + 100]
            made.encode_special_tokens = not allow_special
            assert found.encode_batch(part) == [e.ids for e in made.encode_batch(part, add_special_tokens=False)]
            assert len(found._pieces._known) <= 500


def test_ids_of_deepseek_are_those_of_whole_texts(tmp_path: Path) -> None:
    made = trained("DeepSeek-V3", normalizer=tokenizers.normalizers.Sequence([]))
    found = read(made, tmp_path / "tokenizer.json")
    assert piece_of(made) is DEEPSEEK_PIECE and found._pieces is not None
    some = [*texts(800), "a  5", "a  日本", "x   y  !z  \u0301", "12  ,34 5", "tab\t7"]
    assert found.encode_batch(some) == whole(made, some)


def test_what_is_kept_is_not_encoded_again() -> None:
    asked: list[str] = []

    def encode(some: list[str]) -> list[list[int]]:
        asked.extend(some)
        return [[len(text)] for text in some]

    pieces = Pieces(encode, ["<think>"])
    assert pieces.encode_batch(["a b a", "b a"]) == [[1, 2, 2], [1, 2]] and sorted(asked) == [" a", " b", "a", "b"]
    assert pieces.encode_batch(["a a <think>", "a b"]) == [[11], [1, 2]] and asked[4:] == ["a a <think>"]
    assert pieces.encode_batch(["z" * 60, "z" * 60]) == [[60], [60]] == pieces.encode_batch(["z" * 60]) * 2
    assert asked[5:] == ["z" * 60] * 2


@pytest.mark.parametrize("change", ["prefix", "dropout", "normaliser", "pattern", "no words", "unigram"])
def test_other_tokenizers_encode_whole_texts(change: str, tmp_path: Path) -> None:
    made = trained("GPT-2")
    assert piece_of(made) is piece_of(trained(KINDS[2])) is TEXT_PIECE
    if change == "prefix":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "pattern":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+ ?"), "isolated")
    elif change == "no words":
        stated = json.loads(made.to_str()) | {"pre_tokenizer": None}
        made = tokenizers.Tokenizer.from_str(json.dumps(stated))
    elif change == "dropout":
        made.model.dropout = 0.5
    elif change == "normaliser":
        made.normalizer = tokenizers.normalizers.NFKC()
    else:
        made.model = tokenizers.models.Unigram([("a", -1.0)])
    assert piece_of(made) is None
    if change in ("prefix", "pattern", "no words"):
        found = read(made, tmp_path / "tokenizer.json")
        assert found.encode_batch(texts(20)) == whole(made, texts(20))
