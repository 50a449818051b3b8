"""The commands of core.data: prepare and train_tokenizer."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.config import cli
from core.data import train_tokenizer as training
from core.data.prepare import Preparation
from core.data.tokenizer import Tokenizer
from core.data.train_tokenizer import TokenizerTraining


def prepare(*argv: str) -> None:
    cli.run(Preparation.Config(), argv)


def train_tokenizer(*argv: str) -> None:
    cli.run(TokenizerTraining.Config(), argv)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "set.jsonl"
    lines = [{"body": f"Line {i}: the café sells\n\t{'many ' * (i % 5)}things — {i * i}\r\n"} for i in range(400)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_prepare_says_where_and_how_much(dataset, tmp_path, capsys, monkeypatch):
    arguments = ["--dataset", dataset, "--text-field", "body", "--validation-fraction", "0.1"]
    prepare(*arguments, "--cache-folder", str(tmp_path / "kept"))
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
        (["--datset", dataset], "error: no option --datset; did you mean --dataset?"),
        (["--config", "a.json"], "error: no option --config; --help WORD searches"),
        (["--tokenizer", "none.model"], "error: there is no tokenizer "),
    ):
        with pytest.raises(SystemExit) as end:
            prepare(*argv)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_trained_tokenizer_gives_text_back(dataset, tmp_path, capsys, logged):
    output = tmp_path / "own.model"
    command = ["--dataset", dataset, "--text-field", "body", "--vocab-size", "320", "--output", str(output)]
    train_tokenizer(*command)
    tokenizer = Tokenizer.Config(path=str(output)).build()
    assert tokenizer.vocab_size == 320 and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    text = "Line 7:  the café sells\n\tmany things — 49\r\n\u2581 日本 "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("Line 7: the café sells")) < len("Line 7: the café sells".encode()) / 2
    assert logged == [f"INFO: {output}: {output.stat().st_size:,} bytes, 320 tokens"]
    assert str(tmp_path).encode() not in output.read_bytes()
    first = output.read_bytes()
    train_tokenizer(*command)
    assert output.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.model", "set.jsonl"]
    prepare("--dataset", dataset, "--text-field", "body", "--tokenizer", str(output))
    assert f"SentencePiece, 320 tokens ({output})" in capsys.readouterr().out


def test_training_text_in_pieces_that_end_with_lines(tmp_path, monkeypatch, logged):
    monkeypatch.setattr(training, "_PIECE_CHARACTERS", 100)
    text = "".join(f"line {i} {'x' * (i % 30)}\n" for i in range(200)) + "y" * 1234 + "\nlast"
    (tmp_path / "a.txt").write_text(text)
    config = TokenizerTraining.Config(dataset=str(tmp_path / "a.txt"))
    pieces = list(config.build()._pieces())
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100
    assert all(piece.endswith("\n") for piece in pieces if "y" not in piece and piece != pieces[-1])
    assert logged == []


def test_training_stops_reading_at_its_limit(tmp_path, logged):
    (tmp_path / "a.txt").write_text("some words\n" * 200_000)
    config = TokenizerTraining.Config(dataset=str(tmp_path), text_mb=1)
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
        (
            ["--output", f"{dataset}/below/own.model", "--vocab-size", "320"],
            "cannot write .*own.model: there is no folder",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            train_tokenizer("--dataset", dataset, "--text-field", "body", *argv)
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_commands_run_as_modules(dataset, tmp_path):
    command = [sys.executable, "-m", "core.data.prepare", "--dataset", dataset, "--text-field", "body"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "bytes/token" in result.stdout


def test_help_says_what_a_command_does_and_takes():
    command = [sys.executable, "-m", "core.data.prepare", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("python -m core.data.prepare: Prepares the corpus of a run with the same settings")
    assert "\n  --validation_fraction FLOAT = 0.02\n      Share of the documents held out" in result.stdout


def reads(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    with contextlib.suppress(OSError):
        return any(link.resolve() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.parametrize("command", ["prepare", "train_tokenizer"])
def test_ctrl_c_ends_a_command_in_one_line_and_leaves_nothing(tmp_path, command):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    out.mkdir()
    text.write_text("some words\n" * 5_000_000)
    option = ["--cache-folder", str(out)] if command == "prepare" else ["--output", str(out / "own.model")]
    program = [sys.executable, "-m", f"core.data.{command}", "--dataset", str(text), *option]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not reads(process.pid, text):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert not [path for path in out.rglob("*") if path.is_file()]
