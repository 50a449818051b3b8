"""What each mode of activation checkpointing saves and recomputes, before a run and without its memory.

    python -m core.activation_checkpoint.report --model qwen3 --config qwen3_1_7b [--output FOLDER] [--section.field V]

Takes any package, recipe and option that `python -m <model>.train` takes. One forward per mode runs on fake tensors,
which have shapes and no memory; every row is taken as one document. With --output the numbers are written as
report.json and drawn as report.svg.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from core.activation_checkpoint.survey import Survey, survey
from core.config.cli import override, own_flags, split_flags
from core.config.decode import trusted
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.help import CONFIG_OPTION, TRUST, OwnOption, show
from core.config.recipe import load_config
from core.config.validate import validate
from core.runtime.device import GIB, MIB, select_device
from core.runtime.units import size_text

REPORT_OPTIONS = {
    "model": OwnOption("PACKAGE", "the package of the recipes"),
    "config": CONFIG_OPTION,
    "trust": TRUST,
    "output": OwnOption("FOLDER", "where the numbers and the picture are written"),
    "help": OwnOption("", "this text", 0),
}
MODES = ("none", "selective", "full")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report that the command line asks for."""
    with exit_plainly():
        own, settings = own_flags(split_flags(argv), REPORT_OPTIONS)
        if "help" in own or not {"model", "config"} <= own.keys():
            show(__doc__ or "")
            if "help" in own:
                return
            raise UserError("--model PACKAGE and --config NAME|FILE.json say what to report on")
        (package,) = own["model"]
        try:
            configs = import_module(f"{package}.configs")
        except ModuleNotFoundError as error:
            raise UserError(f"no package {package} with recipes: {error}") from error
        config: Any = load_config(own["config"], configs, trust=trusted(own.get("trust", [])))
        override(config, settings)
        validate(config)
        surveys = {mode: survey_mode(config, mode) for mode in MODES}
        training = config.training
        title = (
            f"{' '.join(own['config'])}: {config.model.n_layers} blocks, "
            f"{training.local_batch_size} x {training.seq_len:,} tokens, "
            f"compute in {str(dtype_of(training)).removeprefix('torch.')}"
        )
        show(text(title, surveys, head_and_loss(config)))
        if "output" in own:
            write_report(Path(*own["output"]), title, surveys)


def dtype_of(training: Any) -> torch.dtype:
    """What matrix products would compute in on this machine's device."""
    return training.compute_dtype(select_device(training.device))


def survey_mode(config: Any, mode: str) -> Survey:
    """One forward of the model of a run in `mode`."""
    training = config.training
    return survey(
        config.model,
        replace(config.activation_checkpoint, mode=mode),
        shape=(training.local_batch_size, training.seq_len),
        dtype=dtype_of(training),
        converters=config.converters,
    )


def head_and_loss(config: Any) -> str:
    """What the head and the loss of a run hold while they work."""
    training, model = config.training, config.model
    sizes = {"dim": model.dim, "vocab_size": model.vocab_size, "n_ranks": 1}
    least = config.loss.least_bytes(training.local_batch_size * training.seq_len, **sizes)
    return f"head and loss, at least: {size_text(least)}"


def text(title: str, surveys: dict[str, Survey], head: str) -> str:
    """The report for people: a line per mode, what `head` says, then the operations of each kind of block."""
    lines = [title, "", f"{'mode':12}{'saved per block':>18}{'saved in blocks':>18}{'recomputed FLOPs':>20}"]
    for mode, s in surveys.items():
        per_block = " / ".join(f"{kind.saved / MIB:,.1f}" for kind in s.kinds)
        lines.append(f"{mode:12}{per_block + ' MiB':>18}{size_text(s.saved):>18}{s.recomputed_share:>20.1%}")
    lines.append(f"{'':12}outside the blocks, in every mode: {size_text(surveys['none'].outside)}; {head}")
    lines.append(
        f"{'':12}memory_budget: decided by torch.compile, see activation_checkpoint.visualize_memory_budget_pareto"
    )
    for mode, s in surveys.items():
        for kind in s.kinds:
            lines += [
                "",
                f"{mode}, blocks {kind.blocks}",
                f"  {'':11}{'operation':58}{'n':>4}{'MiB':>12}{'GFLOPs':>12}",
            ]
            for fate in ("saved", "recomputed"):
                for row in kind.rows:
                    if row.fate == fate and (row.bytes or row.flops):
                        lines.append(
                            f"  {fate:11}{row.op:58}{row.count:>4}{row.bytes / MIB:>12,.1f}{row.flops / 1e9:>12,.1f}"
                        )
    return "\n".join(lines)


def write_report(folder: Path, title: str, surveys: dict[str, Survey]) -> None:
    """report.json with every number, report.svg with a point for each mode."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"title": title, "modes": {mode: asdict(s) for mode, s in surveys.items()}}
    (folder / "report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    points = {mode: (s.recomputed_share, s.saved / GIB) for mode, s in surveys.items()}
    (folder / "report.svg").write_text(picture(title, points), encoding="utf-8")


def picture(title: str, points: dict[str, tuple[float, float]]) -> str:
    """An SVG: recomputed share of the forward FLOPs across, GiB saved in the blocks up, one point per mode."""
    left, right, floor, ceiling = 80, 550, 340, 50
    top = max(gib for _, gib in points.values()) or 1.0

    def label(x: float, y: float, words: str, more: str = 'text-anchor="middle"') -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    shapes = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="400" font-family="sans-serif" font-size="12">',
        label(left, 24, title, 'font-weight="bold"'),
        f'<path d="M{left} {ceiling} V{floor} H{right}" fill="none" stroke="black"/>',
        label((left + right) / 2, 386, "recomputed share of the forward's FLOPs"),
        label(18, 200, "saved in the blocks, GiB", 'text-anchor="middle" transform="rotate(-90 18 200)"'),
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        shapes.append(label(left + (right - left) * tick, floor + 18, f"{tick:.0%}"))
        shapes.append(label(left - 8, floor - (floor - ceiling) * tick + 4, f"{top * tick:.3g}", 'text-anchor="end"'))
    for mode, (share, gib) in points.items():
        x, y = left + (right - left) * share, floor - (floor - ceiling) * gib / top
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>', label(x + 9, y - 7, mode, "")]
    return "\n".join([*shapes, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
