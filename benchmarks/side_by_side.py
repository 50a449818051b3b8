"""What the CPU benchmarks share: one small network, and steps of several contenders taken in turns."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from minimal import Minimal
from torch import Tensor, nn
from torch.nn import functional as F

from core.data.packing import IGNORE, Batch
from core.train.trainer import Trainer
from llama3.configs import llama3_debug
from qwen3.configs import qwen3_debug

FAMILIES = {"llama3": llama3_debug, "qwen3": qwen3_debug}
DEFAULTS = {
    "family": "qwen3",
    "rows": 8,
    "length": 512,
    "dim": 256,
    "layers": 6,
    "compile": False,
    "compute": "float32",
}
"""What a model of these benchmarks is, unless told."""
Step = Callable[[int], float]
"""Trains step number n, counted from 1, and returns its loss."""


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="whose model")
    parser.add_argument("--rows", type=int, help="rows in a batch")
    parser.add_argument("--length", type=int, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    parser.add_argument("--dim", type=int, help="width of the model, of 16 heads")
    parser.add_argument("--layers", type=int, help="blocks of the model")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="our products, in")
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args()


def make_trainer(folder: Path, args: argparse.Namespace, *, mode: str, early_stop: bool = False) -> Trainer:
    """Our trainer on a model of 16 heads and a vocabulary of 2048, with activation checkpointing `mode`."""
    config = make_config(args)
    config.dump_folder = str(folder / "run")
    config.activation_checkpoint.mode, config.activation_checkpoint.early_stop = mode, early_stop
    return config.build()


def make_config(args: argparse.Namespace) -> Trainer.Config:
    config = FAMILIES[args.family]()
    config.training.local_batch_size, config.training.seq_len = args.rows, args.length
    config.training.mixed_precision_param = args.compute
    config.validator.enable = False
    config.compile.enable = args.compile
    config.model.dim, config.model.n_layers, config.model.feed_forward.hidden_dim = args.dim, args.layers, 3 * args.dim
    heads = config.model.attention
    heads.n_heads, heads.n_kv_heads, heads.head_dim = 16, 8, args.dim // 16
    return config


def plain_loop(model: nn.Module, logits: Callable[[Tensor], Tensor], trainer: Trainer) -> Step:
    """Forward, backward, clip and fused AdamW, and nothing else."""
    c = trainer.config.optimizer
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    joined = model.balance_loss if isinstance(model, Minimal) else float

    def step(number: int) -> float:
        batch: Batch = trainer.batches(number)[0]
        for group in optimizer.param_groups:
            group["lr"] = c.lr * trainer.schedule.factor(number)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(batch.tokens_BL).flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORE)
        (loss + joined()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.config.training.max_norm)
        optimizer.step()
        return loss.item()

    return step


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of steps 2 and on, the contenders alternating; CPU time counts all threads."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(2, 2 + rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step(number)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def ratios(times: dict[str, list[tuple[float, float]]], *, to: str, faster: bool) -> dict[str, str]:
    """For each contender two columns, by wall and by CPU time: median (lowest to highest) of the ratio round by round.

    The ratio is that of times, or with `faster` that of speeds.
    """
    shown = {}
    for name, own in times.items():
        columns = []
        for clock in (0, 1):
            pairs = zip(own, times[to], strict=True)
            row = sorted((b[clock] / a[clock]) if faster else (a[clock] / b[clock]) for a, b in pairs)
            columns.append(f"{f'{statistics.median(row):.3f} ({row[0]:.2f} to {row[-1]:.2f})':24}")
        shown[name] = "".join(columns)
    return shown
