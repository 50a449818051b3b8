"""The head of a run on the console."""

from pathlib import Path
from typing import Protocol

import torch

from core.nn.module import Flops
from core.parallel.settings import Degrees, describe_degrees
from core.step.checks import Run
from core.train.metrics import Metrics
from core.train.profile import Profiler


class ReportedRun(Run, Protocol):
    """What the head of a run needs to know of its configuration."""

    metrics: Metrics.Config
    profiling: Profiler.Config


def summary(
    run: ReportedRun,
    degrees: Degrees,
    described: dict[str, str],
    *,
    dtype: torch.dtype,
    flops: Flops,
    n_parameters: int,
    n_tokens: int,
    last_step: int,
    rows_per_step: int,
    folder: Path,
) -> str:
    """What will be trained, on what, where, and what is written; `described` says it of data, tokenizer and device.

    The tokenizer has `n_tokens` tokens.
    """
    metrics, profiling, checkpoint = run.metrics, run.profiling, run.checkpoint
    files = ["config.json", "metrics.jsonl", *[metrics.save_tb_folder] * metrics.enable_tensorboard]
    files += [profiling.save_traces_folder] * profiling.enable_profiling
    steps = f"{last_step:,} of {rows_per_step} x {run.training.seq_len:,} tokens"
    if last_step < run.training.steps:
        steps += f"; the data last for {last_step:,} of {run.training.steps:,} steps"
    compute = str(dtype).removeprefix("torch.")
    rows = {
        "model": f"{type(run.model).__qualname__.removesuffix('.Config')} ({run.recipe or 'no recipe'})",
        "parameters": f"{n_parameters:,}",
        "FLOPs/token": f"{flops.total:,} ({flops.attention / flops.total:.0%} in attention)",
        "data": described["data"],
        "tokenizer": described["tokenizer"] + unused(n_tokens, run.model.vocab_size),
        "device": f"{described['device']}; weights {run.training.dtype}, compute {compute}",
        "ranks": describe_degrees(degrees, run.parallelism.expert_parallel_comm_backend),
        "backward": f"activation checkpoint {run.activation_checkpoint.mode}",
        "steps": steps,
        "saved": f"every {checkpoint.interval:,} steps in {checkpoint.folder}" if checkpoint.saves else "no weights",
        "written to": f"{folder} ({', '.join(files)})",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def unused(n_tokens: int, vocab_size: int) -> str:
    """What is said of a vocabulary that a tokenizer does not fill, as one that was padded, or another model's."""
    return f"; {vocab_size - n_tokens:,} of model.vocab_size {vocab_size:,} unused" if n_tokens < vocab_size else ""
