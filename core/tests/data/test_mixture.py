"""Rows of mixtures, compared with those of their sources and with counts by hand."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from core.config.errors import UserError
from core.config.record import from_dict, to_dict
from core.config.validate import problems_of
from core.data.mixture import PERIOD, Mixture, MixtureSource, MixtureStage
from core.data.packing import Batch, pack_rows
from core.data.samples import IndexedSamples, Samples
from core.data.text import IndexedText, StreamedText
from core.data.tokenizer import Tokenizer

SEQ_LEN = 4


class Numbers(IndexedSamples):
    """Rows of which each has one token alone: its number behind that of the first."""

    @dataclass(kw_only=True, slots=True)
    class Config(IndexedSamples.Config):
        first: int
        n: int
        n_held: int = 0

        def validation_problems(self) -> Any:
            if not self.n_held:
                yield "n_held", "none are held"

    config: Config

    def open(self) -> None:
        self.first = self.config.first + (0 if self.split == "train" else 1500)
        self.rows_per_epoch = self.config.n if self.split == "train" else self.config.n_held
        self.description, self.fingerprint = f"numbers from {self.config.first}", f"{self.config.first} {self.config.n}"

    def rows_at(self, numbers: np.ndarray) -> Batch:
        tokens = np.repeat(numbers[:, None] + self.first, self.seq_len + 1, 1)
        return pack_rows(tokens, np.zeros(tokens.shape, np.bool_))


def source(first: int, n: int, weight: float, *, held: int = 0, shuffle: bool = False, **more: Any) -> MixtureSource:
    numbers = Numbers.Config(first=first, n=n, n_held=held, shuffle=shuffle, **more)
    return MixtureSource(data=numbers, weight=weight)


def built(tokenizer: Tokenizer, *sources: MixtureSource, split: str = "train") -> Mixture:
    return Mixture.Config(sources=list(sources)).build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=5, split=split)


def read(samples: Samples, first: int, count: int) -> list[int]:
    return samples.read(first, count).tokens_BL[:, 0].tolist()


def test_every_thousand_rows_hold_the_sources_in_their_proportions(tokenizer: Tokenizer) -> None:
    mixture = built(tokenizer, source(0, 50, 0.7), source(100, 333, 0.25), source(500, 7, 0.05))
    owners = np.array([0 if row < 100 else 1 if row < 500 else 2 for row in read(mixture, 0, 3500)])
    for first in (0, 1, 17, 999, 1234, 2500):
        counts = np.bincount(owners[first : first + PERIOD], minlength=3)
        assert counts.tolist() == [700, 250, 50]
    had = np.cumsum(owners[:, None] == np.arange(3), axis=0)
    exact = np.arange(1, 3501)[:, None] * np.array([0.7, 0.25, 0.05])
    assert np.abs(had - exact).max() <= 1.0
    assert mixture.n_rows is None and not mixture.in_order and mixture.state_dict() == {}


def test_each_source_has_its_own_epochs_and_order(tokenizer: Tokenizer) -> None:
    sources = [source(0, 50, 3, shuffle=True), source(100, 333, 1, shuffle=True)]
    rows = read(built(tokenizer, *sources), 0, 2000)
    for part, low, high, n in ((sources[0], 0, 100, 1500), (sources[1], 100, 500, 500)):
        alone = part.data.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=5)
        assert [row for row in rows if low <= row < high] == read(alone, 0, n)


def test_a_row_is_a_function_of_its_number(tokenizer: Tokenizer) -> None:
    def a_mixture() -> Mixture:
        return built(tokenizer, source(0, 30, 0.6, epochs=3, shuffle=True), source(100, 40, 0.4, shuffle=True))

    mixture = a_mixture()
    whole = read(mixture, 0, 1300)
    for count in (1, 7, 64):
        assert [row for i in range(0, 1300 - count, count) for row in read(a_mixture(), i, count)] == whole[
            : len(range(0, 1300 - count, count)) * count
        ]
    batch, single = mixture.read(137, 5), mixture.read(139, 1)
    assert all(torch.equal(part[2:3], other) for part, other in zip(batch[:4], single[:4], strict=True))


def test_where_a_source_ends_the_others_go_on(tokenizer: Tokenizer) -> None:
    mixture = built(tokenizer, source(0, 30, 0.5, epochs=2), source(100, 40, 0.25, epochs=1), source(200, 9, 0.25))
    rows = read(mixture, 0, 2000)
    assert [row for row in rows if row < 100] == [*range(30)] * 2
    assert [row for row in rows if 100 <= row < 200] == [*range(100, 140)]
    first, second = (phase.first for phase in mixture.phases[1:])
    assert rows.index(29, 60) + 1 == first and 118 <= first <= 121 and second == rows.index(139) + 1
    between = rows[first:second]
    assert abs(sum(row < 200 for row in between) - len(between) / 2) <= 1 and set(rows[second:]) == {*range(200, 209)}
    over = "; 0 ends in step {}, and the others go on; 1 ends in step {}, and the others go on"
    assert mixture.description.endswith(over.format(first, second))
    config = replace(mixture.config)
    in_steps = config.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=5, rows_per_step=7)
    assert in_steps.description.endswith(over.format(-(-first // 7), -(-second // 7)))
    assert mixture.epochs_by_source(1000) == {"0": 2.0, "1": 1.0, "2": (1000 - 100) / 9}
    ends = built(tokenizer, source(0, 30, 1, epochs=2), source(100, 40, 3, epochs=1))
    assert ends.n_rows == 100 and sorted(read(ends, 0, 100)) == sorted([*range(30), *range(30), *range(100, 140)])
    with pytest.raises(IndexError, match="of 100"):
        ends.read(100, 1)


def test_weights_change_at_steps(tokenizer: Tokenizer) -> None:
    sources = [source(0, 50, 1), source(100, 333, 1), source(500, 60, 1, epochs=1)]
    stages = [MixtureStage(step=101, weights=[0, 9, 1]), MixtureStage(step=301, weights=[1, 0, 0])]
    config = Mixture.Config(sources=sources, schedule=stages)
    assert problems_of(config) == []
    mixture = config.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=5, rows_per_step=3)
    rows = read(mixture, 0, 2000)
    owners = np.array([0 if row < 100 else 1 if row < 500 else 2 for row in rows])
    ends = rows.index(559)  # the last row of the third source, which has one epoch
    assert np.abs(np.bincount(owners[:150], minlength=3) - 50).max() <= 1
    assert set(owners[300:900]) == {1} and set(owners[900:]) == {0} and ends < 300
    counted = {name: SEQ_LEN * n for name, n in zip("012", np.bincount(owners[:1234]).tolist(), strict=True)}
    assert mixture.tokens_by_source(1234) == counted and "other weights from step 101" in mixture.description
    assert [row for row in rows if 100 <= row < 500] == [100 + n % 333 for n in range(sum(owners == 1))]
    assert read(mixture, 250, 700) == rows[250:950]
    late = Mixture.Config(sources=sources[:2], schedule=[MixtureStage(step=2, weights=[1, 0])])
    late.sources[0] = source(0, 50, 1, epochs=1)
    assert late.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=5, rows_per_step=10).n_rows == 5 + 50


def test_weights_change_at_steps_of_another_size_too(tokenizer: Tokenizer) -> None:
    """A run that goes on with another batch size had the rows that it had, and changes weights where it says."""
    stages = [MixtureStage(step=101, weights=[0, 1]), MixtureStage(step=201, weights=[1, 0])]
    config = Mixture.Config(sources=[source(0, 50, 1), source(100, 60, 1)], schedule=stages)
    live: dict[str, Any] = {"tokenizer": tokenizer, "seq_len": SEQ_LEN, "seed": 5}
    before = read(config.build(**live, rows_per_step=3), 0, 700)
    for step in (50, 150):
        mixture = config.build(**live, rows_per_step=6)
        mixture.go_on(step, 3 * step)
        assert read(mixture, 0, 3 * step) == before[: 3 * step]
        first = 150 + 6 * 50 if step == 50 else 300  # of step 101
        second = 150 + 6 * 150 if step == 50 else 450 + 6 * 50  # of step 201
        assert set(owner >= 100 for owner in read(mixture, first, second - first)) == {True}
        assert set(owner >= 100 for owner in read(mixture, second, 100)) == {False}
        assert abs(sum(owner >= 100 for owner in read(mixture, 0, first)) - first / 2) <= 1
    with pytest.raises(UserError, match="151 rows in 50 steps were not equally many in each"):
        mixture.go_on(50, 151)
    Mixture.Config(sources=config.sources).build(**live).go_on(50, 151)


def test_schedules_that_are_none_are_refused() -> None:
    config = Mixture.Config(sources=[source(0, 9, 1), source(9, 9, 1)])
    for stages, where in (
        ([MixtureStage(step=1, weights=[1, 1])], "schedule.0.step"),
        ([MixtureStage(step=5, weights=[1, 1]), MixtureStage(step=5, weights=[1, 1])], "schedule.1.step"),
        ([MixtureStage(step=5, weights=[1])], "schedule.0.weights"),
        ([MixtureStage(step=5, weights=[0, 0])], "schedule.0.weights"),
        ([MixtureStage(step=5, weights=[1, -1])], "schedule.0.weights"),
        ([MixtureStage(step=5, weights=[1, 1e-6])], "schedule.0.weights"),
    ):
        config.schedule = stages
        assert [path for path, _ in problems_of(config)] == [where]
    config.schedule, config.sources[1].name = [], "0"
    assert problems_of(config) == [("sources", "two sources have the name 0: the record could not tell them apart")]


def test_validation_is_that_of_all_sources_that_have_one(tokenizer: Tokenizer) -> None:
    sources = [source(0, 30, 1, held=3), source(50, 30, 1), source(100, 30, 5, held=2)]
    held = built(tokenizer, *sources, split="validation")
    assert held.n_rows == 5 and read(held, 0, 5) == [1500, 1501, 1502, 1600, 1601] and read(held, 2, 2) == [1502, 1600]
    assert held.parts_of_rows == {"0": range(3), "2": range(3, 5)}
    config = Mixture.Config(sources=sources)
    whole = config.held_out().build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=5)
    assert whole.n_rows == 90 and sorted(read(whole, 0, 90)) == sorted([*range(30), *range(50, 80), *range(100, 130)])
    assert list(config.validation_problems()) == []
    config.sources = [source(0, 30, 1), source(50, 30, 1)]
    assert [name for name, _ in config.validation_problems()] == ["sources.0.data.n_held", "sources.1.data.n_held"]


def test_mixtures_that_are_none_are_refused(tokenizer: Tokenizer) -> None:
    assert problems_of(Mixture.Config()) == [("sources", "a mixture has at least one source")]
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        said = f"weight {weight} must be above 0, and finite: leave the source out"
        config = Mixture.Config(sources=[source(0, 9, 1), source(9, 9, weight)])
        assert problems_of(config) == [("sources.1.weight", said)]
    few = Mixture.Config(sources=[source(0, 9, 1), source(9, 9, 0.0002)])
    assert problems_of(few) == [("sources.1.weight", "a share of 0.0002 is no row in 1,000: raise it")]
    below = Mixture.Config(sources=[source(0, 9, 1, epochs=0)])
    assert [path for path, _ in problems_of(below)] == ["sources.0.data.epochs"]


def test_a_stream_is_refused(tmp_path: Any, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("some words " * 100)
    stream = MixtureSource(data=StreamedText.Config(dataset=str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match=r"a\.txt: streamed, .*: a mixture reads rows by their numbers"):
        built(tokenizer, stream)


def test_a_file_states_it_in_few_words() -> None:
    stated = {
        "class": "core.data.mixture:Mixture",
        "sources": [{"data": {"dataset": "books"}, "weight": 3}, {"data": {"dataset": "code", "epochs": 2}}],
    }
    flat = stated | {"sources": [{"dataset": "books", "weight": 3}, {"dataset": "code", "max_epochs": 2}]}
    config = from_dict(stated, Samples.Config, say=lambda _: None)
    assert from_dict(flat, Samples.Config, say=lambda _: None) == config
    assert config == Mixture.Config(
        sources=[
            MixtureSource(data=IndexedText.Config(dataset="books"), weight=3.0),
            MixtureSource(data=IndexedText.Config(dataset="code", epochs=2)),
        ]
    )
    assert from_dict(to_dict(config)) == config
