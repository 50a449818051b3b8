"""Tokenizers in tiktoken's format, compared with a plain merging of bytes by rank."""

import base64
import inspect
import json
from itertools import pairwise
from pathlib import Path

import pytest

from core.config.errors import UserError
from core.data import packing, tiktoken_file
from core.data.tiktoken_file import PUBLISHED
from core.data.tokenizer import Tokenizer
from core.weights.companions import run_companions

regex = pytest.importorskip("regex", reason="it comes with transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
TEXT = inspect.getsource(packing) + "don't I'LL 12345 x\r\n\n  naïve 日本語🐋 ÀÉ _a-b_ \t\t tab\n\n\nend  "


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Tokens of the text: bytes, and then the pair that occurs most often, 300 times."""
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(PUBLISHED[100256].pattern, TEXT)]
    found = {bytes([byte]): byte for byte in range(256)}
    for rank in range(256, 556):
        pairs = [word[i] + word[i + 1] for word in words for i in range(len(word) - 1)]
        best = max(sorted(set(pairs)), key=pairs.count)
        found[best] = rank
        words = [merged(word, {best: 0}) for word in words]
    return found


def merged(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a word, of which the pair with the lowest rank is merged until there is none."""
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        _, i = min(pairs)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def written(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.mark.parametrize("number", PUBLISHED)
def test_ids_are_those_of_merging_by_rank(number: int, ranks: dict[bytes, int], tmp_path: Path, monkeypatch) -> None:
    known = PUBLISHED[number]
    shift = {token: max(id - number, 0) + len(ranks) for token, id in known.special.items()}
    monkeypatch.setattr(tiktoken_file, "PUBLISHED", {len(ranks): known._replace(special=shift)})
    for name in ("made.tiktoken", "tokenizer.model"):
        found = Tokenizer.Config(path=str(written(tmp_path / name, ranks))).build()
        words = regex.findall(known.pattern, TEXT)
        assert "".join(words) == TEXT
        parts = [merged([bytes([byte]) for byte in word.encode()], ranks) for word in words]
        expected = [ranks[token] for word in parts for token in word]
        assert found.encode(TEXT) == expected and found.decode(expected) == TEXT
        begin = [] if known.begin is None else [shift[known.begin]]
        assert found.encode_documents([TEXT]) == [[*begin, *expected, shift[known.end]]]
        assert found.encode_prompt(known.end) == [*begin, shift[known.end]]
        assert shift[known.end] not in found.encode(known.end)
        assert found.vocab_size == 1 + max(shift.values())


def test_published_sizes_are_those_of_their_models() -> None:
    behind = {each.name: each.special.values() for n, each in PUBLISHED.items() if min(each.special.values()) >= n}
    sizes = {name: 1 + max(ids) for name, ids in behind.items()}
    assert sizes == {
        "r50k_base": 50257, "cl100k_base": 100277, "Llama 3": 128256, "Qwen": 151646,
        "o200k_base": 200019,
    }  # fmt: skip
    llama = PUBLISHED[128000].special
    assert (llama["<|eot_id|>"], llama["<|start_header_id|>"], llama["<|python_tag|>"]) == (128009, 128006, 128010)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "made.tiktoken has 556 tokens in tiktoken's format, which does not say how .*Llama 3 .128,000.*take"),
        ({b"a": None}, "has no token for the byte 0x61: it is damaged or cut off"),
        ({b"a": 3}, "gives a rank twice"),
    ],
)
def test_what_cannot_be_read_is_one_line(change, said, ranks: dict[bytes, int], tmp_path: Path) -> None:
    changed = {token: rank for token, rank in {**ranks, **change}.items() if rank is not None}
    with pytest.raises(UserError, match=said):
        Tokenizer.Config(path=str(written(tmp_path / "made.tiktoken", changed))).build()


def test_a_line_that_is_none_is_named(ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = written(tmp_path / "made.tiktoken", ranks)
    path.write_bytes(path.read_bytes().replace(b" 70\n", b" seventy\n"))
    with pytest.raises(UserError, match="made.tiktoken:71: expected a token in base64 and its rank"):
        Tokenizer.Config(path=str(path)).build()


def test_a_folder_with_nothing_else_is_a_tokenizer(ranks: dict[bytes, int], tmp_path: Path, monkeypatch) -> None:
    special = {"<|endoftext|>": 556, "<|im_start|>": 557, "<|im_end|>": 558}
    monkeypatch.setattr(tiktoken_file, "PUBLISHED", {556: PUBLISHED[151643]._replace(special=special)})
    path = written(tmp_path / "qwen.tiktoken", ranks)
    in_folder = Tokenizer.Config(path=str(tmp_path)).build()
    assert in_folder.encode(TEXT) == Tokenizer.Config(path=str(path)).build().encode(TEXT)
    assert set(run_companions(str(tmp_path), None)) == {"tokenizer.json", "tokenizer_config.json"}
    written(tmp_path / "another.tiktoken", ranks)
    with pytest.raises(UserError, match="has several tokenizers, another.tiktoken, qwen.tiktoken: name one"):
        Tokenizer.Config(path=str(tmp_path)).build()


def test_the_files_beside_it_name_the_tokens(ranks: dict[bytes, int], tmp_path: Path, monkeypatch) -> None:
    known = PUBLISHED[151643]._replace(special={"<|endoftext|>": 556, "<|im_start|>": 557, "<|im_end|>": 558})
    monkeypatch.setattr(tiktoken_file, "PUBLISHED", {556: known})
    written(tmp_path / "tokenizer.model", ranks)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert Tokenizer.Config(path=str(tmp_path)).build().eos_id == 558
    kept = run_companions(str(tmp_path / "tokenizer.model"), None)
    (tmp_path / "kept").mkdir()
    for name, content in kept.items():
        (tmp_path / "kept" / name).write_bytes(content)
    assert set(kept) == {"tokenizer.json", "tokenizer_config.json"}
    same = Tokenizer.Config(path=str(tmp_path / "kept")).build()
    assert same.encode_documents([TEXT]) == Tokenizer.Config(path=str(tmp_path)).build().encode_documents([TEXT])
