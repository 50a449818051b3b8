"""What activation checkpointing costs on a CPU: the time of a step and the bytes saved, for each mode.

    pip install models/qwen3
    OMP_WAIT_POLICY=PASSIVE python benchmarks/activation_checkpoint_cpu.py

The same model (by default dim 256, 6 layers, rows of 512 tokens) in every mode, and with `torch.utils.checkpoint` put
around its blocks by hand, which stops recomputing early by default. All start from the same weights, read the same
batches and take turns step by step in one process; the losses of their first step must be the same bit for bit. Ratios
are to "none", per round of turns: median (lowest to highest). Saved bytes are measured after a forward: what is alive
then and was not before.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

from side_by_side import arguments, in_turns, make_trainer, ratios
from torch.utils.checkpoint import checkpoint

from core.activation_checkpoint.meter import Meter
from core.train.trainer import Trainer


def contenders(folder: Path, args: argparse.Namespace) -> dict[str, Trainer]:
    trainers = {mode: make_trainer(folder / mode, args, mode=mode) for mode in ("none", "selective", "full")}
    trainers["full, early_stop"] = make_trainer(folder / "early", args, mode="full", early_stop=True)
    trainers["by hand"] = make_trainer(folder / "by hand", args, mode="none")
    for block in trainers["by hand"].built.models[0].layers.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return trainers


def saved_bytes(trainer: Trainer) -> int:
    batch = trainer.batches(1)[0]
    with Meter() as meter:
        loss = trainer.objective(batch)
    assert loss.total.requires_grad
    return meter.alive


def main() -> None:
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        trainers = contenders(Path(folder), args)
        saved = {name: saved_bytes(trainer) for name, trainer in trainers.items()}
        steps = {name: lambda number, t=trainer: t.step(number).loss for name, trainer in trainers.items()}
        first = {name: step(1) for name, step in steps.items()}
        assert len(set(first.values())) == 1, f"the modes do not compute the same: {first}"
        times = in_turns(steps, args.rounds)
    print(f"\n{'':18}{'step s':>8}  {'ratio by wall time':24}{'ratio by CPU time':24}{'saved MiB':>10}")
    for name, shown in ratios(times, to="none", faster=False).items():
        step_s = statistics.median(wall for wall, _ in times[name])
        print(f"{name:18}{step_s:>8.2f}  {shown}{saved[name] / 2**20:>10.1f}")


if __name__ == "__main__":
    main()
