"""The programs of docs/python.md and README.md run as they stand, on less text and for fewer steps."""

import re
from pathlib import Path

import pytest

from core.train.trainer import Trainer
from qwen3 import configs

ROOT = Path(__file__).parents[3]


def programs() -> dict[str, str]:
    """Every block of Python in the documents, by its place."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/python.md")}
    return {
        f"{name}-{number}": block
        for name, text in texts.items()
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), start=1)
    }


def test_each_document_has_its_programs() -> None:
    assert list(programs()) == ["README.md-1", "docs/python.md-1", "docs/python.md-2"]
    assert programs()["README.md-1"] == programs()["docs/python.md-1"]
    notebook = programs()["docs/python.md-2"]
    assert len([line for line in notebook.splitlines() if line]) <= 11


@pytest.mark.parametrize("name", list(programs())[1:])
def test_program_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number}.txt").write_text(f"def main():\n    return {number}\n\n" * 20)
    monkeypatch.chdir(tmp_path)
    full_run = configs.qwen3_debug

    def short_run() -> Trainer.Config:
        config = full_run()
        config.training.seq_len, config.training.local_batch_size = 16, 2
        config.lr_scheduler.warmup_steps, config.validator.steps = 1, 1
        config.dataloader.dataset, config.dataloader.cache_folder = "text", "cache"
        return config

    monkeypatch.setattr(configs, "qwen3_debug", short_run)
    (program,) = re.findall(r"(?s).*steps = .*100.*", programs()[name])
    exec(program.replace("100", "2"), {})
    first = capsys.readouterr().out
    if name.endswith("md-2"):
        assert re.search(r"^\[\(1, 7\.\d+\), \(2, \d\.\d+\)\]$", first, re.MULTILINE) and list(
            Path("outputs").iterdir()
        )
        return
    assert [path.name for path in sorted(Path("outputs").iterdir())] == ["sweep-0.001", "sweep-0.004", "sweep-0.016"]
    lines = re.findall(r"^lr .*", first, re.MULTILINE)
    assert len(lines) == 3 and len(set(line.split()[2] for line in lines)) == 3
    exec(program.replace("100", "2"), {})
    again = capsys.readouterr().out
    assert re.findall(r"^lr .*", again, re.MULTILINE) == lines and again.count("finished before, after 2 steps") == 3
