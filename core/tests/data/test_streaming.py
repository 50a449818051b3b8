import json
from itertools import islice

import pytest
import torch

from core.config.errors import UserError
from core.data import streaming
from core.data.packing import IGNORE, Batch, joined_batches
from core.data.sampling import held_out
from core.data.text import IndexedText, StreamedText

TEXTS = [f"Document {i} {'says something ' * (i * i % 11)}and ends.\n" for i in range(60)]
SEQ_LEN = 16


@pytest.fixture
def config(tmp_path) -> StreamedText.Config:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return StreamedText.Config(dataset=str(path), validation_fraction=0.2)


@pytest.fixture
def build(config, tokenizer):
    def build(split="train", **live) -> StreamedText:
        return config.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=0, split=split, **live)

    return build


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def endless(tokenizer, rank=0, n_ranks=1):
    """(token, whether it opens a document) of one rank, for ever, from the texts."""
    held = held_out(0, len(TEXTS), 0.2)
    while True:
        for i, text in enumerate(TEXTS):
            if not held[i] and i % n_ranks == rank:
                yield from ((token, place == 0) for place, token in enumerate(tokenizer.encode_documents([text])[0]))


@pytest.mark.parametrize(("rank", "n_ranks"), [(0, 1), (0, 3), (2, 3)])
def test_documents_in_order_over_several_epochs(build, tokenizer, rank, n_ranks):
    loader = build(rank=rank, n_ranks=n_ranks)
    assert loader.n_rows is None and loader.rows_per_epoch is None
    n = 120
    batch = joined_batches([loader.read(i, 6) for i in range(0, n, 6)])
    expected = list(islice(endless(tokenizer, rank, n_ranks), n * SEQ_LEN + 1))
    assert batch.tokens_BL.flatten().tolist() == [token for token, _ in expected[:-1]]
    assert batch.labels_BL.flatten().tolist() == [IGNORE if opens else token for token, opens in expected[1:]]
    restarts = [opens or i % SEQ_LEN == 0 for i, (_, opens) in enumerate(expected[:-1])]
    assert (batch.positions_BL.flatten() == 0).tolist() == restarts


def test_state_goes_on_exactly(build):
    whole = build()
    batches = [whole.read(i, 3) for i in range(0, 150, 3)]
    loader = build()
    for i in range(50):
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["position"] == 3 * i
        loader = build()  # a new process
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert same(loader.read(3 * i, 3), batches[i])
    assert loader.state_dict()["epoch"] > 0


def test_state_of_a_used_loader_is_replaced(build):
    loader, other = build(), build()
    other.read(0, 10)
    state = other.state_dict()
    expected = other.read(10, 5)
    loader.read(0, 33)
    loader.load_state_dict(state)
    assert same(loader.read(10, 5), expected)


def test_only_the_next_sample_can_be_read(build):
    loader = build()
    loader.read(0, 4)
    for first in (0, 3, 5):
        with pytest.raises(UserError, match=f"sample {first} was asked of a stream that stands at sample 4.*indexed"):
            loader.read(first, 1)
    loader.read(4, 1)


def test_state_of_other_ranks_or_classes_is_refused(build, config, tokenizer):
    state = build(rank=1, n_ranks=2).state_dict()
    for live in ({"rank": 0, "n_ranks": 2}, {"rank": 1, "n_ranks": 4}, {}):
        with pytest.raises(UserError, match=r"saved by rank 1 of 2, this is rank \d of \d: go on with 2 data ranks"):
            build(**live).load_state_dict(state)
    with pytest.raises(UserError, match="saved by another class of dataloader"):
        build().load_state_dict({})
    with pytest.raises(UserError, match="saved by another class of dataloader"):
        IndexedText.Config(dataset=config.dataset).build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=0).load_state_dict(
            state
        )


def test_validation_is_what_training_leaves_out(build, tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "RESERVED", 30)
    held = [i for i in range(30) if held_out(0, 30, 0.2)[i]]
    loader = build("validation")
    flat = [token for ids in tokenizer.encode_documents([TEXTS[i] for i in held]) for token in ids]
    assert loader.n_rows == (len(flat) - 1) // SEQ_LEN
    assert loader.read(0, loader.n_rows).tokens_BL.flatten().tolist() == flat[: loader.n_rows * SEQ_LEN]
    assert same(loader.read(1, 1), loader.read(1, 1)) and loader.state_dict() == {}
    loader.load_state_dict({})
    train = tokenizer.decode(build().read(0, 130).tokens_BL.flatten().tolist())
    for i in range(60):
        assert (f"Document {i} " in train) == (i not in held)


def test_rank_without_documents(build, config):
    config.validation_fraction = 0.0
    build(rank=59, n_ranks=60).read(0, 3)
    loader = build(rank=60, n_ranks=61)
    with pytest.raises(UserError, match="no training text for rank 60 of 61: use fewer ranks"):
        loader.read(0, 1)


def test_stream_keeps_no_cache(build, tmp_path):
    loader = build()
    loader.read(0, 5)
    build("validation")
    assert not (tmp_path / "cache").exists()
    assert loader.description.endswith("set.jsonl: streamed, rank 0 of 1 (train)")


def test_a_state_that_is_none_is_refused(build):
    loader = build()
    loader.read(0, 10)
    state = loader.state_dict()
    assert state["document"] > 0 and state["offset"] > 0
    changes = [("position", -1), ("epoch", 2**70), ("document", "3"), ("offset", 1.0), ("rank", None), ("more", 3)]
    lies = [{**state, key: value} for key, value in changes] + [{"position": 3}]
    for lie in lies:
        with pytest.raises(UserError, match="the saved state of the stream is none: "):
            build().load_state_dict(lie)
    for lie in ({"offset": 10**6}, {"document": 10**6}, {"document": held_out(0, 60, 0.2).argmax().item()}):
        with pytest.raises(UserError, match="the text has changed since the place was saved"):
            build().load_state_dict({**state, **lie})
    loader.load_state_dict(state)
    assert loader.state_dict() == state


def test_a_tokenizer_that_makes_nothing_of_a_text_is_named(build, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode_sections", lambda sections: [[] for _ in sections])
    with pytest.raises(UserError, match="no training text for rank 0 of 1"):
        build().read(0, 1)


def test_a_text_that_changes_between_epochs_ends_the_stream(build, config):
    loader = build()
    loader.read(0, 3)
    with open(config.dataset, "a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match=r"set\.jsonl has changed since the run began to read"):
        loader.read(3, 1000)
