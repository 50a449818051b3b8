"""Training speed on a CPU: our trainer, a minimal loop over the same network, and transformers' model in that loop.

    pip install models/llama3 models/qwen3 transformers
    OMP_WAIT_POLICY=PASSIVE python benchmarks/training_cpu.py

All three start from the same weights, read the same batches, and take turns step by step in one process, so that a
change of the machine's speed hits all alike; the losses of their first step must agree before anything is timed.
Ratios are to the minimal loop (1.00 is the practical limit, more is faster), per round of turns: median (lowest to
highest). CPU time counts all threads and is the steadier column on a shared machine. OMP_WAIT_POLICY
keeps threads that wait for a busy core from keeping it busy.
"""

import statistics
import tempfile
from pathlib import Path

from minimal import minimal_of
from side_by_side import Step, arguments, in_turns, make_trainer, plain_loop, ratios
from transformers import AutoModelForCausalLM

from core.train.trainer import Trainer
from core.weights.hf import save_hf


def peers(trainer: Trainer, folder: Path) -> dict[str, Step]:
    (model,) = trainer.built.models
    save_hf(model, folder / "hf")
    minimal = minimal_of(model, trainer.config.training.seq_len)
    reference = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="sdpa").train()
    return {
        "minimal": plain_loop(minimal, minimal, trainer),
        "armature": lambda number: trainer.step(number).loss,
        "transformers": plain_loop(reference, lambda tokens: reference(tokens, use_cache=False).logits, trainer),
    }


def main() -> None:
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        # The peers keep everything for backward, so ours does too.
        steps = peers(make_trainer(Path(folder), args, mode="none"), Path(folder))
        first = {name: step(1) for name, step in steps.items()}
        near = 1e-4 if args.compute == "float32" else 2e-2
        assert max(first.values()) - min(first.values()) < near, f"the peers are not the same network: {first}"
        times = in_turns(steps, args.rounds)
    print(f"\n{'':14}{'tokens/s':>10}  {'ratio by wall time':24}{'ratio by CPU time':24}")
    for name, shown in ratios(times, to="minimal", faster=True).items():
        speed = args.rows * args.length / statistics.median(wall for wall, _ in times[name])
        print(f"{name:14}{speed:>10,.0f}  {shown}")


if __name__ == "__main__":
    main()
