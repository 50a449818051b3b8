"""The head of a run on the console."""

import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from platform import platform
from typing import Any, Protocol

import torch

from core.nn.module import Flops
from core.optim.schedule import Schedule
from core.parallel.settings import Degrees, describe_degrees
from core.quantization.converter import Conversion
from core.runtime.device import describe
from core.runtime.log import WIDTH, event
from core.step.checks import Run
from core.step.loss import Loss, loss_backend
from core.step.settings import Compile
from core.train.identity import versions
from core.train.metrics import Metrics
from core.train.profile import Profiler
from core.train.step_report import StepReport

N_RATES = 200
"""So many steps stand for all in the picture of the learning rate."""
MARGIN = 11
"""Columns of the names."""


class ReportedRun(Run, Protocol):
    """What the head of a run needs to know of its configuration."""

    metrics: Metrics.Config
    profiling: Profiler.Config


def summary(
    run: ReportedRun,
    degrees: Degrees,
    described: dict[str, str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    flops: Flops,
    n_parameters: int,
    n_tokens: int,
    last_step: int,
    rows_per_step: int,
    folder: Path,
    schedule: Schedule,
    conversions: Sequence[Conversion] = (),
) -> str:
    """What will be trained, on what, where, and what is written; `described` says it of data and tokenizer.

    The tokenizer has `n_tokens` tokens.
    """
    checkpoint = run.checkpoint
    steps = f"{last_step:,} of {rows_per_step} x {run.training.seq_len:,} tokens"
    if last_step < run.training.steps:
        steps += f"; the data last for {last_step:,} of {run.training.steps:,} steps"
    compute = str(dtype).removeprefix("torch.")
    saved = f"every {checkpoint.interval:,} steps and at the end, in {checkpoint.folder}"
    rows = {
        "model": f"{type(run.model).__qualname__.removesuffix('.Config')} ({run.recipe or 'no recipe'})",
        "parameters": f"{n_parameters:,}",
        "FLOPs": f"{flops.total:,} per token ({flops.attention / flops.total:.0%} in attention)",
        "layers": "; ".join(map(str, conversions)),
        "data": described["data"],
        "tokenizer": described["tokenizer"] + unused(n_tokens, run.model.vocab_size),
        "device": f"{describe(device)}; weights {run.training.dtype}, compute {compute}",
        "ranks": describe_degrees(degrees, run.parallelism.expert_parallel_comm_backend),
        "backward": f"activation checkpoint {run.activation_checkpoint.mode}",
        "compiled": compiled(run.compile, run.loss, device),
        "steps": steps,
        "rate": schedule.words(run.optimizer.lr),
        "saved": saved if checkpoint.saves else "no weights",
        "written to": str(folder),
    }
    if run.metrics.enable_tensorboard:
        rows["curve"] = f"tensorboard --logdir {folder / run.metrics.save_tb_folder}"
    head = {name: row(name, value) for name, value in rows.items() if value}
    picture = schedule.picture(last_step, WIDTH - MARGIN)
    head["rate"] = "\n".join([head["rate"], *(f"{'':<{MARGIN}}{line}".rstrip() for line in picture)])
    return "\n".join(head.values())


def started(report: StepReport) -> dict[str, Any]:
    """What makes the head of a run the event of its start: the step that it goes on after, the system, and the learning
    rates of some of its steps up to the last."""
    checkpoints, device, peak = report.checkpoints, report.layout.device, report.run.optimizer.lr
    rates = [[step, float(f"{peak * share:.6g}")] for step, share in report.schedule.sampled(report.last_step, N_RATES)]
    modules = {name: sys.modules[name] for name in ("core", "torch")}
    facts = {name.removeprefix("version of "): version for name, version in versions(modules).items()}
    system = {"device": describe(device), "ranks": str(checkpoints.ranks.size), "platform": platform(), **facts}
    step = checkpoints.start.step
    return event("start", step, text="went on" if step else "began", system=system, schedule=rates)


def compiled(settings: Compile, loss: Loss.Config, device: torch.device) -> str:
    """What torch.compile is given of a run, and what it is not though it was asked for."""
    parts = ["every block"] if settings.takes("model") else []
    if loss_backend(settings, loss, device):
        parts.append("the loss")
    found = [f"{' and '.join(parts)}, by {settings.backend}"] if parts else []
    if settings.takes("loss") and "the loss" not in parts:
        found.append("cross-entropy as it is, which a CPU computes faster")
    return "; ".join(found)


def row(name: str, value: str) -> str:
    """A name and what there is to say of it, as a paragraph beside it; the user's home is ~."""
    home = os.path.expanduser("~")
    value = value.replace(f" {home}/", " ~/") if len(home) > 1 else value
    lines = textwrap.wrap(value, WIDTH - MARGIN, break_long_words=False, break_on_hyphens=False)
    return f"{name:<{MARGIN}}" + f"\n{'':<{MARGIN}}".join(lines)


def unused(n_tokens: int, vocab_size: int) -> str:
    """What is said of a vocabulary that a tokenizer does not fill, as one that was padded, or another model's."""
    return f"; {vocab_size - n_tokens:,} of model.vocab_size {vocab_size:,} unused" if n_tokens < vocab_size else ""
