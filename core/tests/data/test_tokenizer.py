import importlib.resources
import importlib.util
import json
import random

import pytest

from core.config.errors import UserError
from core.data.tokenizer import Tokenizer
from core.weights.companions import run_companions

TRAPS = [
    "",
    " ",
    "   leading and trailing   ",
    "two  spaces\n\n\tand a tab\r\n",
    "\u2581",
    "a\u2581b \u2581\u2581 \u2581",
    "\0 nul \x01",
    "<s></s><unk><0x41>",
    "\u2585 \u2047 \ufffd \ufeff",
    "é e\u0301 ﬁ ½ ㎏ \u00a0\u2028\x85",
    "日本語 👨\u200d👩\u200d👧 \U0010ffff",
    "def f(x):\n        return x  # 12,345\n",
]


def test_bundled_model(tokenizer):
    model = importlib.resources.files("core.data") / "tokenizer.model"
    assert len(model.read_bytes()) < 60_000
    assert tokenizer.vocab_size == 2048
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.description == "SentencePiece, 2,048 tokens (bundled)"


@pytest.mark.parametrize("text", TRAPS)
def test_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_comes_back_as_it_was(tokenizer):
    draw = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x3000), (0x2570, 0x2590), (0x3000, 0xD800), (0xE000, 0x110000)]
    texts = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(60))) for _ in range(500)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(TRAPS) == [tokenizer.encode(text) for text in TRAPS]
    assert tokenizer.encode_batch([]) == []


def test_documents_stand_between_bos_and_eos(tokenizer):
    ids = tokenizer.encode("text")
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert tokenizer.encode_documents(["text"]) == [[1, *ids, 2]]
    assert tokenizer.decode([1, *ids, 2]) == "text"


def test_own_sentencepiece_model_is_known_by_its_content(tokenizer, tmp_path):
    copy = tmp_path / "mine.model"
    copy.write_bytes((importlib.resources.files("core.data") / "tokenizer.model").read_bytes())
    mine = Tokenizer.Config(path=str(copy)).build()
    assert mine.fingerprint == tokenizer.fingerprint
    assert mine.encode("the same") == tokenizer.encode("the same")
    assert str(copy) in mine.description


@pytest.mark.parametrize("content", [b"", b"this is no model"])
def test_file_that_is_no_sentencepiece_model(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.model is no SentencePiece model"):
        Tokenizer.Config(path=str(path)).build()


def test_a_folder_with_a_sentencepiece_model_alone(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        (importlib.resources.files("core.data") / "tokenizer.model").read_bytes()
    )
    assert Tokenizer.Config(path=str(tmp_path)).build().fingerprint == tokenizer.fingerprint
    assert set(run_companions(str(tmp_path), None)) == {"tokenizer.model"}


def test_wrong_paths(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer .*none.model"):
        Tokenizer.Config(path=str(tmp_path / "none.model")).build()
    with pytest.raises(UserError, match=r"there is no tokenizer .*tokenizer\.json"):
        Tokenizer.Config(path=str(tmp_path)).build()
    (tmp_path / "vocab.bin").touch()
    with pytest.raises(UserError, match=r"vocab.bin is no tokenizer: give a SentencePiece \.model"):
        Tokenizer.Config(path=str(tmp_path / "vocab.bin")).build()


@pytest.fixture
def json_folder(tmp_path):
    """A folder as Hugging Face publishes them, with the settings that spoil training data: truncation and padding."""
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["some text to train on, and some more"] * 10, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    model.enable_truncation(max_length=8)
    model.enable_padding(length=16)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_huggingface_tokenizer(json_folder):
    settings = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
    (json_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.Config(path=str(json_folder)).build()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    text = "some text, longer than the sixteen tokens that the file would pad it to: ü 日本"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and 0 not in ids
    assert tokenizer.encode_documents([text, "a"]) == [[0, *ids, 1], [0, *tokenizer.encode("a"), 1]]
    assert max(ids) < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode("a")) == 1
    same = Tokenizer.Config(path=str(json_folder / "tokenizer.json")).build()
    assert same.fingerprint == tokenizer.fingerprint


def test_huggingface_tokenizer_without_settings_has_what_its_post_processor_adds(json_folder):
    with_settings = Tokenizer.Config(path=str(json_folder)).build()
    assert (with_settings.bos_id, with_settings.eos_id) == (0, None)
    assert with_settings.encode_documents(["a"]) == [[0, *with_settings.encode("a")]]
    assert " tokens, none that ends a document (" in with_settings.description
    (json_folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<eos>"}')
    assert Tokenizer.Config(path=str(json_folder)).build().fingerprint != with_settings.fingerprint


def post_processed(folder, template):
    """The tokenizer of a folder with this post-processor, or None, in the words of tokenizers and in ours."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [("<bos>", 0), ("<eos>", 1)]
    theirs.post_processor = template and tokenizers.processors.TemplateProcessing(template, special_tokens=ids)
    theirs.no_truncation(), theirs.no_padding()
    theirs.save(str(folder / "tokenizer.json"))
    return theirs


@pytest.mark.parametrize("template", [None, "$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <bos> $A"])
def test_documents_begin_with_bos_where_the_tokenizer_puts_it(json_folder, template):
    theirs = post_processed(json_folder, template)
    (json_folder / "special_tokens_map.json").write_text('{"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}')
    found = Tokenizer.Config(path=str(json_folder)).build()
    ids = theirs.encode("some text").ids
    assert found.encode_documents(["some text"]) == [[*([0] if ids[0] == 0 else []), *found.encode("some text"), 1]]
    for add in (False, True):
        found = Tokenizer.Config(path=str(json_folder), add_bos=add, add_eos=add).build()
        assert found.encode_documents(["a"]) == [[*[0] * add, *found.encode("a"), *[1] * add]]
        assert found.encode_prompt("a") == [*[0] * add, *found.encode("a")]


def test_a_tokenizer_without_a_post_processor_goes_by_add_bos_token(json_folder):
    post_processed(json_folder, None)
    for add in (False, True):
        (json_folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "add_bos_token": add}))
        found = Tokenizer.Config(path=str(json_folder)).build()
        assert (found.encode_prompt("a")[0] == 0) is add
    with pytest.raises(UserError, match=r"tokenizer.add_eos is set, and the tokenizer .* names no eos token"):
        Tokenizer.Config(path=str(json_folder), add_eos=True).build()


def test_special_tokens_that_are_written_in_a_document_are_text(json_folder):
    found = Tokenizer.Config(path=str(json_folder)).build()
    ids = found.encode("a<eos>b<bos>")
    assert not {0, 1} & set(ids) and found.decode(ids) == "a<eos>b<bos>"
    [a], [b] = found.encode("a"), found.encode("b")
    assert found.encode_prompt("a<eos>b<bos>") == [0, a, 1, b, 0] and found.encode_prompt("<bos>a") == [0, a]
    assert found.encode("a<eos>b<bos>") == ids


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("<eos>", ""),
        ({"content": "<eos>", "lstrip": False, "__type": "AddedToken"}, ""),
        ({"lstrip": False}, "eos_token.content: expected str, got None"),
        ({"content": 1}, "eos_token.content: expected str, got 1"),
        (["<eos>"], r"eos_token: expected .*, got \['<eos>'\]"),
        (1, "eos_token: expected .*, got 1"),
    ],
)
def test_every_shape_of_a_special_token_is_read_or_refused(json_folder, file, token, said):
    others = {"model_max_length": 1e30, "additional_special_tokens": ["<a>", {"content": "<b>"}], "pad_token": 0}
    (json_folder / file).write_text(json.dumps({"eos_token": token, "chat_template": [{"name": "a"}], **others}))
    if not said:
        assert Tokenizer.Config(path=str(json_folder)).build().eos_id == 1
        return
    with pytest.raises(UserError, match=f"{file}: {said}"):
        Tokenizer.Config(path=str(json_folder)).build()


def test_special_tokens_in_documents_are_such_where_it_is_asked_for(json_folder):
    text, marked = (Tokenizer.Config(path=str(json_folder), allow_special=each).build() for each in (False, True))
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    theirs.no_truncation(), theirs.no_padding()
    assert marked.encode("a<eos>b") == theirs.encode("a<eos>b", add_special_tokens=False).ids != text.encode("a<eos>b")
    assert marked.encode_documents(["<bos>a"]) == [[0, 0, *text.encode("a")]]
    assert marked.fingerprint != text.fingerprint and marked.encode_prompt("a<eos>") == text.encode_prompt("a<eos>")
    assert marked.encode("a<eos>b") == theirs.encode("a<eos>b", add_special_tokens=False).ids


def test_huggingface_tokenizer_with_wrong_files(json_folder, tmp_path):
    (json_folder / "tokenizer_config.json").write_text('{"eos_token": "<missing>"}')
    with pytest.raises(UserError, match="tokenizer_config.json names the token '<missing>'"):
        Tokenizer.Config(path=str(json_folder)).build()
    (json_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not JSON"):
        Tokenizer.Config(path=str(json_folder)).build()
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match="is no tokenizer.json of Hugging Face"):
        Tokenizer.Config(path=str(tmp_path)).build()


def test_huggingface_tokenizer_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package tokenizers: .* pip install './core\[hf\]'"):
        Tokenizer.Config(path=str(tmp_path)).build()


def test_other_sentencepiece_models_encode_as_the_package_does(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "usual")
    (tmp_path / "text").write_text("Some text to train on, with words.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=prefix, vocab_size=290, byte_fallback=True, minloglevel=2,
        model_type="bpe", bos_id=-1,
    )  # fmt: skip
    plain = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    tokenizer = Tokenizer.Config(path=f"{prefix}.model").build()
    assert tokenizer.encode_batch(TRAPS) == plain.encode(TRAPS)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, plain.eos_id())
    assert tokenizer.encode_documents(["words"]) == [[*plain.encode("words"), plain.eos_id()]]
