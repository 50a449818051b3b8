"""Validation on sets of one's own, and of the sources of a mixture: the losses in the record."""

import json
from pathlib import Path

import pytest
import torch
from toy_run import toy_run

from core.config.validate import problems_of
from core.data.mixture import Mixture, MixtureSource
from core.data.packing import IGNORE
from core.data.text import IndexedText
from core.train.validate import Validator


def test_sets_have_their_losses_in_the_record(tmp_path: Path) -> None:
    run = toy_run(tmp_path, steps=2)
    for name, n in (("one", 30), ("two", 90)):
        lines = [json.dumps({"text": f"{name} {i} " * 9}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    text, cache = run.dataloader, str(tmp_path / "cache")
    other = IndexedText.Config(dataset=str(tmp_path / "two.jsonl"), cache_folder=cache, validation_fraction=0.2)
    sources = [MixtureSource(data=text, name="verses"), MixtureSource(data=other, weight=3)]
    run.dataloader = Mixture.Config(sources=sources)
    one = IndexedText.Config(dataset=str(tmp_path / "one.jsonl"), cache_folder=cache)
    run.validator = Validator.Config(enable=True, freq=2, datasets={"one": one, "mixed": run.dataloader})
    trainer = run.build()
    record = trainer.run().record
    assert record is not None
    sets = {"one": trainer.loaders["validation/one"], "mixed": trainer.loaders["validation/mixed"]}
    assert sets["one"].fingerprint != one.build(tokenizer=trainer.tokenizer, seq_len=16, seed=0).fingerprint
    sums = {}
    for name, loader in sets.items():
        batch = loader.read(0, loader.n_rows)
        with torch.no_grad():
            sums[name] = (trainer.objective(batch).main.item(), int((batch.labels_BL != IGNORE).sum()))
    assert record.numbers["validation/one/loss"] == pytest.approx(sums["one"][0] / sums["one"][1], abs=1e-5)
    expected = sum(loss for loss, _ in sums.values()) / sum(n for _, n in sums.values())
    assert record.validation_loss == pytest.approx(expected, abs=1e-5)
    losses = [record.numbers.pop(f"data/{name}/loss") for name in ("verses", "1")]
    assert min(losses) < record.loss < max(losses)
    assert {key: n for key, n in record.numbers.items() if key.startswith("data/")} == {
        "data/verses/tokens": 2 * 16,
        "data/1/tokens": 6 * 16,
        "data/verses/epochs": 2 / text.build(tokenizer=trainer.tokenizer, seq_len=16, seed=0).rows_per_epoch,
        "data/1/epochs": 6 / other.build(tokenizer=trainer.tokenizer, seq_len=16, seed=0).rows_per_epoch,
    }


def test_sources_of_a_mixture_have_their_losses(tmp_path: Path) -> None:
    run = toy_run(tmp_path, steps=1)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"other {i} " * 9}) + "\n" for i in range(60)))
    other = IndexedText.Config(dataset=str(tmp_path / "b.jsonl"), validation_fraction=0.3)
    other.cache_folder = run.dataloader.cache_folder
    run.dataloader = Mixture.Config(sources=[MixtureSource(data=run.dataloader), MixtureSource(data=other, name="b")])
    run.validator = Validator.Config(enable=True)
    trainer = run.build()
    record = trainer.run().record
    assert record is not None and record.validation_loss is not None
    n = [sum(int((trainer.loaders["validation"].read(row, 1).labels_BL != IGNORE).sum()) for row in rows)
         for rows in trainer.loaders["validation"].parts_of_rows.values()]  # fmt: skip
    losses = [record.numbers[f"validation/{name}/loss"] for name in ("0", "b")]
    assert record.validation_loss == pytest.approx((n[0] * losses[0] + n[1] * losses[1]) / sum(n), abs=1e-5)


def test_names_of_sets_are_checked() -> None:
    config = Validator.Config(datasets={name: IndexedText.Config() for name in ("a/b", "", "c")})
    assert [path for path, _ in problems_of(config)] == ["datasets", "datasets"]
