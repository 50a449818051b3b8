"""The script for a GPU, in small on the CPU: every section runs, and what fails or takes too long is told."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks the input
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")  # dynamo makes one
@pytest.mark.parametrize(
    "name", ["environment", "recipes", "sizes", "waits", "attention", "loss", "experts", "profile"]
)
def test_every_section_runs_in_small(gpu: ModuleType, name: str) -> None:
    (section,) = (each for each in gpu.SECTIONS if each.name == name)
    rows = list(gpu.rows_of(section, tiny=True))
    assert rows and not [row for row in rows if "failed" in row]
    assert all(row["equal"] for row in rows if "equal" in row)
    kernels = {row.get("kernel", row.get("attention")) for row in rows if "refused" in row}
    assert kernels == ({"varlen", "flex"} if name in ("sizes", "waits", "attention") else set())
    assert all(json.loads(json.dumps(row)) == row for row in rows)
    assert gpu.table(name, rows).startswith(f"== {name}\n")


def test_its_sections_fit_into_eight_minutes(gpu: ModuleType) -> None:
    assert sum(section.budget_s for section in gpu.SECTIONS) <= gpu.MOST_S == 480


def test_what_fails_is_told_and_the_next_goes_on(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case, a section that cannot begin, one out of time, one for which none is left."""
    rows = [{"n": 1} | gpu.figures(lambda: 1 / 0), {"n": 2} | gpu.figures(lambda: {"ms": 2.5})]
    text = gpu.table("cases", rows)
    assert "ZeroDivisionError: division by zero" in rows[0]["failed"] and "Traceback" in text and "2.5" in text
    sections = [gpu.Section("nothing", "no_such_module", 20), gpu.Section("slow", "gpu_steps", 0.01)]
    (told,) = gpu.rows_of(sections[0], tiny=True)
    assert "ModuleNotFoundError: No module named 'no_such_module'" in told["failed"]
    monkeypatch.setattr(gpu, "SECTIONS", [sections[1], gpu.Section("late", "gpu_steps", 20)])
    monkeypatch.setattr(gpu, "LEAST_S", 1e9)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output", str(tmp_path)])
    gpu.main()
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    gpu.run_apart(sections[1], gpu.Output(tmp_path), 0.01, tiny=True)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["failed"].splitlines()[0] for line in lines] == ["not begun: no time was left"] * 2 + [
        "out of time after 0 s"
    ]
    assert "== late" in (tmp_path / "gpu.txt").read_text() and "== late" in capsys.readouterr().out
    assert gpu.unused(tmp_path).name == f"{tmp_path.name}-2" and gpu.unused(tmp_path / "new") == tmp_path / "new"


def test_a_section_may_use_what_earlier_ones_leave(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(gpu, "run_apart", lambda section, output, limit_s, tiny: limits.append(limit_s))
    monkeypatch.setattr(gpu, "SECTIONS", [gpu.Section(name, "gpu_steps", 100) for name in ("a", "b", "c")])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--seconds", "100000", "--output", str(tmp_path)])
    gpu.main()
    assert limits == [99_800, 99_900, 100_000]
