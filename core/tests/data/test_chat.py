"""Rows of conversations: what counts in them, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import tokenizers
import torch

from core.config.errors import UserError
from core.config.record import from_dict, to_dict
from core.config.validate import problems_of, validate
from core.data.chat import Chat
from core.data.mixture import Mixture, MixtureSource
from core.data.packing import IGNORE, PADDING, Batch
from core.data.samples import Samples
from core.data.text import IndexedText
from core.data.tokenizer import Tokenizer
from core.step.settings import Training

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SPECIAL = ["<begin>", "<s>", "<u>", "<a>", "</>"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each character, and special ones of a template without blocks."""
    folder = tmp_path_factory.mktemp("words")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([""], tokenizers.trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    made.add_special_tokens(SPECIAL)
    begin = ("<begin>", made.token_to_id("<begin>"))
    made.post_processor = tokenizers.processors.TemplateProcessing("<begin> $A", special_tokens=[begin])
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<begin>", "eos_token": "</>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.Config(path=str(folder)).build()


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def built(words: Tokenizer, dataset: str, seq_len: int = 23, split: str = "train", **settings: Any) -> Chat:
    config = Chat.Config(dataset=dataset, **{"validation_fraction": 0.0, "shuffle": False, **settings})
    validate(config)
    return config.build(tokenizer=words, seq_len=seq_len, seed=3, split=split)


def shown(words: Tokenizer, batch: Batch) -> list[tuple[str, str]]:
    """Every document of the rows, and what counts of it, with special tokens written out."""
    names = {words.templating._tokenizer.token_to_id(token): token for token in SPECIAL}

    def text(ids: list[int]) -> str:
        return "".join(names.get(token) or words.decode([token]) for token in ids)

    found = []
    for tokens, labels, numbers in zip(batch.tokens_BL, batch.labels_BL, batch.documents_BL, strict=True):
        for number in range(int(numbers.max()) + 1):
            own = numbers == number
            counted = labels[own]
            found.append((text(tokens[own].tolist()), text(counted[counted != IGNORE].tolist())))
    return found


def test_the_assistant_counts_and_padding_does_not(tmp_path: Path, words: Tokenizer) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": turns("hi", "yes", "so", "no")}, {"messages": turns("q", "ok")}])
    samples = built(words, path, seq_len=29)
    assert samples.rows_per_epoch == 1 and "2 documents" in samples.description
    assert samples.description.endswith(f", {6 / 30:.1%} padding")
    found = shown(words, samples.read(0, 1))
    assert [each for each in found if each[1]] == [
        ("<u>hi</><a>yes</><u>so</><a>no</>", "yes</>no</>"),
        ("<u>q</><a>ok</>", "ok</>"),
    ]
    whole = shown(words, built(words, path, seq_len=29, loss="all").read(0, 1))
    assert ("<u>q</><a>ok</>", "q</><a>ok</>") in whole


def test_a_long_conversation_is_cut_behind_a_turn(tmp_path: Path, words: Tokenizer, logged: list[str]) -> None:
    rows = [{"messages": turns("a", "b", "c", "long answer")}, {"messages": turns("x" * 30, "y")}]
    samples = built(words, lines(tmp_path / "a.jsonl", rows), seq_len=11)
    assert [each for each in shown(words, samples.read(0, 1)) if each[1]] == [("<u>a</><a>b</>", "b</>")]
    (said,) = [line for line in logged if "left out" in line]
    assert said.endswith(
        f"left out 1 conversations; the first: {tmp_path}/a.jsonl:2: no turn of it fits into 12 tokens"
    )


def test_pairs_count_behind_the_prompt(tmp_path: Path, words: Tokenizer) -> None:
    texts = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "<u>", "completion": "</>"}]
    lists = {"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    found = shown(words, built(words, lines(tmp_path / "a.jsonl", [*texts, lists]), seq_len=39).read(0, 1))
    assert [each for each in found if each[1]] == [
        ("<begin>1+1=2</>", "2</>"),
        ("<begin><u></></>", "</></>"),
        ("<u>a</><a>b</><u>c</><a>d</>", "d</>"),
    ]


def test_tables_hold_conversations_too(tmp_path: Path, words: Tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    rows = [turns("a", "b"), [*turns("c"), call]]
    (tmp_path / "all").mkdir()
    parquet.write_table(pyarrow.table({"messages": rows, "id": [1, 2]}), tmp_path / "all/a.parquet")
    with (tmp_path / "all/b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "id", "completion"], ["p", 7, "c"]])
    found = shown(words, built(words, str(tmp_path / "all"), seq_len=29).read(0, 1))
    assert [each for each in found if each[1]] == [
        ("<u>a</><a>b</>", "b</>"),
        ("<u>c</><a>f</>", "f</>"),
        ("<begin>pc</>", "c</>"),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [], "rejected": []}, r"a.jsonl:2 holds preference pairs \(chosen, rejected\), and nothing here"),
        ({"text": "x"}, "a.jsonl:2: no field 'messages', and no prompt and completion; there are: 'text'"),
        ([1], "a.jsonl:2: expected an object with messages, got a value of type list"),
        ({"messages": "x"}, "a.jsonl:2: the field 'messages' must hold a list of messages, not str"),
        ({"messages": []}, "a.jsonl:2: the field 'messages' must hold a list of messages, not an empty one"),
        ({"messages": [{"content": "x"}]}, "a.jsonl:2: message 1 in 'messages' must be an object with a role"),
        ({"messages": turns("only asked")}, "a.jsonl:2: the assistant has no turn in it, so that nothing counts"),
        ({"prompt": "x", "completion": []}, "a.jsonl:2: prompt and completion must both be texts, or both lists"),
        ({"messages": [{"role": 3}]}, "a.jsonl:2: message 1 in 'messages' must be an object with a role"),
        ({"messages": turns("a\ufdd1", "b")}, r"a.jsonl:2: a message holds the noncharacter U\+FDD1"),
        ({"messages": turns("a\ud800", "b")}, "a.jsonl:2: holds half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_one_line_or_counted(
    row: Any, said: str, tmp_path: Path, words: Tokenizer, logged: list[str]
) -> None:
    path = lines(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}, row])
    with pytest.raises(UserError, match=said):
        built(words, path)
    if isinstance(row, dict) and "chosen" in row:
        return
    samples = built(words, path, on_bad_line="skip")
    assert "1 documents" in samples.description
    assert any("left out 1 unreadable lines; the first: " in line for line in logged)


def test_rows_are_a_function_of_their_numbers(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"messages": turns("q" * (number % 7), "a" * (1 + number % 11))} for number in range(200)]
    path = lines(tmp_path / "a.jsonl", rows)
    whole = built(words, path, shuffle=True, validation_fraction=0.1)
    n, batch = whole.rows_per_epoch, whole.read(0, 3 * whole.rows_per_epoch)
    again = built(words, path, shuffle=True, validation_fraction=0.1)
    for first in (0, 1, n - 1, n, 2 * n + 3):
        assert all(
            torch.equal(a[first : first + 2], b) for a, b in zip(batch[:4], again.read(first, 2)[:4], strict=True)
        )
    epochs = [sorted(map(tuple, batch.tokens_BL[e * n : (e + 1) * n].tolist())) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and not torch.equal(batch.tokens_BL[:n], batch.tokens_BL[n : 2 * n])
    held = built(words, path, split="validation", validation_fraction=0.1)
    assert held.n_rows and held.fingerprint != whole.fingerprint


def test_documents_are_kept_apart_unless_it_is_said_otherwise() -> None:
    chat, text = Chat.Config(), IndexedText.Config()
    mixed = Mixture.Config(sources=[MixtureSource(data=text), MixtureSource(data=chat)])
    packed = IndexedText.Config(packing="best_fit")
    assert [Training().mask_of(each) for each in (chat, text, mixed, packed)] == [
        "document", "causal", "document", "document",
    ]  # fmt: skip
    assert Training(mask="causal").mask_of(chat) == "causal"
    assert problems_of(Chat.Config(day="tomorrow", packing="concatenate")) == [
        ("day", "day tomorrow is none: write it as 2026-01-31"),
        ("packing", "conversations are packed whole: leave packing at best_fit"),
    ]
    assert from_dict(to_dict(chat), Samples.Config) == chat


def test_text_is_packed_whole_too(tmp_path: Path, words: Tokenizer) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "x" * n} for n in (3, 20, 2, 8)])
    config = IndexedText.Config(dataset=path, packing="best_fit", validation_fraction=0.0, shuffle=False)
    samples = config.build(tokenizer=words, seq_len=11, seed=0)
    assert samples.n_rows is None and samples.description.endswith(" padding")
    batch = samples.read(0, samples.rows_per_epoch)
    assert int((batch.labels_BL != IGNORE).sum()) == sum(n + 1 for n in (3, 20, 2, 8))
    assert batch.documents_BL.max(1).values.tolist() == [0, 0, 0, 1]
    assert (batch.documents_BL == PADDING).sum(1).tolist() == [11 - n for n in samples.filled.tolist()]


def test_a_text_holds_no_conversations(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("words")
    for dataset in (str(tmp_path / "a.txt"), "stdlib"):
        with pytest.raises(UserError, match="rows"):
            built(words, dataset)
