"""The command as it is called: its words, its lines, its end."""

import subprocess
import sys
from pathlib import Path

import torch

from core.testing.toy import on_cpu, randomise
from core.weights.folder import load_folder
from core.weights.hf import save_hf
from qwen3.model import size


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", "qwen3.convert", *map(str, words)]
    return subprocess.run(called, capture_output=True, text=True, timeout=300)


def test_the_command(tmp_path: Path) -> None:
    model, read = on_cpu(size("debug")), on_cpu(size("debug"))
    randomise(model, seed=1)
    save_hf(model, tmp_path / "there")
    done = command("from-hf", tmp_path / "there", tmp_path / "here", "--shard-gib", "0.0015", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("model-00001-of-00002.safetensors: "), lines
    load_folder(read, tmp_path / "here")
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.bfloat16().float()), name
    again = command("from-hf", tmp_path / "there", tmp_path / "here")
    assert again.returncode == 2
    assert again.stderr == (
        f"error: {tmp_path / 'here'} is there already: choose a folder that is empty or does not exist\n"
    )
