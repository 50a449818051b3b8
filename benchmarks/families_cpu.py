"""Training speed of every debug recipe on a CPU, beside transformers' model of the same shape in a minimal loop.

    pip install models/llama3 models/qwen3 models/deepseek_v3 models/gpt_oss transformers
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/families_cpu.py

Both start from the same weights, read the same batches, and take turns step by step in one process; the losses of
their first step must agree before anything is timed. Ours computes the balance loss of its mixtures as well. Ratios are
to transformers, per round of turns: median (lowest to highest); more is faster.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from side_by_side import Step, in_turns, plain_loop, ratios
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from core.train.trainer import Trainer
from core.weights.hf import save_hf
from deepseek_v3.configs import deepseek_v3_debug
from gpt_oss.configs import gpt_oss_debug
from llama3.configs import llama3_debug
from qwen3.configs import qwen3_debug, qwen3_moe_debug

RECIPES = [llama3_debug, qwen3_debug, qwen3_moe_debug, deepseek_v3_debug, gpt_oss_debug]


def contenders(recipe: Callable[[], Trainer.Config], folder: Path) -> tuple[Trainer, dict[str, Step]]:
    config = recipe()
    config.dump_folder = str(folder / "run")
    config.validator.enable = False
    config.activation_checkpoint.mode = "none"  # as transformers does
    trainer = config.build()
    save_hf(trainer.built.models[0], folder / "hf")
    reference = AutoModelForCausalLM.from_pretrained(folder / "hf").train()
    theirs = plain_loop(reference, lambda tokens: reference(tokens, use_cache=False).logits, trainer)
    return trainer, {"armature": lambda number: trainer.step(number).loss, "transformers": theirs}


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    args = parser.parse_args()
    print(f"{'recipe':20}{'armature':>10}{'theirs':>10} tokens/s   {'ratio by wall time':24}{'ratio by CPU time':24}")
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            trainer, steps = contenders(recipe, Path(folder))
            first = {name: step(1) for name, step in steps.items()}
            assert max(first.values()) - min(first.values()) < 1e-4, f"not the same network: {first}"
            times = in_turns(steps, args.rounds)
        training = trainer.config.training
        tokens = training.local_batch_size * training.seq_len
        speeds = [tokens / statistics.median(wall for wall, _ in times[name]) for name in steps]
        shown = ratios(times, to="transformers", faster=True)["armature"]
        print(f"{recipe.__name__:20}{speeds[0]:>10,.0f}{speeds[1]:>10,.0f}            {shown}", flush=True)


if __name__ == "__main__":
    main()
