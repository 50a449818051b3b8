"""Data read by classes outside of core: the same rows on any ranks, after a stop, and told apart between ranks."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data_of_a_user import Chapters, Counting, Faulty, NpyRows, Sums
from toy_run import toy_run, train_until

from core.checkpoint.settings import Checkpoint
from core.config.cli import override
from core.config.errors import UserError
from core.config.help import setting_help
from core.config.record import from_json, located, to_dict, to_json
from core.config.validate import problems_of
from core.data.mixture import Mixture, MixtureSource
from core.data.packing import IGNORE
from core.data.samples import Samples
from core.data.sampling import SPLITS
from core.data.text import IndexedText, StreamedText
from core.data.token_files import TokenFiles
from core.data.tokenizer import Tokenizer
from core.parallel.settings import Parallelism
from core.step.settings import Training
from core.testing.ranks import run_ranks
from core.testing.resume_suite import measured
from core.train.trainer import Trainer
from core.train.validate import Validator

N_ROWS, SEQ_LEN = 24, 16


def stored(path: Path, n_rows: int, seed: int) -> str:
    """A file of rows of tokens."""
    rows = np.random.default_rng(seed).integers(2048, size=(n_rows, SEQ_LEN + 1), dtype=np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)
    return str(path)


def npy_rows(folder: Path) -> NpyRows.Config:
    path, held = stored(folder / "rows.npy", N_ROWS, 0), stored(folder / "held.npy", 5, 1)
    return NpyRows.Config(path=path, validation_path=held)


def a_run(folder: Path, data: Samples.Config) -> Trainer.Config:
    """Four steps of eight rows, and a validation at the end; there is a text to read, and none of it is."""
    run = toy_run(folder)
    run.dataloader = data
    run.training = Training(steps=4, seq_len=SEQ_LEN, local_batch_size=2, global_batch_size=8)
    run.validator = Validator.Config(enable=True)
    run.checkpoint = Checkpoint(enable=True, interval=2)
    return run


def go(text: str, leaves_at: int = 0) -> str:
    """Train the run of this JSON, asked to stop in step `leaves_at`; returns the head that it printed."""
    trainer: Trainer = from_json(text, Trainer.Config, trust=["data_of_a_user"]).build()
    train_until(trainer, leaves_at)
    return trainer.loader.description


@pytest.mark.layout
def test_rows_train_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    data = npy_rows(tmp_path)
    assert go(to_json(a_run(tmp_path / "one", data))) == f"{data.path}: {N_ROWS} rows (train)"
    expected = measured(tmp_path / "one/run")
    assert len(expected) == 4 and expected[-1]["validation_loss"] > 0
    for name, parallelism in {"fsdp": Parallelism(), "tensor": Parallelism(tensor_parallel_degree=2)}.items():
        run = a_run(tmp_path / name, data)
        run.parallelism = parallelism
        run_ranks(go, 2, to_json(run))
        found = measured(tmp_path / name / "run")
        assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in expected], rel=1e-5)
        assert found[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-5)


def mixture(folder: Path) -> Mixture.Config:
    """Rows of two files, of which the one is read once."""
    rows = npy_rows(folder)
    few = replace(npy_rows(folder), path=stored(folder / "few.npy", 9, 2), epochs=1)
    return Mixture.Config(sources=[MixtureSource(data=rows, weight=3.0), MixtureSource(data=few)])


@pytest.mark.parametrize("data", [npy_rows, lambda _: Sums.Config(), mixture], ids=["npy", "sums", "mixture"])
def test_rows_go_on_bit_for_bit(tmp_path: Path, data: Any) -> None:
    go(to_json(a_run(tmp_path / "whole", data(tmp_path))))
    for leaves_at in (3, 0):
        go(to_json(a_run(tmp_path / "again", data(tmp_path))), leaves_at)
    assert measured(tmp_path / "again/run") == measured(tmp_path / "whole/run")


def test_every_rank_of_a_stream_goes_on_where_it_stood(tmp_path: Path) -> None:
    for folder, leaves in ((tmp_path / "whole", [0]), (tmp_path / "again", [3, 0])):
        run = a_run(folder, Counting.Config())
        run.validator.enable = False
        for leaves_at in leaves:
            assert run_ranks(go, 2, to_json(run), leaves_at) == ["rank 0 counts", "rank 1 counts"]
    assert measured(tmp_path / "again/run") == measured(tmp_path / "whole/run")


def test_an_epoch_has_every_row_once(tmp_path: Path) -> None:
    config = npy_rows(tmp_path)
    config.epochs = 2
    samples: NpyRows = config.build(tokenizer=Tokenizer.Config().build(), seq_len=SEQ_LEN, seed=3)
    rows = samples.read(0, samples.n_rows).tokens_BL.tolist()
    there = np.load(config.path)[:, :-1].tolist()
    assert samples.n_rows == 2 * N_ROWS and rows[:N_ROWS] != there != rows[N_ROWS:] != rows[:N_ROWS]
    assert sorted(rows[:N_ROWS]) == sorted(rows[N_ROWS:]) == sorted(there)


def test_labels_that_do_not_count_are_left_out() -> None:
    samples = Sums.Config().build(tokenizer=Tokenizer.Config().build(), seq_len=SEQ_LEN, seed=3)
    batch, same = samples.read(5, 4), samples.read(7, 1)
    assert (batch.labels_BL == IGNORE).sum() == 4 * SEQ_LEN // 2
    assert all(torch.equal(part[2:3], other) for part, other in zip(batch[:4], same[:4], strict=True))


def test_the_end_of_the_data_is_the_last_step(tmp_path: Path) -> None:
    run = a_run(tmp_path, replace(npy_rows(tmp_path), epochs=1))
    trainer = run.build()
    trainer.exit.close()
    assert trainer.last_step == N_ROWS // 8


def told(text: str) -> str:
    """What this rank is told of a file of its own."""
    run = from_json(text, Trainer.Config, trust=["data_of_a_user"])
    if dist.get_rank() == 1:
        stored(Path(run.dataloader.path), N_ROWS, seed=7)
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:  # its machine has the file that both had before
            load = np.load
            patch.setattr(np, "load", lambda path, **how: load(f"{path}.before.npy", **how))
        try:
            run.build()
        except UserError as error:
            return str(error)
    return "built"


def test_ranks_with_other_rows_are_told(tmp_path: Path) -> None:
    run = a_run(tmp_path, npy_rows(tmp_path))
    run.validator.enable = False
    stored(Path(f"{run.dataloader.path}.before.npy"), N_ROWS, seed=0)
    first, second = run_ranks(told, 2, to_json(run))
    assert first == second and "text (train): 24 rows, " in first and "do not agree" in first


def test_rows_that_changed_are_another_run_and_rows_that_moved_are_not(tmp_path: Path) -> None:
    run = a_run(tmp_path, npy_rows(tmp_path))
    run.training.steps = 2
    go(to_json(run))
    run.training.steps = 4
    moved = Path(run.dataloader.path).rename(tmp_path / "moved.npy")
    run.dataloader.path = str(moved)
    trainer = run.build()
    trainer.exit.close()
    assert trainer.checkpoints.start.step == 2 and trainer.checkpoints.start.rows == 16
    stored(moved, N_ROWS, seed=7)
    with pytest.raises(UserError, match="the text or the tokenizer has changed since"):
        run.build()


def refused(data: Samples.Config) -> str:
    tokenizer = Tokenizer.Config().build()
    with pytest.raises((UserError, TypeError)) as error:
        data.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=0).read(0, 2)
    return str(error.value)


def test_files_that_hold_no_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    data = NpyRows.Config(path=str(path), validation_path="held.npy")
    assert refused(data).startswith(f"cannot read {path}: ")
    path.write_bytes(b"")
    assert refused(data).startswith(f"cannot read {path}: ")
    np.save(path, np.zeros((3, SEQ_LEN), np.int32))
    assert refused(data) == f"{path} holds int32 (3, 16), expected whole numbers (rows, 17)"
    np.save(path, np.full((3, SEQ_LEN + 1), 2048, np.int32))
    said = refused(data)
    assert said.startswith(f"{path}: 3 rows (train): rows 0 to 1 hold the id 2,048, and the tokenizer has 2,048: give")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("empty", "faulty: the train split has no row of 16 tokens"),
        ("negative", "faulty: rows 0 to 1 hold the id -1, and the tokenizer has 2,048"),
        ("large", "faulty: rows 0 to 1 hold the id 2,048, and the tokenizer has 2,048"),
        ("labels", "faulty: rows 0 to 1 hold the id 2,048, and the tokenizer has 2,048"),
        ("short", r"Faulty.rows returned tokens_BL of (2, 15) torch.int64, expected (2, 16) torch.int64"),
        ("floats", r"Faulty.rows returned tokens_BL of (2, 16) torch.float32, expected (2, 16) torch.int64"),
    ],
)
def test_rows_that_are_none_are_refused(fault: str, said: str) -> None:
    assert refused(Faulty.Config(fault=fault)).startswith(said)


def test_a_validator_without_rows_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path, TokenFiles.Config(path="tokens.bin", epochs=0))
    assert problems_of(run) == [
        ("dataloader.validation_path", "names no tokens for the validator: give a file, or --validator.no-enable"),
        ("dataloader.epochs", "must be at least 1, or None to repeat without end, not 0"),
    ]
    run = a_run(tmp_path, Counting.Config())
    with pytest.raises(UserError, match="rank 0 counts: held-out rows must have an end, and be had in any order"):
        run.build()


CHAPTERS = [f"# {number}\n\n{'Something happens. ' * (number % 7 + 3)}\n" for number in range(60)]


@pytest.mark.parametrize("kind", [IndexedText, StreamedText])
def test_documents_of_a_format_of_ones_own_are_rows_as_those_of_any_other(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "book").write_text("".join(CHAPTERS))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CHAPTERS))
    live = {"tokenizer": Tokenizer.Config().build(), "seq_len": SEQ_LEN, "seed": 0}
    cache = str(tmp_path / "cache")
    for split in SPLITS:
        lines = kind.Config(dataset=str(tmp_path / "lines.jsonl"), cache_folder=cache).build(split=split, **live)
        config = kind.Config(dataset=Chapters.Config(path=str(tmp_path / "book")), cache_folder=cache)
        book = config.build(split=split, **live)
        assert book.n_rows == lines.n_rows and book.description.startswith(f"{tmp_path}/book: ")
        for part, other in zip(book.read(0, 6)[:4], lines.read(0, 6)[:4], strict=True):
            assert torch.equal(part, other)
    (tmp_path / "book").write_text("".join(CHAPTERS[1:]))
    assert config.build(split=split, **live).fingerprint != book.fingerprint


def test_a_source_is_chosen_and_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = toy_run(tmp_path)
    run.dataloader = IndexedText.Config(dataset=Chapters.Config(path="book"))
    assert to_dict(located(run))["dataloader"]["dataset"] == {
        "class": "data_of_a_user:Chapters",
        "path": f"{tmp_path}/book",
    }
    assert from_json(to_json(run)) == run and problems_of(run) == []
    override(run, [("--dataloader.dataset.path", ["other"])])
    assert run.dataloader == IndexedText.Config(dataset=Chapters.Config(path="other"))
    assert "--dataloader.dataset STR|{[STR [STR ...]]} = Chapters.Config, default stdlib" in setting_help(
        "", run, ["dataloader"], {}
    )
    run.dataloader.text_field = "body"
    assert problems_of(run) == [
        (
            "dataloader.dataset",
            "a Config has text_field, on_bad_line and section_characters of its own, if any: set those",
        )
    ]
    override(run, [("--dataloader.dataset", ["stdlib"])])
    assert run.dataloader == IndexedText.Config(dataset="stdlib", text_field="body")


@pytest.mark.parametrize("kind", [NpyRows, Chapters])
def test_the_document_has_the_classes_that_are_tested(kind: type) -> None:
    text = (Path(__file__).parents[3] / "docs/add-a-data-source.md").read_text(encoding="utf-8")
    assert inspect.getsource(kind) in text
