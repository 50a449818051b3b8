"""A SentencePiece model as tokenizer.json: the ids of `tokenizers` against those of `sentencepiece`."""

import inspect
import random
from pathlib import Path

import pytest
import sentencepiece

from core.config.errors import UserError
from core.data import packing, sections, tokenizer
from core.data.tokenizer import bundled_model
from core.data.tokenizer_json import Roles, read_model, tokenizer_json

tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")

SOURCES = [inspect.getsource(module) for module in (packing, sections, tokenizer)]
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def texts() -> list[str]:
    """Code, and drawn text: of all of Unicode but U+2581, and of pieces that merge in several ways."""
    draw = random.Random(0)
    ranges = [(0, 0x80), (9, 14), (0x20, 0x24), (0x80, 0x2581), (0x2582, 0xD800), (0xE000, 0x110000)]
    found = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(60))) for _ in range(300)]
    runs = ["a", "aa", " ", "  ", "\n", "-", "=", "self", ".", "e", "12"]
    return [*found, *("".join(draw.choices(runs, k=80)) for _ in range(300)), *SOURCES]


def trained(folder: Path, **options: object) -> bytes:
    (folder / "text").write_text("\n".join(SOURCES))
    settings = {"vocab_size": 600, "model_type": "bpe", "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "made"), **settings)
    return (folder / "made.model").read_bytes()


KINDS = {
    "as train_tokenizer": {**EXACT, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
    "as Llama 2": EXACT,
    "unknown characters": {**EXACT, "byte_fallback": False, "character_coverage": 0.98},
}


@pytest.mark.parametrize("kind", ["bundled", *KINDS])
def test_the_ids_are_equal(kind: str, tmp_path: Path) -> None:
    content = bundled_model() if kind == "bundled" else trained(tmp_path, **KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    made = tokenizers.Tokenizer.from_str(tokenizer_json(read_model(content), 1))
    samples = texts()
    expected = theirs.encode(samples)
    assert [each.ids for each in made.encode_batch(samples, add_special_tokens=False)] == expected
    assert made.encode("a b").ids == [1, *theirs.encode("a b")]
    if kind != "unknown characters":
        assert [made.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected] == samples


def test_special_tokens_have_their_roles(tmp_path: Path) -> None:
    assert read_model(bundled_model()).roles == Roles(unk=0, bos=1, eos=2)
    model = read_model(trained(tmp_path, **EXACT, bos_id=-1, eos_id=1, pad_id=0, unk_id=2))
    assert model.roles == Roles(unk=2, eos=1, pad=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**EXACT, "model_type": "unigram"}, "it is not of byte pairs"),
        ({}, "it normalises the text"),
        ({**EXACT, "user_defined_symbols": ["<user>"]}, "it has pieces that users defined"),
        ({**EXACT, "treat_whitespace_as_suffix": True}, "it has spaces at the ends of its pieces"),
    ],
)
def test_a_model_that_cannot_be_said_so_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no tokenizer.json of the same ids: {message}"):
        tokenizer_json(read_model(trained(tmp_path, **options)), None)


def test_a_model_that_is_cut_off() -> None:
    with pytest.raises(UserError, match="this is no SentencePiece model: it ends in the middle of a field"):
        read_model(bundled_model()[:1001])
