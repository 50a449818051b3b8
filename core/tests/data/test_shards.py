import hashlib
import json
from itertools import accumulate, chain

import numpy as np
import pytest

from core.config.errors import UserError
from core.data.shards import (
    TOKEN_MANIFEST,
    VERIFIED,
    DamagedError,
    Extent,
    TokenManifest,
    TokenStream,
    json_digest,
    read_token_manifest,
)
from core.data.split_writer import SplitWriter


def random_documents(n, vocab_size, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, random.integers(0, 40)).tolist() for _ in range(n)]


def written(folder, documents, vocab_size, shard_tokens, batch=7):
    writer = SplitWriter(folder, "train", vocab_size, shard_tokens)
    for i in range(0, len(documents), batch):
        writer.write(documents[i : i + batch], [True] * len(documents[i : i + batch]), n_bytes=3)
    writer.close()
    manifest = TokenManifest(
        made_from={},
        vocab_size=vocab_size,
        splits={"train": writer.extent},
        shard_tokens=shard_tokens,
        files=writer.files,
    )
    manifest.write(folder)
    return manifest


def check_windows(stream, documents, seq_len):
    """Every window, against the plain list of tokens."""
    flat = list(chain.from_iterable(documents))
    starts = {0, *accumulate(len(document) for document in documents)}
    n_windows = (len(flat) - 1) // seq_len
    order = np.random.default_rng(1).permutation(n_windows)
    tokens, opens = stream.windows(order, seq_len)
    for row, window in enumerate(order.tolist()):
        places = range(window * seq_len, (window + 1) * seq_len + 1)
        assert tokens[row].tolist() == [flat[place] for place in places]
        assert opens[row].tolist() == [place in starts for place in places]


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
@pytest.mark.parametrize("shard_tokens", [16, 100, 2**20])
def test_what_is_written_is_read(tmp_path, vocab_size, itemsize, shard_tokens):
    documents = [*random_documents(100, vocab_size), [vocab_size - 1] * 333]
    manifest = written(tmp_path, documents, vocab_size, shard_tokens)
    n_tokens = sum(map(len, documents))
    assert read_token_manifest(tmp_path) == manifest
    assert manifest.splits["train"] == Extent(documents=101, tokens=n_tokens, bytes=3 * 15, sections=101)
    files = sorted(tmp_path.glob("*.tokens"))
    assert len(files) == -(-n_tokens // shard_tokens)
    assert all(file.stat().st_size == shard_tokens * itemsize for file in files[:-1])
    assert sum(file.stat().st_size for file in files) == n_tokens * itemsize
    stream = TokenStream.map(tmp_path, manifest, "train")
    for seq_len in (1, 5, 64):
        check_windows(stream, documents, seq_len)


def test_stream_in_memory_equals_files(tmp_path):
    documents = random_documents(50, 1000)
    stream = TokenStream.hold(documents, [True] * 50, 5, 1000)
    assert stream.extent == Extent(documents=50, tokens=sum(map(len, documents)), bytes=5, sections=50)
    check_windows(stream, documents, 8)


def test_sections_that_go_on_are_one_document(tmp_path):
    """In one write and over two, in files and in memory."""
    documents = random_documents(40, 1000)
    opens = [i % 5 < 2 for i in range(40)]
    whole: list[list[int]] = []
    for ids, new in zip(documents, opens, strict=True):
        whole += [list(ids)] if new else []
        whole[-1] += [] if new else ids
    writer = SplitWriter(tmp_path, "train", 1000, 64)
    for i in range(0, 40, 7):
        writer.write(documents[i : i + 7], opens[i : i + 7], n_bytes=1)
    writer.close()
    extent = Extent(documents=len(whole), tokens=sum(map(len, whole)), bytes=6, sections=40)
    assert writer.extent == extent
    manifest = TokenManifest(
        made_from={}, vocab_size=1000, splits={"train": extent}, shard_tokens=64, files=writer.files
    )
    check_windows(TokenStream.map(tmp_path, manifest, "train"), whole, 8)
    held = TokenStream.hold(documents, opens, 6, 1000)
    assert held.extent == extent
    check_windows(held, whole, 8)


def test_empty_split(tmp_path):
    manifest = written(tmp_path, [], 100, 16)
    assert read_token_manifest(tmp_path).splits["train"] == Extent()
    assert TokenStream.map(tmp_path, manifest, "train").extent.tokens == 0
    assert TokenStream.hold([], [], 0, 10).extent.tokens == 0


def test_windows_beyond_the_end_are_refused(tmp_path):
    stream = TokenStream.hold([[1, 2, 3, 4, 5]], [True], 5, 6)
    assert stream.windows(np.array([0]), 4)[0].tolist() == [[1, 2, 3, 4, 5]]
    for window, seq_len in ((1, 4), (0, 5), (-1, 2)):
        with pytest.raises(AssertionError):
            stream.windows(np.array([window]), seq_len)


def sha256(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_manifest_has_the_hash_of_every_file(tmp_path):
    documents = random_documents(30, 100)
    manifest = written(tmp_path, documents, 100, 64)
    files = [file for file in tmp_path.iterdir() if file.name != TOKEN_MANIFEST]
    assert manifest.files == {file.name: sha256(file) for file in files} and len(files) > 5
    batches = [documents[i : i + 7] for i in range(0, 30, 7)]
    firsts = np.cumsum([0, *map(len, documents)])
    content = hashlib.sha256()
    for i, batch in enumerate(batches):
        content.update(firsts[7 * i :][: len(batch)].astype("<i8").tobytes())
        content.update(np.array(list(chain.from_iterable(batch)), "<u2").tobytes())
    assert manifest.splits["train"].sha256 == content.hexdigest()


def signed(folder, content) -> None:
    content = {key: value for key, value in content.items() if key != "digest"}
    (folder / TOKEN_MANIFEST).write_text(json.dumps({**content, "digest": json_digest(content)}))


def test_a_manifest_that_is_none_is_refused(tmp_path):
    written(tmp_path, random_documents(20, 100), 100, 64)
    text = (tmp_path / TOKEN_MANIFEST).read_text()
    content = json.loads(text)
    for wrong in ("", "{", "[]", "3", "null", "[" * 100_000, text[:-2], "\xff"):
        (tmp_path / TOKEN_MANIFEST).write_bytes(wrong.encode("latin-1"))
        with pytest.raises(DamagedError, match=r"manifest\.json (is|has)"):
            read_token_manifest(tmp_path)
    (tmp_path / TOKEN_MANIFEST).write_text(text.replace('"tokens": ', '"tokens": 1'))
    with pytest.raises(DamagedError, match="manifest.json was changed after it was written"):
        read_token_manifest(tmp_path)
    extent = content["splits"]["train"]
    lies = [{"unknown": 1}, {"splits": {"train": 3}}, {"splits": []}, {"files": 3}, {"files": {}}, {"shard_tokens": 0}]
    lies += [{"shard_tokens": 1}, {"shard_tokens": 2**70}, {"vocab_size": "100"}, {"vocab_size": 1.5}]
    changes = [("tokens", 10**30), ("tokens", -1), ("tokens", True), ("documents", None), ("sha256", 3), ("more", 3)]
    lies += [{"splits": {"train": {**extent, key: value}}} for key, value in changes]
    for lie in lies:
        signed(tmp_path, {**content, **lie})
        with pytest.raises(DamagedError, match="manifest.json cannot be read"):
            read_token_manifest(tmp_path)
    signed(tmp_path, content)
    read_token_manifest(tmp_path)
    (tmp_path / TOKEN_MANIFEST).unlink()
    with pytest.raises(DamagedError, match="manifest.json cannot be read: No such file"):
        read_token_manifest(tmp_path)


@pytest.mark.parametrize("place", [0, 40, 63])
def test_files_that_change_under_a_run_are_noticed(tmp_path, place):
    documents = [[place for place in range(64)]] + [[1, 2]] * 30
    manifest = written(tmp_path, documents, 100, 1000)
    stream = TokenStream.map(tmp_path, manifest, "train")
    (tmp_path / VERIFIED).write_text("{}")
    stream.windows(np.array([0, 1]), 32)
    tokens = np.memmap(tmp_path / "train-00000.tokens", "<u2", "r+")
    tokens[place], before = 100, tokens[place]
    with pytest.raises(
        UserError, match=r"has changed since it was verified: it holds the id 100 in a vocabulary of 100"
    ):
        stream.windows(np.array([0, 1]), 32)
    assert not (tmp_path / VERIFIED).exists()
    tokens[place] = before
    starts = np.memmap(tmp_path / "train.starts", "<i8", "r+")
    starts[2], starts[3] = starts[3], starts[2]
    stream.windows(np.array([0]), 32)
    with pytest.raises(UserError, match="document starts that do not ascend, in tokens 64 to 96"):
        stream.windows(np.array([2]), 32)
