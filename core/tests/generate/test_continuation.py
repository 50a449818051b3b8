"""Pieces of text as tokens come: together they are the text, and none ends inside a character."""

import random

import pytest

from core.data.tokenizer import Tokenizer
from core.generate.text import Continuation

TEXTS = [
    "a plain  text\n\twith  spaces  ",
    "日本語 and 👨\u200d👩\u200d👧, é e\u0301 \U0010ffff",
    "\u2581 \u2581\u2581 \0 \x01 \ufeff",
    "def f(x):\n        return x  # 12,345\n",
    "",
]


@pytest.fixture(scope="session")
def bundled() -> Tokenizer:
    return Tokenizer.Config().build()


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Tokenizer:
    """A tokenizer.json of single bytes and some merges, with a bos that gives no text."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    folder = tmp_path_factory.mktemp("byte_level")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["some plain text with spaces to train on"] * 10, trainer)
    model.save(str(folder / "tokenizer.json"))
    return Tokenizer.Config(path=str(folder)).build()


@pytest.fixture(scope="session")
def space_before_words(tmp_path_factory) -> Tokenizer:
    """A SentencePiece model as they usually are: words have a space in front, which a text's first one loses."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spaces")
    (folder / "text").write_text("Some plain text to train on, with words and spaces.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "usual"), vocab_size=290, byte_fallback=True,
        minloglevel=2, model_type="bpe",
    )  # fmt: skip
    return Tokenizer.Config(path=str(folder / "usual.model")).build()


@pytest.fixture(params=["bundled", "byte_level", "space_before_words"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    """What each token adds, and what is left at the end."""
    stream = Continuation(tokenizer, prompt)
    return [*map(stream.add, ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Some plain", "語"])
def test_pieces_make_the_text(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    whole, start = tokenizer.decode(before + ids), tokenizer.decode(before)
    found = pieces(tokenizer, before, ids)
    assert start + "".join(found) == whole
    assert "\ufffd" not in "".join(found)


def test_any_tokens_make_what_they_decode_to(tokenizer: Tokenizer) -> None:
    """Random ones: broken characters among them, and control tokens that give no text."""
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 30))]
        cut = draw.randrange(len(ids))
        before = tokenizer.encode(tokenizer.decode(ids[:cut]))  # a prompt is a text
        found = pieces(tokenizer, before, ids[cut:])
        assert tokenizer.decode(before) + "".join(found) == tokenizer.decode(before + ids[cut:])


def test_words_come_with_their_spaces(space_before_words: Tokenizer) -> None:
    prompt, ids = space_before_words.encode("Some"), space_before_words.encode("words and text")
    assert space_before_words.decode(ids) == "words and text"
    assert "".join(pieces(space_before_words, prompt, ids)) == " words and text"


def test_character_of_several_tokens_comes_when_it_is_complete(bundled: Tokenizer) -> None:
    ids = bundled.encode("a👧b")
    assert len(ids) >= 6
    found = pieces(bundled, [], ids)
    assert [piece for piece in found if piece] == ["a", "👧", "b"]
    assert found[0] == "a" and found[-2] == "b"


def test_text_that_breaks_off_in_a_character_ends_with_a_mark(bundled: Tokenizer) -> None:
    ids = bundled.encode("a👧")[:-1]
    found = pieces(bundled, [], ids)
    assert found[0] == "a" and not any(found[1:-1]) and found[-1].strip("\ufffd") == "" and found[-1]


def test_long_texts_cost_the_same_per_token(bundled: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what gave the last piece is decoded again, not the text so far."""
    stream, longest = Continuation(bundled, bundled.encode("start")), 0
    decode = bundled.decode

    def watch(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(bundled, "decode", watch)
    for token in bundled.encode("some words and 日本語 " * 50):
        stream.add(token)
    assert longest < 20
