"""The commands of core.data: prepare and train_tokenizer."""

import json
import re
import subprocess
import sys

import pytest

from core.data import prepare, train_tokenizer
from core.data.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Leave the logger of the test process as it is."""
    monkeypatch.setattr(prepare, "start_logging", lambda: None)
    monkeypatch.setattr(train_tokenizer, "start_logging", lambda: None)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "set.jsonl"
    lines = [{"body": f"Line {i}: the café sells\n\t{'many ' * (i % 5)}things — {i * i}\r\n"} for i in range(400)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_prepare_says_where_and_how_much(dataset, tmp_path, capsys, monkeypatch):
    arguments = ["--dataset", dataset, "--text-field", "body", "--validation-fraction", "0.1"]
    prepare.main([*arguments, "--cache-folder", str(tmp_path / "kept")])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{dataset} with SentencePiece, 2,048 tokens (bundled)"
    [folder] = (tmp_path / "kept" / "corpora").iterdir()
    assert out[1] == str(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for line, split in zip(out[2:], ("train", "validation"), strict=True):
        extent = manifest["splits"][split]
        size = f"{extent['documents']:,} documents, {extent['tokens']:,} tokens"
        assert line == f"{split:10}  {size}, {extent['bytes'] / extent['tokens']:.2f} bytes/token"
    assert sum(extent["documents"] for extent in manifest["splits"].values()) == 400


def test_wrong_settings_end_without_a_traceback(dataset, capsys):
    for argv, message in (
        (["--dataset", "none.txt"], "error: there is no none.txt"),
        (["--dataset", dataset, "--validation-fraction", "3"], "error: validation_fraction: must be at least 0"),
        (["--dataset", dataset], "no field 'text'; there are: 'body'"),
        (["--tokenizer", "none.model"], "error: cannot read the tokenizer none.model"),
    ):
        with pytest.raises(SystemExit) as end:
            prepare.main(argv)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_trained_tokenizer_gives_text_back(dataset, tmp_path, capsys, logged):
    output = tmp_path / "own.model"
    command = ["--dataset", dataset, "--text-field", "body", "--vocab-size", "320", "--output", str(output)]
    train_tokenizer.main(command)
    tokenizer = Tokenizer.Config(path=str(output)).build()
    assert tokenizer.vocab_size == 320 and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    text = "Line 7:  the café sells\n\tmany things — 49\r\n\u2581 日本 "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("Line 7: the café sells")) < len("Line 7: the café sells".encode()) / 2
    assert logged == [f"INFO: {output}: {output.stat().st_size:,} bytes, 320 tokens"]
    assert str(tmp_path).encode() not in output.read_bytes()
    first = output.read_bytes()
    train_tokenizer.main(command)
    assert output.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.model", "set.jsonl"]
    prepare.main(["--dataset", dataset, "--text-field", "body", "--tokenizer", str(output)])
    assert f"SentencePiece, 320 tokens ({output})" in capsys.readouterr().out


def test_training_text_in_pieces_that_end_with_lines(tmp_path, monkeypatch, logged):
    monkeypatch.setattr(train_tokenizer, "_PIECE_CHARACTERS", 100)
    text = "".join(f"line {i} {'x' * (i % 30)}\n" for i in range(200)) + "y" * 1234 + "\nlast"
    (tmp_path / "a.txt").write_text(text)
    config = train_tokenizer.TokenizerTraining.Config(dataset=str(tmp_path / "a.txt"))
    pieces = list(config.build()._pieces())
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100
    assert all(piece.endswith("\n") for piece in pieces if "y" not in piece and piece != pieces[-1])
    assert logged == []


def test_training_stops_reading_at_its_limit(tmp_path, logged):
    (tmp_path / "a.txt").write_text("some words\n" * 200_000)
    config = train_tokenizer.TokenizerTraining.Config(dataset=str(tmp_path), text_mb=1)
    size = sum(map(len, config.build()._pieces()))
    assert 1_000_000 <= size < 1_200_000
    assert logged == [f"INFO: {tmp_path}: trained on its first 1 million characters"]


def test_tokenizer_that_cannot_be_trained(dataset, tmp_path, capsys):
    output = str(tmp_path / "own.model")
    for argv, message in (
        (["--vocab-size", "200"], "vocab_size: 200 leaves no room"),
        (["--output", "tokenizer.bin"], "output: tokenizer.bin must end in .model"),
        (["--text-mb", "0"], "text_mb: must be at least 1, not 0"),
        (["--output", output, "--vocab-size", "100000"], "gives no tokenizer of 100000 tokens: .*too high"),
        (["--output", f"{dataset}/below/own.model", "--vocab-size", "320"], "cannot write .*own.model"),
    ):
        with pytest.raises(SystemExit) as end:
            train_tokenizer.main(["--dataset", dataset, "--text-field", "body", *argv])
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_commands_run_as_modules(dataset, tmp_path):
    command = [sys.executable, "-m", "core.data.prepare", "--dataset", dataset, "--text-field", "body"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "bytes/token" in result.stdout
