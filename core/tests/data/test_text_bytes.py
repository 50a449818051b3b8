"""How many bytes of text tokens stand for: every tokenizer that loses nothing says it exactly."""

import json
import math
from pathlib import Path

import pytest
import torch

from core.data.packing import IGNORE, Batch, pack_rows
from core.data.shards import TokenStream
from core.data.text_bytes import TextBytes
from core.data.tokenizer import Tokenizer

TEXTS = [
    "a",
    "def main() -> None:\n    print('x')  # two  spaces\n",
    "\tünïcode, 日本語 and \U0001f600\n",
    "",
    "the \u2581 of SentencePiece",
    "the end, and </s> in it",
]


def sentencepiece_model(folder: Path, **options: object) -> Path:
    import sentencepiece

    (folder / "text").write_text("Some text to train on, with words.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), minloglevel=2, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        **{"byte_fallback": True, "vocab_size": 290, **options},
    )  # fmt: skip
    return folder / "sp.model"


def byte_level(folder: Path) -> Path:
    """A vocabulary over bytes, with an end and no beginning, as Qwen's."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        initial_alphabet=alphabet, vocab_size=300, show_progress=False, special_tokens=["</s>", "<|user|>"]
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def byte_fallback(folder: Path) -> Path:
    """Pieces with a mark for spaces, one put in front of each text, and bytes for what no piece has, as Llama 2's."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


MADE = {
    "bundled": lambda folder: None,
    "sentencepiece": sentencepiece_model,
    "without-prefix": lambda folder: sentencepiece_model(folder, add_dummy_prefix=False, bos_id=-1),
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
}


def bytes_by_hand(tokenizer: Tokenizer, texts: list[str], seq_len: int, n_rows: int) -> int:
    """The bytes of ASCII texts in rows 0, ..., n_rows - 1 of a stream of documents, document by document.

    Without a beginning of its own, the first token of a document is no label.
    """
    total, left = 0, n_rows * seq_len + 1
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        read, left = ids[:left], max(left - len(ids), 0)
        total += len(text if read == ids else tokenizer.decode(read))
        if tokenizer.bos_id is None:
            total -= len(tokenizer.decode(read[:1]))
    return total


@pytest.mark.parametrize("name", MADE)
def test_a_text_has_the_bytes_of_its_tokens(name: str, tmp_path: Path) -> None:
    made = MADE[name](tmp_path)
    tokenizer = Tokenizer.Config(path=made and str(made)).build()
    n_bytes, text_bytes = tokenizer.n_bytes(), TextBytes(tokenizer)
    assert len(n_bytes) == tokenizer.vocab_size
    for text in TEXTS:
        if "\u2581" in text and name in ("byte-fallback", "sentencepiece"):
            continue  # these read it as a space
        if "</s>" in text and name in ("byte-level", "byte-fallback"):
            continue  # these read it as the end of a document
        found = sum(n_bytes[token] for token in tokenizer.encode(text))
        assert found == len(text.encode()) + (text_bytes.added if text else 0), text
    assert text_bytes.added == (name in ("sentencepiece", "byte-fallback"))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("seq_len", "n_rows"), [(5, 1), (8, 3), (16, 4)])
def test_rows_have_the_bytes_of_their_labels(name: str, seq_len: int, n_rows: int, tmp_path: Path) -> None:
    """Rows of whole documents, pieces of them, and their ends, by a plain loop over the documents."""
    made = MADE[name](tmp_path)
    tokenizer = Tokenizer.Config(path=made and str(made)).build()
    texts = ["a bad cab", "abba baa", "", "b", "dad had a bag and a cab", "ab " * 40]
    documents = tokenizer.encode_documents(texts)
    stream = TokenStream.hold(documents, [True] * len(texts), 0, tokenizer.vocab_size)
    batch = pack_rows(*stream.windows(torch.arange(n_rows).numpy(), seq_len))
    assert TextBytes(tokenizer)(batch) == bytes_by_hand(tokenizer, texts, seq_len, n_rows)


def test_an_unknown_token_stands_for_any_text(tmp_path: Path) -> None:
    made = sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=30)
    tokenizer = Tokenizer.Config(path=str(made)).build()
    ids = torch.tensor([tokenizer.encode("Some \u65e5 text")])
    text_bytes = TextBytes(tokenizer)
    assert math.isnan(text_bytes(Batch(ids, ids, ids, ids)))
    known = ids.where(~torch.tensor(tokenizer.n_bytes())[ids].isnan(), IGNORE)
    assert text_bytes(Batch(ids, known, ids, ids)) > 0
