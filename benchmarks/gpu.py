"""What a GPU does with this product, in eight minutes at most: sections in order of worth, each with its own time.

    pip install models/llama3 models/qwen3 models/deepseek_v3 models/gpt_oss
    python benchmarks/gpu.py --output figures

It needs no network. Where it stands in a checkout it runs that checkout's packages, else those that are installed. A
section is a process of its own: what one breaks, the next does not meet. Each figure is written as it is found, a line
of JSON in figures/gpu.jsonl, and each section as a table in figures/gpu.txt when it ends; one that fails or runs out of
time leaves its traceback there and its figures so far. What earlier sections leave of their time, the next may use. A
folder that has figures is left alone: the next run writes to figures-2. On a machine without a GPU everything runs in
small on the CPU, which shows that it runs and nothing more.
"""

import argparse
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
MOST_S = 480
LEAST_S = 5.0
"""A section is not begun with less time left."""
Row = dict[str, Any]


class Section(NamedTuple):
    """A part of the script: `module.name` yields its rows."""

    name: str
    module: str
    budget_s: float


SECTIONS = [
    Section("environment", "gpu_steps", 40),  # reads torch from the disk
    Section("recipes", "gpu_steps", 110),
    Section("sizes", "gpu_steps", 140),
    Section("waits", "gpu_steps", 20),
    Section("attention", "gpu_kernels", 75),
    Section("loss", "gpu_kernels", 30),
    Section("experts", "gpu_kernels", 35),
    Section("profile", "gpu_steps", 30),
]


def rows_of(section: Section, *, tiny: bool) -> Iterator[Row]:
    """The rows of a section as they are found; what has no figures says why."""
    try:
        from core.runtime.device import select_device

        device = select_device("cpu" if tiny else "cuda")
        cases = getattr(importlib.import_module(section.module), section.name)(device, tiny)
        for labels, case in cases:
            yield labels | figures(case)
    except Exception:
        yield {"failed": traceback.format_exc()}


def figures(case: Callable[[], Row]) -> Row:
    """What a case finds, or the traceback of its failure; what it allocated is free again."""
    import torch

    from core.config.errors import UserError

    try:
        return case()
    except (UserError, torch.OutOfMemoryError) as error:
        return {"refused": str(error).splitlines()[0]}
    except Exception:
        return {"failed": traceback.format_exc()}
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU


def table(name: str, rows: Iterable[Row]) -> str:
    """The rows of a section, in columns; texts below each other."""
    rows = list(rows)
    texts = [str(row[key]) for row in rows for key in ("text", "failed") if key in row]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "text"))
    cells = [columns] + [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([f"== {name}", *(line.rstrip() for line in lines if columns), *texts, ""])


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).strip().splitlines()[-1][:120] if str(value).strip() else ""


class Output:
    """The two files of a run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.text = folder / "gpu.jsonl", folder / "gpu.txt"

    def row(self, name: str, row: Row) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps({"section": name, **row}) + "\n")

    def rows(self, name: str) -> list[Row]:
        """What the files have of a section."""
        lines = self.lines.read_text().splitlines() if self.lines.exists() else []
        found = [json.loads(line) for line in lines]
        return [
            {key: value for key, value in row.items() if key != "section"} for row in found if row["section"] == name
        ]

    def end(self, name: str, seconds: float) -> None:
        shown = table(f"{name}, {seconds:.0f} s", self.rows(name))
        with self.text.open("a") as file:
            file.write(shown + "\n")
        print(shown, flush=True)


def run_apart(section: Section, output: Output, limit_s: float, *, tiny: bool) -> None:
    """Run a section in a process of its own, which is ended when its time is over."""
    sources = [str(path) for path in sorted(HERE.parent.glob("*/src")) + sorted(HERE.parent.glob("models/*/src"))]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")]), *sources])
    command = [sys.executable, str(HERE / "gpu.py"), "--section", section.name, "--output", str(output.lines.parent)]
    environment = {**os.environ, "PYTHONPATH": path}
    ended = None
    with tempfile.TemporaryFile() as said:  # a pipe would stay open as long as compilers that it started
        child = subprocess.Popen(command + ["--tiny"] * tiny, env=environment, stderr=said, start_new_session=True)
        try:
            if code := child.wait(limit_s):
                ended = f"ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"out of time after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said.seek(0)
        if ended is not None:
            output.row(section.name, {"failed": f"{ended}\n{said.read().decode(errors='replace')[-3000:]}"})


def unused(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that has no figures."""
    names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
    return next(name for name in names if not (name / "gpu.jsonl").exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
    parser.add_argument("--only", nargs="+", metavar="SECTION", choices=[each.name for each in SECTIONS], default=[])
    parser.add_argument("--seconds", type=float, default=MOST_S, help="for all sections together")
    parser.add_argument("--tiny", action="store_true", help="in small on the CPU, as where there is no GPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        output = Output(args.output)
        (section,) = (each for each in SECTIONS if each.name == args.section)
        for row in rows_of(section, tiny=args.tiny):
            output.row(section.name, row)
        return
    output = Output(unused(args.output))
    began = time.monotonic()
    tiny = args.tiny or not has_gpu()
    chosen = [section for section in SECTIONS if not args.only or section.name in args.only]
    for number, section in enumerate(chosen, start=1):
        started = time.monotonic()
        left = args.seconds - (started - began)
        spare = left - sum(later.budget_s for later in chosen[number:])
        if left < LEAST_S:
            output.row(section.name, {"failed": "not begun: no time was left"})
        else:
            run_apart(section, output, min(left, max(section.budget_s, spare)), tiny=tiny)
        output.end(section.name, time.monotonic() - started)


def has_gpu() -> bool:
    """Whether torch sees one, and else says so; asked of another process: this one needs no memory of a GPU."""
    code = "import torch; print(torch.__version__); raise SystemExit(not torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        version = asked.stdout.strip() or "is missing"
        print(f"torch {version}: no GPU is seen, all is done in small on the CPU", asked.stderr[-3000:], flush=True)
    return not asked.returncode


if __name__ == "__main__":
    main()
