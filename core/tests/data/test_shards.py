import json
from itertools import accumulate, chain

import numpy as np
import pytest

from core.data.shards import MANIFEST, DamagedError, Extent, Manifest, SplitWriter, TokenStream, read_manifest


def random_documents(n, vocab_size, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, random.integers(0, 40)).tolist() for _ in range(n)]


def written(folder, documents, vocab_size, shard_tokens, batch=7):
    writer = SplitWriter(folder, "train", vocab_size, shard_tokens)
    for i in range(0, len(documents), batch):
        writer.write(documents[i : i + batch], n_bytes=3)
    writer.close()
    manifest = Manifest(made_from={}, vocab_size=vocab_size, splits={"train": writer.extent}, shard_tokens=shard_tokens)
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
    assert read_manifest(tmp_path) == manifest
    assert manifest.splits["train"] == Extent(documents=101, tokens=n_tokens, bytes=3 * 15)
    files = sorted(tmp_path.glob("*.tokens"))
    assert len(files) == -(-n_tokens // shard_tokens)
    assert all(file.stat().st_size == shard_tokens * itemsize for file in files[:-1])
    assert sum(file.stat().st_size for file in files) == n_tokens * itemsize
    stream = TokenStream.map(tmp_path, manifest, "train")
    for seq_len in (1, 5, 64):
        check_windows(stream, documents, seq_len)


def test_stream_in_memory_equals_files(tmp_path):
    documents = random_documents(50, 1000)
    stream = TokenStream.hold(documents, n_bytes=5)
    assert stream.extent == Extent(documents=50, tokens=sum(map(len, documents)), bytes=5)
    check_windows(stream, documents, 8)


def test_empty_split(tmp_path):
    manifest = written(tmp_path, [], 100, 16)
    assert read_manifest(tmp_path).splits["train"] == Extent()
    assert TokenStream.map(tmp_path, manifest, "train").extent.tokens == 0
    assert TokenStream.hold([], 0).extent.tokens == 0


def test_windows_beyond_the_end_are_refused(tmp_path):
    stream = TokenStream.hold([[1, 2, 3, 4, 5]], 5)
    assert stream.windows(np.array([0]), 4)[0].tolist() == [[1, 2, 3, 4, 5]]
    for window, seq_len in ((1, 4), (0, 5), (-1, 2)):
        with pytest.raises(AssertionError):
            stream.windows(np.array([window]), seq_len)


def test_damage_is_found(tmp_path):
    def fresh(name):
        folder = tmp_path / name
        folder.mkdir()
        written(folder, random_documents(20, 100), 100, 64)
        return folder

    with pytest.raises(DamagedError, match="No such file"):
        read_manifest(tmp_path / "none")
    folder = fresh("shard cut short")
    shard = folder / "train-00001.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DamagedError, match="train-00001.tokens has 126 bytes instead of 128"):
        read_manifest(folder)
    (folder / "train-00001.tokens").unlink()
    with pytest.raises(DamagedError, match="train-00001.tokens: No such file"):
        read_manifest(folder)
    folder = fresh("starts grown")
    with open(folder / "train.starts", "ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(DamagedError, match="train.starts has 168 bytes instead of 160"):
        read_manifest(folder)
    content = json.loads((folder / MANIFEST).read_text())
    for wrong in ([], {}, {**content, "splits": {"train": 3}}, {**content, "unknown": 1}, None):
        (folder / MANIFEST).write_text("{" if wrong is None else json.dumps(wrong))
        with pytest.raises(DamagedError, match="manifest.json cannot be read"):
            read_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DamagedError, match="manifest.json: No such file"):
        read_manifest(folder)
