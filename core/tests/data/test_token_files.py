"""Rows of tokens that other programs wrote, compared with lists of the same tokens."""

import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config.errors import UserError
from core.config.validate import problems_of
from core.data.corpus import Corpus
from core.data.megatron import write_megatron as write_stream
from core.data.packing import IGNORE
from core.data.prepare import Preparation
from core.data.sampling import SPLITS
from core.data.shards import TokenStream
from core.data.token_files import TokenFiles
from core.data.tokenizer import Tokenizer

SEQ_LEN = 16
CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}
Sequences = list[list[int]]


def drawn(seed: int, most: int = 2048) -> Sequences:
    """Sequences of tokens, of which one is empty; none is the tokenizer's end."""
    draw = np.random.default_rng(seed)
    return [draw.integers(3, most, size=n).tolist() for n in (1, 40, 0, 7, 16, 17, 90)]


def write_megatron(path: Path, sequences: Sequences, documents: list[int], dtype: str = "<u2", modes: int = 0) -> None:
    """As megatron-core's IndexedDatasetBuilder does; `documents` has the first sequence of each, and the end."""
    lengths = [len(each) for each in sequences]
    places = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    path.with_suffix(".bin").write_bytes(np.array(list(chain(*sequences)), dtype).tobytes())
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(documents))
    parts = [np.array(lengths, "<i4"), np.array(places, "<i8"), np.array(documents, "<i8")]
    modes_part = bytes(modes * len(lengths))
    path.with_suffix(".idx").write_bytes(head + b"".join(part.tobytes() for part in parts) + modes_part)


def write_llm_c(path: Path, ids: list[int], dtype: str = "<u2") -> None:
    head = np.zeros(256, "<i4")
    head[:3] = {"<u2": 20240520, "<u4": 20240801}[dtype], 1, len(ids)
    path.write_bytes(head.tobytes() + np.array(ids, dtype).tobytes())


def opened(tokenizer: Tokenizer, path: Path | str, **settings: Any) -> TokenFiles:
    config = TokenFiles.Config(path=str(path), shuffle=False, epochs=1, **settings)
    return config.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=0)


def check(samples: TokenFiles, ids: list[int], starts: set[int]) -> None:
    """All rows are those of the ids, of which documents begin at `starts`."""
    n = (len(ids) - 1) // SEQ_LEN
    assert samples.n_rows == samples.rows_per_epoch == n
    batch = samples.read(0, n)
    assert batch.tokens_BL.flatten().tolist() == ids[: n * SEQ_LEN]
    labels = [IGNORE if place in starts else ids[place] for place in range(1, n * SEQ_LEN + 1)]
    assert batch.labels_BL.flatten().tolist() == labels
    restarts = [place in starts or place % SEQ_LEN == 0 for place in range(n * SEQ_LEN)]
    assert (batch.positions_BL.flatten() == 0).tolist() == restarts


@pytest.mark.parametrize("modes", [0, 1])
@pytest.mark.parametrize("dtype", CODES)
def test_megatron(tmp_path: Path, tokenizer: Tokenizer, dtype: str, modes: int) -> None:
    sequences = drawn(0, most=min(2048, np.iinfo(dtype).max))
    write_megatron(tmp_path / "a", sequences, [0, 2, 3, 6, 7], dtype, modes)
    ids = list(chain(*sequences))
    for path in ("a", "a.bin", "a.idx", ""):
        check(opened(tokenizer, tmp_path / path), ids, {0, 41, 41 + 7 + 16 + 17})


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # megatron-core's call
def test_its_own_writer_writes_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    import torch

    sequences = drawn(1)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for first, end in ((0, 2), (2, 3), (3, 7)):
        builder.add_document(torch.tensor(list(chain(*sequences[first:end]))), [len(s) for s in sequences[first:end]])
    builder.finalize(str(tmp_path / "theirs.idx"))
    check(opened(tokenizer, tmp_path / "theirs"), list(chain(*sequences)), {0, 41})
    write_megatron(tmp_path / "ours", sequences, [0, 2, 3, 7])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c", "llm.c of Llama 3", "npy", "olmo"])
def test_documents_end_behind_the_end_token(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    assert tokenizer.eos_id is not None
    sequences = [[*each, tokenizer.eos_id] for each in drawn(2)]
    ids = list(chain(*sequences))
    starts = {0, *np.cumsum([len(each) for each in sequences]).tolist()}
    path, settings = tmp_path / f"a.{'npy' if kind in ('npy', 'olmo') else 'bin'}", {}
    if kind == "nanogpt":
        np.array(ids, "<u2").tofile(path)
    elif kind == "olmo":
        np.array(ids, "<u4").tofile(path)
        settings = {"dtype": "uint32"}
    elif kind == "npy":
        np.save(path, np.array(ids, ">i8"))
    else:
        write_llm_c(path, ids, "<u4" if "Llama" in kind else "<u2")
    check(opened(tokenizer, path, **settings), ids, starts)


def test_several_files_stand_one_behind_the_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [list(chain(*drawn(seed))) for seed in range(3)]
    np.array(parts[0], "<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"")
    np.save(tmp_path / "c.npy", np.array(parts[1]))
    write_megatron(tmp_path / "d", [parts[2]], [0, 1])
    ids, lengths = list(chain(*parts)), [len(part) for part in parts]
    for path in (tmp_path, f"{tmp_path}/*"):
        samples = opened(tokenizer, path)
        check(samples, ids, {0, lengths[0], lengths[0] + lengths[1]})
        assert samples.description == f"{path}: {len(ids):,} tokens in 4 files (train)"


def test_the_fingerprint_follows_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sequences = drawn(0)
    write_megatron(tmp_path / "a", sequences, [0, 7])
    before = opened(tokenizer, tmp_path / "a").fingerprint
    (tmp_path / "b").mkdir()
    write_megatron(tmp_path / "b/other", sequences, [0, 7])
    assert opened(tokenizer, tmp_path / "b").fingerprint == before
    write_megatron(tmp_path / "a", sequences, [0, 2, 7])
    assert opened(tokenizer, tmp_path / "a").fingerprint != before
    sequences[-1][-1] += 1
    write_megatron(tmp_path / "a", sequences, [0, 7])
    assert opened(tokenizer, tmp_path / "a").fingerprint != before


def test_validation_has_files_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, seed in (("train", 0), ("val", 1)):
        np.array(list(chain(*drawn(seed))), "<u2").tofile(tmp_path / f"{name}.bin")
    config = TokenFiles.Config(path=str(tmp_path / "train.bin"), validation_path=str(tmp_path / "val.bin"))
    held = config.build(tokenizer=tokenizer, seq_len=SEQ_LEN, seed=0, split="validation")
    assert held.read(0, 1).tokens_BL[0].tolist() == list(chain(*drawn(1)))[:SEQ_LEN]
    config.validation_path = None
    assert problems_of(config) == [] and [name for name, _ in config.validation_problems()] == ["validation_path"]


def damaged(path: Path, place: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)


FAULTS: dict[str, tuple[Any, str]] = {
    "magic": (lambda idx: damaged(idx, 0, b"x"), "{idx} is no index of Megatron's"),
    "short": (lambda idx: idx.write_bytes(b"MMIDIDX\0\0"), "{idx} is no index of Megatron's"),
    "version": (lambda idx: damaged(idx, 9, b"\2"), "{idx} is of version 2 and type 8: known are"),
    "floats": (lambda idx: damaged(idx, 17, b"\6"), "{idx} is of version 1 and type 6: known are"),
    "counts": (lambda idx: damaged(idx, 18, b"\x09"), "{idx} has 134 bytes, not as many as 9 sequences in 2 documents"),
    "places": (lambda idx: damaged(idx, 34 + 28, b"\1"), "{idx}: the sequences do not lie one behind"),
    "length": (lambda idx: damaged(idx, 34 + 24, b"\x5b"), "{bin} has 342 bytes, and a.idx says 172 ids of uint16"),
    "documents": (lambda idx: damaged(idx, 126, b"\x08"), "{idx}: the documents do not ascend from 0 to 7"),
    "cut off": (lambda idx: idx.with_suffix(".bin").write_bytes(b"1234"), "{bin} has 4 bytes, and a.idx says 171 ids"),
    "gone": (lambda idx: idx.with_suffix(".bin").unlink(), "cannot read {bin}: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_index_is_one_error(tmp_path: Path, tokenizer: Tokenizer, fault: str) -> None:
    write_megatron(tmp_path / "a", drawn(0), [0, 7])
    damage, said = FAULTS[fault]
    damage(tmp_path / "a.idx")
    with pytest.raises(UserError) as error:
        opened(tokenizer, tmp_path / "a.idx")
    assert str(error.value).startswith(said.format(idx=tmp_path / "a.idx", bin=tmp_path / "a.bin"))


def test_files_that_hold_no_tokens_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def said(path: Path | str, **settings: Any) -> str:
        with pytest.raises(UserError) as error:
            opened(tokenizer, path, **settings).read(0, 1)
        return str(error.value)

    assert said(tmp_path / "a").startswith(f"there are no tokens in {tmp_path}/a: name a .bin or .npy file")
    assert said(tmp_path).startswith(f"there are no tokens in {tmp_path}: ")
    (tmp_path / "a.bin").write_bytes(b"\0" * 99)
    assert (
        said(tmp_path / "a.bin")
        == f"{tmp_path}/a.bin has 99 bytes, which is no number of uint16 ids: set dataloader.dtype"
    )
    (tmp_path / "a.bin").write_bytes(b"\0" * 32)
    assert said(tmp_path / "a.bin").endswith("16 tokens in 1 files (train): one row needs 17: shorten the sequence")
    (tmp_path / "a.bin").write_bytes(b"\xff" * 64)
    assert "hold the id 65,535, and the tokenizer has 2,048" in said(tmp_path / "a.bin")
    write_llm_c(tmp_path / "a.bin", list(range(3, 60)))
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"xx")
    assert said(tmp_path / "a.bin") == f"{tmp_path}/a.bin has 1,140 bytes, and its header says 57 ids of uint16"
    np.save(tmp_path / "b.npy", np.zeros((3, 3)))
    assert said(tmp_path / "b.npy").startswith(f"{tmp_path}/b.npy holds float64 (3, 3), expected whole numbers in one")
    (tmp_path / "notes.doc").write_text("x")
    assert said(tmp_path).startswith(f"the folder {tmp_path} holds notes.doc, which is no file of tokens")
    assert said(tmp_path / "notes.doc").startswith(f"cannot tell what {tmp_path}/notes.doc holds")


def test_a_corpus_is_written_for_megatron(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{number} whales"}}\n' for number in range(40)))
    settings = {"dataset": str(tmp_path / "a.jsonl"), "validation_fraction": 0.2}
    Preparation.Config(**settings, output_format="megatron", output=str(tmp_path / "out/all")).build().run()
    assert str(tmp_path / "out/all-train.bin and .idx") in capsys.readouterr().out
    corpus = Corpus.Config(**settings).build(tokenizer=tokenizer)
    for split in SPLITS:
        stream = corpus.split(split)
        ids = np.empty(stream.extent.tokens, np.int64)
        stream.read(0, ids)
        assert np.fromfile(tmp_path / f"out/all-{split}.bin", "<u2").tolist() == ids.tolist()
        check(opened(tokenizer, tmp_path / f"out/all-{split}"), ids.tolist(), set(stream.document_starts().tolist()))
        documents = np.split(ids, stream.document_starts()[1:])
        write_megatron(tmp_path / "expected", [each.tolist() for each in documents], list(range(len(documents) + 1)))
        for end in (".bin", ".idx"):
            written = (tmp_path / f"out/all-{split}{end}").read_bytes()
            assert written == (tmp_path / f"expected{end}").read_bytes()
    assert not list(tmp_path.glob("out/*.unfinished"))
    for wrong in ({"output_format": "megatron"}, {"output": "x"}):
        assert [where for where, _ in problems_of(Preparation.Config(**wrong))] == ["output"]


def test_megatrons_own_reader_reads_what_is_written(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    documents = [each for each in drawn(0, most=70_000) if each]
    for vocab_size in (65_000, 70_000):
        own = [[token % vocab_size for token in each] for each in documents]
        stream = TokenStream.hold(own, [True] * len(own), 0, vocab_size)
        write_stream(stream, tmp_path / f"a{vocab_size}", vocab_size)
        read = indexed.IndexedDataset(str(tmp_path / f"a{vocab_size}"))
        assert [each.tolist() for each in read] == own
        assert read.document_indices.tolist() == list(range(len(own) + 1))
