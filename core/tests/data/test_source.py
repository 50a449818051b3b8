import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from core.config.errors import UserError
from core.config.validate import problems_of
from core.data.corpus import Corpus
from core.data.dataset import open_source, source_of
from core.data.source import HubDataset, Source, StandardLibrary, TextFiles


def texts(source: Source) -> list[str]:
    """The documents of a source, none of which is long."""
    sections = list(source.sections())
    assert all(section.opens and section.closes for section in sections)
    return [section.text for section in sections]


def test_standard_library_is_many_megabytes_of_real_text():
    source = open_source("stdlib", "text", "error")
    assert isinstance(source, StandardLibrary)
    documents = texts(source)
    assert documents == texts(source)
    assert sum(map(len, documents)) > 8_000_000
    assert all(topic in documents for topic in topics.values())
    assert any('"""Random variable generators.' in document for document in documents)
    assert not any("topics = {'assert'" in document for document in documents)
    assert source.fingerprint() == open_source("stdlib", "text", "error").fingerprint()


def test_standard_library_leaves_out_tests_packages_and_what_python_cannot_decode(tmp_path):
    files = {
        "b.py": b"b = 1\n",
        "a/__init__.py": b"",
        "a/latin.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
        "a/no_utf8.py": b"# \xe9\n",
        "a/no_utf8_later.py": b"\n" * 9 + b"# \xe9\n",
        "a/no_codec.py": b"# coding: no-such-codec\n",
        "a/tests/c.py": b"c = 1\n",
        "test/d.py": b"d = 1\n",
        "site-packages/e.py": b"e = 1\n",
        "pydoc_data/topics.py": b"topics = {}\n",
        "a/data.txt": b"no source",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = StandardLibrary.Config(root=str(tmp_path)).build()
    found = texts(source)
    assert found == ["# -*- coding: latin-1 -*-\n# é\n", "b = 1\n", *(topics[name] for name in sorted(topics))]
    before = source.fingerprint()
    (tmp_path / "b.py").write_bytes(b"b = 10\n")
    assert source.fingerprint() != before


def test_fingerprint_of_files_follows_name_size_and_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(10**18, 10**18))
    seen = [TextFiles.Config(path=str(tmp_path)).build().fingerprint()]
    assert TextFiles.Config(path=str(tmp_path)).build().fingerprint() == seen[0]
    os.utime(path, ns=(10**18, 10**18 + 1))
    seen.append(TextFiles.Config(path=str(tmp_path)).build().fingerprint())
    path.write_text("four")
    os.utime(path, ns=(10**18, 10**18 + 1))
    seen.append(TextFiles.Config(path=str(tmp_path)).build().fingerprint())
    (tmp_path / "b.txt").write_text("")
    seen.append(TextFiles.Config(path=str(tmp_path)).build().fingerprint())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_documents_of_several_files_without_blank_ones(tmp_path, logged):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": " \\n"}\n{"text": "b"}\n')
    (tmp_path / "b.txt").write_text("c")
    (tmp_path / "c.txt").write_text("\n\n")
    for name in ("d.jsonl", "e.csv", "f.jsonl"):
        (tmp_path / name).write_text("text\n" if name == "e.csv" else "")
    for dataset in (str(tmp_path), [str(tmp_path)]):
        logged.clear()
        assert texts(open_source(dataset, "text", "error")) == ["a", "b", "c"]
        left_out = f"WARNING: {tmp_path}: left out 3 empty"
        assert logged == [
            f"{left_out} files; the first: {tmp_path / 'd.jsonl'}: it holds no document",
            f"{left_out} documents; the first: {tmp_path / 'a.jsonl'}: no visible character",
        ]


def test_bad_lines_are_counted_in_the_log(tmp_path, logged):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "no JSON\n" * 1234)
    assert texts(open_source(str(path), "text", "skip")) == ["a"]
    assert logged == [
        f"WARNING: {path}: left out 1,234 unreadable lines; the first: {path}:2: "
        "not JSON (Expecting value: line 1 column 1 (char 0))"
    ]
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        texts(open_source(str(path), "text", "error"))


def test_source_that_yields_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    for content in ("", "\n", '{"text": " "}', "no JSON\n"):
        path.write_text(content)
        left_out = ", with 1 unreadable lines left out" if "no" in content else ""
        with pytest.raises(UserError, match=f"a.jsonl yields no text{left_out}$"):
            texts(open_source(str(path), "text", "skip"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local folder that `datasets` reads, with the package's own cache out of the user's way."""
    datasets = pytest.importorskip("datasets", reason="the hf extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [{"text": f"row {i}", "n": i} for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text('{"text": "held", "n": 9}\n')
    return folder


def test_hub_dataset_is_streamed(hub):
    source = open_source(f"hf:{hub}", "text", "error")
    assert texts(source) == [f"row {i}" for i in range(5)] == texts(source)
    assert texts(open_source(f"hf:{hub}:default@test", "text", "error")) == ["held"]
    before = source.fingerprint()
    assert before == open_source(f"hf:{hub}", "text", "error").fingerprint()
    (hub / "train.jsonl").write_text('{"text": "other", "n": 1}')
    assert open_source(f"hf:{hub}", "text", "error").fingerprint() != before
    json.dumps(before)


def test_hub_dataset_with_wrong_names(hub):
    for dataset in (f"hf:{hub}/none", f"hf:{hub}:none", f"hf:{hub}@none"):
        with pytest.raises(
            UserError, match="cannot open the Hugging Face dataset hf:.*none|no split 'none'; there are: train, test"
        ):
            open_source(dataset, "text", "error")
    with pytest.raises(UserError, match="row 1: expected text in the field 'n', got a value of type int"):
        texts(open_source(f"hf:{hub}", "n", "error"))


def test_hub_dataset_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hf:name needs the package datasets: .* pip install './core\[hf\]'"):
        open_source("hf:name", "text", "error")


def test_no_optional_or_slow_package_is_imported_before_it_is_chosen():
    code = (
        "import sys, core.data.corpus, core.data.prepare, core.data.train_tokenizer\n"
        "print(sorted({'datasets', 'tokenizers', 'sentencepiece', 'torch'} & sys.modules.keys()))\n"
        "import core.data.text\n"
        "print(sorted({'datasets', 'tokenizers', 'sentencepiece'} & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["[]", "[]", ""]


def test_a_saved_folder_is_read_and_its_splits_are_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "held": rows.select([1])}).save_to_disk(tmp_path / "both")
    assert texts(open_source(f"hf:{tmp_path}/one", "text", "error")) == ["one", "two"]
    assert texts(open_source(f"hf:{tmp_path}/both@held", "text", "error")) == ["two"]
    before = open_source(f"hf:{tmp_path}/one", "text", "error").fingerprint()
    assert before == open_source(f"hf:{tmp_path}/one", "text", "error").fingerprint()
    with pytest.raises(UserError, match=r"both@nope has no split 'nope'; there are: train, held"):
        open_source(f"hf:{tmp_path}/both@nope", "text", "error")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf:json is a format and no dataset: name the files, without hf:"):
        open_source("hf:json", "text", "error")


def test_several_sources_are_one_behind_the_other(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": 3}\n')
    words = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.txt")]
    source = open_source(words, "text", "skip")
    assert texts(source) == ["second", "first"] and source.name == ", ".join(words)
    with pytest.raises(UserError, match=r"b\.jsonl:2: expected text"):
        texts(open_source(words, "text", "error"))
    with pytest.raises(UserError, match=r"a\.txt is named twice: it would be read twice"):
        open_source([words[1], str(tmp_path / "a.txt")], "text", "error")
    config = Corpus.Config(dataset=words, on_bad_line="skip", validation_fraction=0.0)
    assert config.build(tokenizer=tokenizer).manifest.splits["train"].documents == 2
    assert [where for where, _ in problems_of(Corpus.Config(dataset=[]))] == ["dataset"]
    places = Corpus.Config(dataset=["books", "hf:name#main", "stdlib"]).places()["dataset"]
    assert places == [str(Path("books").absolute()), "hf:name#main", "stdlib"]
    stated = HubDataset.Config(dataset="a", subset="b", split="c", revision="d")
    assert source_of("hf:a:b@c#d", "text", "error", None) == stated
