"""docs/data.md: every line that reads text is read as a run reads it, and finds the documents that lie there."""

import csv
import gzip
import json
import random
import re
import shlex
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import tokenizers

from core.config import cli
from core.config.errors import UserError
from core.config.recipe import load_config
from core.config.validate import validate
from core.data.corpus import Corpus
from core.data.prepare import Preparation
from core.data.text import IndexedText
from core.data.tokenizer import Tokenizer
from core.data.train_tokenizer import TokenizerTraining
from core.testing.document import commands
from core.train.data_checks import check_vocabulary
from qwen3 import configs

DOCUMENT = Path(__file__).parents[3] / "docs/data.md"
COMMANDS = commands(DOCUMENT)
PROGRAMS = {"core.data.prepare": Preparation, "core.data.train_tokenizer": TokenizerTraining}
SECTION = 2**17
"""Characters of a text file that are held out, or not, as one."""
N_SECTIONS = {
    "books/moby-dick.txt": 3,
    "books/short.txt": 1,
    "books/reviews.jsonl": 40,
    "books/**/*.jsonl.gz": 30,
    "books": 3 + 1 + 40 + 30,
    "posts.jsonl": 20,
    "logs.jsonl": 25,
    "posts.parquet": 12,
    "export": 12,
    "hf:roneneldan/TinyStories": 15,
    "hf:allenai/c4:en@train": 15,
    "hf:tables": 15,
    "hf:allenai/c4:en@train#v1": 15,
    "books/reviews.jsonl books/old/*.gz hf:tables": 40 + 30 + 15,
}
"""Documents in everything that the document names, of long ones the sections."""


def story(number: int, words: int = 150) -> str:
    """A document that is like no other, with a whale in every line."""
    draw = random.Random(number)
    made = ("".join(draw.choices(ascii_lowercase, k=draw.randint(2, 7))) for _ in range(words))
    return " ".join("\nwhale" if place % 10 == 0 else word for place, word in enumerate(made))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the document speaks of."""
    place = tmp_path_factory.mktemp("data")
    (place / "books/old").mkdir(parents=True)
    (place / "tables").mkdir()
    (place / "books/moby-dick.txt").write_text(story(0, 60_000)[: 2 * SECTION + 20_000])
    (place / "books/short.txt").write_text(story(1, 2_000))

    def lines(count: int, field: str = "text") -> str:
        return "".join(json.dumps({field: story(number)}) + "\n" for number in range(count))

    (place / "books/reviews.jsonl").write_text(lines(40))
    (place / "books/old/reviews.jsonl.gz").write_bytes(gzip.compress(lines(30).encode()))
    (place / "posts.jsonl").write_text(lines(20, "body"))
    (place / "logs.jsonl").write_text(lines(25) + "no JSON\n")
    (place / "tables/all.jsonl").write_text(lines(15))
    (place / "sheets").mkdir()
    (place / "sheets/tables.xlsx").write_text("never read\n")
    rows = {"body": [story(number) for number in range(12)]}
    parquet.write_table(pyarrow.table(rows), place / "posts.parquet")
    (place / "export").mkdir()
    with (place / "export/all.data").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in rows["body"])])
    stated = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    for name, text in zip(("tokens", "sets", "mixture", "chat"), stated, strict=True):
        (place / f"{name}.json").write_text(text)
    (place / "tokens").mkdir()
    for name in ("train", "val"):
        ids = Tokenizer.Config().build().encode(story(3, 3_000))
        np.array(ids, "<u2").tofile(place / f"tokens/{name}.bin")
    (place / "Qwen3-0.6B").mkdir()
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    pieces.train_from_iterator([story(2)], trainer)
    pieces.save(str(place / "Qwen3-0.6B/tokenizer.json"))
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    (place / "Qwen3-0.6B/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    talk = [{"messages": [{"role": "assistant", "content": story(number, 40)}]} for number in range(200)]
    (place / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    return place


@pytest.fixture(autouse=True)
def there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, a cache of its own, and Hugging Face as far as the lines need it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, asked = datasets.load_dataset_builder, {("roneneldan/TinyStories", None), ("allenai/c4", "en")}

    def builder(name: str, config: str | None, revision: str | None) -> Any:
        assert revision in (None, "v1")
        local = name if (name, config) not in asked else str(folder / "tables")
        return real(local, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    if not (folder / "my.model").exists():
        (words,) = [words for words in COMMANDS if words[2] == "core.data.train_tokenizer"]
        cli.run(TokenizerTraining.Config(), words[3:])


def name_of(words: list[str]) -> str:
    return shlex.join(words[2:])


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[2] == "qwen3.train"], ids=name_of)
def test_a_run_reads(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[:2] == ["python", "-m"]
    own, settings = cli.own_flags(cli.split_flags(words[3:]), cli.RUN_OPTIONS)
    run: Any = load_config(own["config"], configs)
    cli.override(run, settings)
    dataset = getattr(run.dataloader, "dataset", None)
    if dataset == "stdlib":
        monkeypatch.delenv("XDG_CACHE_HOME")  # all that train on it share one
    validate(run)
    tokenizer = run.tokenizer.build()
    check_vocabulary(tokenizer, run.model.vocab_size)
    splits = ("train", "validation") if run.validator.enable else ("train",)
    if run.validator.datasets:
        live = {"tokenizer": tokenizer, "seq_len": 32, "seed": 0}
        assert [data.held_out().build(**live).n_rows > 0 for data in run.validator.datasets.values()] == [True, True]
    loaders = {
        split: run.dataloader.build(tokenizer=tokenizer, seq_len=run.training.seq_len, seed=0, split=split)
        for split in splits
    }
    train = loaders["train"]
    tokens_BL = train.read(0, run.training.local_batch_size).tokens_BL
    assert tokens_BL.shape == (run.training.local_batch_size, run.training.seq_len)
    if dataset == "stdlib":
        return
    assert "whale" in tokenizer.decode(tokens_BL[0].tolist())
    assert train.n_rows is None or train.n_rows >= run.training.steps * run.training.local_batch_size
    if type(run.dataloader) is IndexedText.Config:
        extents = Corpus(run.dataloader, tokenizer=tokenizer).manifest.splits
        assert (
            sum(extent.sections for extent in extents.values())
            == N_SECTIONS[" ".join([dataset] if isinstance(dataset, str) else dataset)]
        )


def test_the_lines_name_everything_that_is_read() -> None:
    flags = [dict(cli.split_flags(words[3:])) for words in COMMANDS]
    trained = {" ".join(each["--dataloader.dataset"]) for each in flags if "--dataloader.dataset" in each}
    assert trained == set(N_SECTIONS)
    assert {words[2] for words in COMMANDS} == {"qwen3.train", *PROGRAMS}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[2] in PROGRAMS], ids=name_of)
def test_a_program_prepares(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(PROGRAMS[words[2]].Config(), words[3:])
    if words[2] == "core.data.prepare":
        lines = capsys.readouterr().out.splitlines()
        name, folder, *splits = [line for line in lines if "long documents" not in line]
        written = [splits.pop() for line in splits[::-1] if line.endswith(" and .idx")]
        assert len(written) == 2 * ("megatron" in words)
        assert name.startswith("books with SentencePiece, 600 tokens") and Path(folder, "manifest.json").exists()
        assert "--cache-folder" not in words or Path(folder).is_relative_to(Path("shared").absolute())
        assert sum(int(line.split()[1].replace(",", "")) for line in splits) >= N_SECTIONS["books"] - 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataloader.dataset books/short.txt", "the validation split has 0 tokens"),
        ("--dataloader.dataset logs.jsonl", "logs.jsonl:26: not JSON"),
        ("--dataloader.dataset sheets", "sheets holds 1 .xlsx, and what is read ends in"),
        ("--dataloader.dataset sheets/tables.xlsx", "cannot tell what sheets/tables.xlsx holds"),
        ("--dataloader.dataset posts.jsonl", "no field 'text'; there are: 'body'"),
        ("--dataloader.dataset books --tokenizer.path Qwen3-0.6B --model.vocab_size 300", "--model.vocab_size 4"),
    ],
)
def test_what_the_document_says_is_refused(words: str, message: str) -> None:
    run: Any = load_config(["qwen3_debug"], configs)
    cli.override(run, cli.split_flags(words.split()))
    with pytest.raises(UserError, match=re.escape(message)):
        tokenizer = run.tokenizer.build()
        check_vocabulary(tokenizer, run.model.vocab_size)
        run.dataloader.build(tokenizer=tokenizer, seq_len=256, seed=0, split="validation")
