"""What README.md shows of the first command is what it prints, up to the numbers."""

import io
import re
import sys
from pathlib import Path

import pytest

from core.config.cli import main
from qwen3 import configs

README = Path(__file__).parents[3] / "README.md"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shape(line: str) -> str:
    """A line without what differs between runs: numbers with their units, names of folders, the length of bars."""
    line = re.sub(r"outputs/[\w./-]*\d{8}-\d{6}(-\d+)?", "FOLDER", line)
    line = re.sub(r"\S*/corpora/\S+", "CACHE", line)
    line = re.sub(r"#+", "#", line)
    line = re.sub(r"[\d,.:]*\d(k|M|G| [KMG]iB| min \d+ s| s)?\b", "N", line)
    return re.sub(r" +", " ", line).replace("threads;", "thread;")


def shapes(lines: list[str]) -> dict[str, list[str]]:
    """The lines by their place in a run: of steps, and of what follows each, every shape once."""
    steps = [i for i, line in enumerate(lines) if line.startswith(("step ", "    validation"))]
    middle = sorted({shape(line) for line in lines[steps[0] : steps[-1] + 1] if line != "..."})
    return {
        "head": [shape(line) for line in lines[: steps[0]]],
        "steps": middle,
        "end": [shape(line) for line in lines[steps[-1] + 1 :]],
    }


def sample() -> list[str]:
    """The block of README.md that begins with the head of a run."""
    (text,) = re.findall(r"^```\n(model .*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return text.splitlines()


def test_sample_is_what_the_first_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdlib").mkdir()
    for number in range(40):
        (tmp_path / f"stdlib/{number:02}.txt").write_text(f"def function_{number}():\n    return {number}\n" * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")  # without the line that is redrawn
    monkeypatch.setattr(sys, "stdout", Terminal())
    words = ["--config", "qwen3_debug", "--dataloader.dataset", "stdlib/*.txt", "--training.steps", "2"]
    main(configs, [*words, "--validator.steps", "1", "--validator.freq", "2", "--lr_scheduler.warmup_steps", "0"])
    printed, shown = sys.stdout.getvalue().splitlines(), sample()
    printed = [line.replace("stdlib/*.txt:", "stdlib:") for line in printed]
    assert shapes(shown) == shapes(printed)
    assert max(map(len, shown)) <= 60 and max(map(len, printed)) <= 60
