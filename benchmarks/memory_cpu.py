"""Peak memory of training on a CPU: our trainer, a minimal loop over the same network, and transformers' model in it.

    pip install models/llama3 models/qwen3 transformers
    OMP_NUM_THREADS=1 python benchmarks/memory_cpu.py

Each contender trains three steps from the same weights on the same batches in a process of its own, which holds nothing
else; the losses must agree. What is shown is the largest resident set of the process, with what its imports take.
"""

import multiprocessing
import resource
import tempfile
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from minimal import Minimal
from side_by_side import Step, arguments, make_config, make_trainer, plain_loop
from torch import Tensor

from core.weights.hf import save_hf

STEPS = (1, 2, 3)


class Recorded:
    """What `plain_loop` asks of a trainer, without its model: batches that were read before, and settings."""

    def __init__(self, batches: dict[int, tuple[Tensor, Tensor]], factors: dict[int, float], config: Namespace) -> None:
        self.config, self.schedule = config, Namespace(factor=factors.__getitem__)
        self.of_step = {n: Namespace(tokens_BL=tokens, labels_BL=labels) for n, (tokens, labels) in batches.items()}

    def batches(self, number: int) -> list[Namespace]:
        return [self.of_step[number]]


def record(folder: Path, args: Namespace) -> None:
    """The weights, batches and settings, in files."""
    trainer = make_trainer(folder / "first", args, mode="none")
    (model,) = trainer.built.models
    save_hf(model, folder / "hf")
    c = trainer.config.optimizer
    optimizer = {name: getattr(c, name) for name in ("weight_decay", "lr", "beta1", "beta2", "eps")}
    batches = {number: trainer.batches(number)[0] for number in STEPS}
    run = {
        "batches": {number: (batch.tokens_BL, batch.labels_BL) for number, batch in batches.items()},
        "factors": {number: trainer.schedule.factor(number) for number in STEPS},
        "optimizer": optimizer,
        "max_norm": trainer.config.training.max_norm,
    }
    rotation = model.rope(torch.arange(args.length)[None])
    angles = [table[0, :, 0] for table in rotation[:2]]
    torch.save({"angles": angles, "weights": dict(model.state_dict()), "run": run}, folder / "run.pt")


def contender(name: str, folder: Path, args: Namespace) -> Step:
    if name.startswith("armature"):
        trainer = make_trainer(folder / name, args, mode=name.split(", ")[1])
        return lambda number: trainer.step(number).loss
    found = torch.load(folder / "run.pt")
    run = found["run"]
    training = Namespace(max_norm=run["max_norm"])
    config = Namespace(optimizer=Namespace(**run["optimizer"]), training=training)
    recorded: Any = Recorded(run["batches"], run["factors"], config)
    if name == "minimal":
        minimal = Minimal(make_config(args).model, *found["angles"])
        minimal.load_state_dict(found["weights"])
        return plain_loop(minimal, minimal, recorded)
    transformers = import_module("transformers")  # in its own process alone
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="sdpa").train()
    return plain_loop(model, lambda tokens: model(tokens, use_cache=False).logits, recorded)


def peak(name: str, folder: Path, args: Namespace) -> tuple[float, float]:
    """The last loss, and the largest resident set of this process in MiB."""
    step = contender(name, folder, args)
    losses = [step(number) for number in STEPS]
    return losses[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    args = arguments(__doc__)
    start = multiprocessing.get_context("spawn")
    names = ("minimal", "transformers", "armature, none", "armature, selective", "armature, full")
    found = {}
    with tempfile.TemporaryDirectory() as folder, start.Pool(1, maxtasksperchild=1) as pool:
        pool.apply(record, (Path(folder), args))
        for name in names:
            found[name] = pool.apply(peak, (name, Path(folder), args))
    losses = [loss for loss, _ in found.values()]
    assert max(losses) - min(losses) < 1e-3, f"the contenders are not the same network: {found}"
    print(f"\n{'':22}{'peak MiB':>9}{'of transformers':>17}")
    for name, (_, mib) in found.items():
        print(f"{name:22}{mib:>9,.0f}{mib / found['transformers'][1]:>17.2f}")


if __name__ == "__main__":
    main()
