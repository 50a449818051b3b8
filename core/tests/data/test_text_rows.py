import json
import re
from itertools import accumulate, chain

import pytest
import torch

from core.config.errors import UserError
from core.config.validate import validate
from core.data import shards
from core.data.packing import IGNORE, Batch, joined_batches
from core.data.sampling import held_out
from core.data.text import IndexedText, StreamedText

TEXTS = [f"Document {i} {'says something ' * (i * i % 11)}and ends.\n" for i in range(90)]
SEQ_LEN = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def build(dataset, tokenizer):
    def build(split="train", seq_len=SEQ_LEN, seed=5, **settings) -> IndexedText:
        config = IndexedText.Config(dataset=dataset, validation_fraction=0.2, **settings)
        return config.build(tokenizer=tokenizer, seq_len=seq_len, seed=seed, split=split)

    return build


def stream(tokenizer, split):
    """The token stream of a split, and where documents start in it, from the texts."""
    chosen = held_out(0, len(TEXTS), 0.2) == (split == "validation")
    documents = tokenizer.encode_documents([text for text, c in zip(TEXTS, chosen, strict=True) if c])
    return list(chain.from_iterable(documents)), {0, *accumulate(map(len, documents))}


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def joined(batches: list[Batch]) -> Batch:
    return joined_batches(batches)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shard_tokens", [100, 2**28])
def test_windows_in_order(build, tokenizer, split, shard_tokens, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", shard_tokens)
    loader = build(split, shuffle=False, epochs=1)
    flat, starts = stream(tokenizer, split)
    n = (len(flat) - 1) // SEQ_LEN
    assert loader.n_rows == loader.rows_per_epoch == n
    batch = loader.read(0, n)
    assert batch.tokens_BL.shape == batch.labels_BL.shape == (n, SEQ_LEN)
    assert batch.tokens_BL.flatten().tolist() == flat[: n * SEQ_LEN]
    labels = [IGNORE if place in starts else flat[place] for place in range(1, n * SEQ_LEN + 1)]
    assert batch.labels_BL.flatten().tolist() == labels
    assert batch.positions_BL.max() < SEQ_LEN
    restarts = [t in starts or t % SEQ_LEN == 0 for t in range(n * SEQ_LEN)]
    assert (batch.positions_BL.flatten() == 0).tolist() == restarts


def test_each_epoch_has_every_window_once_in_another_order(build):
    plain = build(shuffle=False, epochs=1)
    loader = build(epochs=3)
    n = plain.n_rows
    assert loader.n_rows == 3 * n
    rows = sorted(plain.read(0, n).tokens_BL.tolist())
    orders = [loader.read(epoch * n, n).tokens_BL.tolist() for epoch in range(3)]
    assert all(sorted(order) == rows for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert build(seed=6).read(0, n).tokens_BL.tolist() != orders[0]


def test_reading_is_pure_and_resuming_is_arithmetic(build):
    first, second = build(), build()
    n = 2 * first.rows_per_epoch + 5
    whole = first.read(0, n)
    for count in (1, 4, 7):
        parts = [second.read(i, min(count, n - i)) for i in reversed(range(0, n, count))]
        assert same(joined(parts[::-1]), whole)
    resumed = build()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert same(resumed.read(30, 9), first.read(30, 9))
    assert same(first.read(0, n), whole)


def test_a_changed_number_of_ranks_reads_the_same_samples(build):
    per_step, steps = 8, 12

    def run(n_ranks):
        loaders = [build() for _ in range(n_ranks)]
        share = per_step // n_ranks
        return joined(
            [
                loader.read(step * per_step + rank * share, share)
                for step in range(steps)
                for rank, loader in enumerate(loaders)
            ]
        )

    assert same(run(1), run(2)) and same(run(1), run(4)) and same(run(1), run(8))


def test_the_last_sample_is_known(build):
    assert build().n_rows is None
    loader = build(epochs=2)
    n = loader.n_rows
    assert n == 2 * loader.rows_per_epoch
    assert loader.read(n - 1, 1).tokens_BL.shape == (1, SEQ_LEN)
    assert loader.read(n, 0).tokens_BL.shape == (0, SEQ_LEN)
    for first, count in ((n, 1), (n - 1, 2), (-1, 1)):
        with pytest.raises(IndexError, match=f"of {n}"):
            loader.read(first, count)


def test_validation_passes_once_in_order_whatever_the_settings(build):
    loader = build("validation", epochs=7)
    assert loader.n_rows == loader.rows_per_epoch
    plain = build("validation", shuffle=False)
    assert same(loader.read(0, loader.n_rows), plain.read(0, plain.n_rows))


def test_splits_share_no_document(build, tokenizer):
    train, validation = (build(split, shuffle=False, epochs=1) for split in ("train", "validation"))
    streams = [loader.read(0, loader.n_rows).tokens_BL.flatten().tolist() for loader in (train, validation)]
    texts = [tokenizer.decode(stream) for stream in streams]
    names = [{f"Document {i} " for i in range(90) if f"Document {i} " in text} for text in texts]
    assert names[0] and names[1] and not names[0] & names[1]
    assert len(names[0] | names[1]) >= 88


def test_corpus_smaller_than_one_window(build, tokenizer):
    flat, _ = stream(tokenizer, "validation")
    assert build("validation", seq_len=len(flat) - 1).n_rows == 1
    needs = rf"validation split has {len(flat)} tokens in \d+ documents, one sample needs {len(flat) + 1}: add text"
    with pytest.raises(UserError, match=f"{needs}.*validation_fraction"):
        build("validation", seq_len=len(flat))
    with pytest.raises(UserError, match=r"the train split has .* needs 1,000,001: add text, shorten the sequence$"):
        build("train", seq_len=1_000_000)


def test_one_document_has_no_validation(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("some words " * 100)
    config = IndexedText.Config(dataset=str(path))
    assert config.build(tokenizer=tokenizer, seq_len=8, seed=0).rows_per_epoch > 1
    with pytest.raises(UserError, match="the validation split has 0 tokens in 0 documents, one sample needs 9"):
        config.build(tokenizer=tokenizer, seq_len=8, seed=0, split="validation")


def test_description(build):
    loader = build()
    assert re.search(r": \d+ documents, [\d.]+k? tokens \(train\), cached in ", loader.description)
    assert "(validation)" in build("validation").description


def test_standard_library_is_the_default(tokenizer, monkeypatch, tmp_path):
    files = [f"a/m{i}.py" for i in range(30)]
    for name in files:
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text("def function():\n    return 1\n" * 9)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    loader = IndexedText.Config().build(tokenizer=tokenizer, seq_len=32, seed=0)
    assert loader.description.startswith("stdlib: ")
    assert loader.rows_per_epoch > 100


def test_settings_are_checked():
    with pytest.raises(UserError) as error:
        validate(StreamedText.Config(shuffle=True, epochs=0, validation_fraction=2.0))
    lines = str(error.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["validation_fraction", "epochs", "shuffle", "epochs"]
    assert "set shuffle to false" in lines[2] and "set epochs to None" in lines[3]
    validate(StreamedText.Config())
    validate(IndexedText.Config(epochs=1))
