"""A prepared corpus is what was written, or it is prepared again and said so: damage of every kind to every file."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from core.config import text_file
from core.config.errors import UserError
from core.data import corpus as corpus_module
from core.data import integrity, shards
from core.data.corpus import Corpus
from core.data.sampling import SPLITS
from core.data.shards import TOKEN_MANIFEST, VERIFIED, json_digest

TEXTS = [f"Document {i} says {'something ' * (i % 7)}and ends.\n" for i in range(60)]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Corpus.Config:
    """A corpus of several files, in a world where every file is old."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 256)
    monkeypatch.setattr(integrity, "_SETTLED_NS", -(10**12))
    monkeypatch.setattr(integrity, "_known", {})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Corpus.Config(dataset=str(path), cache_folder=str(tmp_path / "kept"), validation_fraction=0.2)


def content(corpus: Corpus) -> list[list]:
    """All tokens and starts."""
    found = []
    for split in SPLITS:
        stream = corpus.split(split)
        tokens, opens = stream.windows(np.array([0]), stream.extent.tokens - 1)
        found += [tokens.tolist(), opens.tolist(), stream.extent.documents, stream.extent.bytes]
    return found


def hashed(monkeypatch) -> list[str]:
    """The names of the files that are read whole from now on."""
    names, verify = [], integrity._verify_file
    monkeypatch.setattr(
        integrity, "_verify_file", lambda path, manifest: names.append(path.name) or verify(path, manifest)
    )
    return names


def test_a_file_is_verified_once(config, tokenizer, monkeypatch):
    names = hashed(monkeypatch)
    corpus = config.build(tokenizer=tokenizer)
    files = sorted(corpus.manifest.files)
    assert sorted(names) == files and len(files) > 6
    for _ in range(2):  # in this process, and in another one
        config.build(tokenizer=tokenizer)
        monkeypatch.setattr(integrity, "_known", {})
    assert sorted(names) == files
    os.utime(corpus.folder / "train-00001.tokens")
    config.build(tokenizer=tokenizer)
    assert names[len(files) :] == ["train-00001.tokens"]
    (corpus.folder / VERIFIED).write_text("[" * 100_000)
    monkeypatch.setattr(integrity, "_known", {})
    config.build(tokenizer=tokenizer)
    assert sorted(names[len(files) + 1 :]) == files


def test_what_has_just_changed_is_verified_again(config, tokenizer, monkeypatch):
    monkeypatch.setattr(integrity, "_SETTLED_NS", 10**12)
    names = hashed(monkeypatch)
    corpus = config.build(tokenizer=tokenizer)
    config.build(tokenizer=tokenizer)
    assert len(names) == 2 * len(corpus.manifest.files)
    assert not (corpus.folder / VERIFIED).exists()


def test_where_nothing_can_be_written_a_process_verifies_once(config, tokenizer, monkeypatch, logged):
    folder = config.build(tokenizer=tokenizer).folder
    (folder / VERIFIED).unlink()
    (folder / VERIFIED).mkdir()  # stands for a folder that is read only, which the superuser never sees
    names = hashed(monkeypatch)
    monkeypatch.setattr(integrity, "_known", {})
    for _ in range(2):
        config.build(tokenizer=tokenizer)
    assert len(names) == len(set(names))
    assert logged == [
        f"INFO: {folder} cannot be written (Is a directory): its files are verified at the start of every run"
    ]


def test_ranks_that_follow_another_read_no_file_whole(config, tokenizer, monkeypatch):
    expected = content(config.build(tokenizer=tokenizer))
    names = hashed(monkeypatch)
    monkeypatch.setattr(integrity, "_known", {})
    (config.build(tokenizer=tokenizer).folder / VERIFIED).unlink()
    assert content(config.build(tokenizer=tokenizer, verify=False)) == expected and names == []


def test_a_disk_that_keeps_other_bytes_is_found_out(config, tokenizer, monkeypatch):
    write = shards.TokenManifest.write

    def damage(manifest: shards.TokenManifest, folder: Path) -> None:
        write(manifest, folder)
        flip(folder / "train.starts", random.Random(0))

    monkeypatch.setattr(shards.TokenManifest, "write", damage)
    with pytest.raises(UserError, match=r"was prepared, and other bytes are read there .*train\.starts .*cache_folder"):
        config.build(tokenizer=tokenizer)


def test_a_cache_that_may_not_be_read_is_not_prepared_again(config, tokenizer, monkeypatch):
    config.build(tokenizer=tokenizer)

    def forbid(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(text_file, "open", forbid, raising=False)
    monkeypatch.setattr(corpus_module, "write_splits", forbid)
    with pytest.raises(
        UserError, match=r"cannot read .*manifest\.json cannot be read: Permission denied; choose another place"
    ):
        config.build(tokenizer=tokenizer)


# Damage of every kind


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def flip_in_secret(file: Path, draw: random.Random) -> None:
    """As a program that sets the times back."""
    found = file.stat()
    time.sleep(0.02)
    flip(file, draw)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size + 1))


def extend(file: Path, draw: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(draw.randbytes(draw.randrange(1, 40)))


def overwrite(file: Path, draw: random.Random) -> None:
    size = file.stat().st_size
    first = draw.randrange(size + 1)
    with file.open("r+b") as stream:
        stream.seek(first)
        stream.write(draw.choice([bytes, draw.randbytes])(min(size - first, draw.randrange(1, 4000))))


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


def other_of(file: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in file.parent.iterdir() if path.is_file()))


def swap(file: Path, draw: random.Random) -> None:
    other, aside = other_of(file, draw), file.with_name("aside")
    if other != file:
        file.rename(aside)
        other.rename(file)
        aside.rename(other)


def copy_over(file: Path, draw: random.Random) -> None:
    data = other_of(file, draw).read_bytes()
    file.write_bytes(data)


def link(file: Path, draw: random.Random) -> None:
    other = other_of(file, draw)
    file.unlink()
    file.symlink_to(draw.choice([other.name, "nowhere", file.name, "/dev/zero"]))


def no_file(file: Path, draw: random.Random) -> None:
    file.unlink()
    draw.choice([os.mkdir, os.mkfifo])(file)


def no_folder(file: Path, draw: random.Random) -> None:
    folder = file.parent
    shutil.rmtree(folder)
    draw.choice([lambda: folder.write_text("x"), folder.mkdir, lambda: folder.symlink_to("nowhere"), lambda: None])()


def edit_manifest(file: Path, draw: random.Random) -> None:
    """Another number, in a manifest that is signed again or not."""
    manifest = json.loads((file.parent / TOKEN_MANIFEST).read_text())
    signed = draw.random() < 0.7
    places = [(manifest, key) for key in ("vocab_size", "shard_tokens", "splits", "files", "made_from")]
    for split in manifest["splits"].values():
        places += [(split, key) for key in ("documents", "tokens", *(() if signed else ("bytes", "sha256")))]
    places += [(manifest["files"], name) for name in manifest["files"]]
    place, key = draw.choice(places)
    before = place[key]
    values = [0, -1, 1, 2**31, 10**40, True, None, "1", [], {}, 1.5, float("nan")]
    values += [before + 1, before - 1, before * 2] if isinstance(before, int) else []
    place[key] = draw.choice([value for value in values if value != before or type(value) is not type(before)])
    if signed:
        del manifest["digest"]
        manifest["digest"] = json_digest(manifest)
    (file.parent / TOKEN_MANIFEST).write_text(json.dumps(manifest))


def forge(file: Path, draw: random.Random) -> None:
    """Tokens beyond the vocabulary, or starts out of order, in files whose hashes are made to fit."""
    name = draw.choice(["train.starts", "validation.starts", "train-00001.tokens", "validation-00000.tokens"])
    data = np.fromfile(file.parent / name, "<i8" if name.endswith("starts") else "<u2")
    place = draw.randrange(data.size)
    if name.endswith("tokens"):
        data[place] = draw.choice([2048, 2049, 65535])
    else:
        data[place] = draw.choice([-1, -(2**63), 2**62, 2**63 - 1])
    data.tofile(file.parent / name)
    manifest = json.loads((file.parent / TOKEN_MANIFEST).read_text())
    manifest["files"][name] = sha256(data.tobytes()).hexdigest()
    del manifest["digest"]
    (file.parent / TOKEN_MANIFEST).write_text(json.dumps({**manifest, "digest": json_digest(manifest)}))


KINDS: list[Callable[[Path, random.Random], None]] = [
    flip, flip_in_secret, truncate, extend, overwrite, delete, swap, copy_over, link, no_file, no_folder, edit_manifest,
    forge,
]  # fmt: skip


def clear(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def damage_again_and_again(config: Corpus.Config, tokenizer, logged: list[str], n_times: int, seed: int) -> str:
    """Damage a cache `n_times`; what is then read is always what was written. Returns what was done."""
    corpus = config.build(tokenizer=tokenizer)
    expected, folder = content(corpus), corpus.folder
    pristine = folder.parent.with_name("pristine")
    shutil.copytree(folder, pristine)
    names = sorted(path.name for path in folder.iterdir())
    draw, prepared = random.Random(seed), 0
    for number in range(n_times):
        clear(folder)
        shutil.copytree(pristine, folder)
        for name in names:
            os.utime(folder / name, ns=(10**18, 10**18))
        (folder / VERIFIED).unlink()
        verified_before = draw.random() < 0.7
        if verified_before:
            assert content(config.build(tokenizer=tokenizer)) == expected
        kind, name = KINDS[number % len(KINDS)], draw.choice(names)
        logged.clear()
        if name != VERIFIED or verified_before:
            kind(folder / name, draw)
        if draw.random() < 0.5:
            integrity._known.clear()
        found = content(config.build(tokenizer=tokenizer))
        assert found == expected, (number, kind.__name__, name)
        warnings = [line for line in logged if line.startswith("WARNING")]
        assert len(warnings) <= 1, warnings
        assert all(f"the prepared corpus {folder} is damaged (" in line for line in warnings), warnings
        prepared += bool(warnings)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return f"{n_times} times damaged, {prepared} times prepared again, never read as anything else"


def test_damage_is_never_read(config, tokenizer, logged):
    print(damage_again_and_again(config, tokenizer, logged, 2 * len(KINDS), seed=0))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
def test_damage_is_never_read_two_thousand_times(config, tokenizer, logged, seed):
    print(damage_again_and_again(config, tokenizer, logged, 500, seed))


def test_a_cache_of_another_text_is_not_taken(config, tokenizer, tmp_path, logged):
    mine = config.build(tokenizer=tokenizer)
    expected = content(mine)
    other = Path(config.dataset).with_name("other.jsonl")
    other.write_text('{"text": "another text"}\n' * 20)
    stranger = Corpus.Config(dataset=str(other), cache_folder=config.cache_folder, validation_fraction=0.2)
    folder = stranger.build(tokenizer=tokenizer).folder
    shutil.rmtree(mine.folder)
    folder.rename(mine.folder)
    assert content(config.build(tokenizer=tokenizer)) == expected
    assert [line for line in logged if "WARNING" in line] == [
        f"WARNING: the prepared corpus {mine.folder} is damaged (it was made from something else): it is prepared again"
    ]
