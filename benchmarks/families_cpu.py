"""Training speed of every debug recipe on a CPU, beside a network by hand and transformers' model in a minimal loop.

    pip install models/llama3 models/qwen3 models/deepseek_v3 models/gpt_oss transformers
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/families_cpu.py

All start from the same weights, read the same batches, and take turns step by step in one process; the losses of their
first steps must agree before anything is timed. Ours and the one by hand compute the balance loss of mixtures as well,
transformers' does not. Ratios are to the network by hand, per round: median (lowest to highest); more is faster.
"""

import argparse
import tempfile
from pathlib import Path

from minimal import minimal_of
from side_by_side import Step, in_turns, plain_loop, ratios
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from core.train.trainer import Trainer
from core.weights.hf import save_hf
from deepseek_v3.configs import deepseek_v3_debug
from gpt_oss.configs import gpt_oss_debug
from llama3.configs import llama3_debug
from qwen3.configs import qwen3_debug, qwen3_moe_debug

RECIPES = {
    recipe.__name__: recipe for recipe in (llama3_debug, qwen3_debug, qwen3_moe_debug, deepseek_v3_debug, gpt_oss_debug)
}


def contenders(config: Trainer.Config, folder: Path) -> dict[str, Step]:
    config.dump_folder = str(folder / "run")
    config.validator.enable = False
    config.activation_checkpoint.mode = "none"  # as the others do
    trainer = config.build()
    (model,) = trainer.built.models
    save_hf(model, folder / "hf")
    minimal = minimal_of(model, config.training.seq_len)
    reference = AutoModelForCausalLM.from_pretrained(folder / "hf").train()
    return {
        "minimal": plain_loop(minimal, minimal, trainer),
        "armature": lambda number: trainer.step(number).loss,
        "transformers": plain_loop(reference, lambda tokens: reference(tokens, use_cache=False).logits, trainer),
    }


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="recipe", help=", ".join(RECIPES))
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender")
    args = parser.parse_args()
    print(f"{'':34}{'ms of CPU':>10}  {'ratio by wall time':24}{'ratio by CPU time':24}")
    for name in args.recipes:
        config = RECIPES[name]()
        config.training.local_batch_size, config.training.seq_len = args.rows, args.length
        with tempfile.TemporaryDirectory() as folder:
            steps = contenders(config, Path(folder))
            first = {who: step(1) for who, step in steps.items()}
            assert max(first.values()) - min(first.values()) < 1e-4, f"not the same network: {first}"
            times = in_turns(steps, args.rounds)
        for who, shown in ratios(times, to="minimal", faster=True).items():
            least = 1000 * min(cpu for _, cpu in times[who])
            print(f"{name:20}{who:14}{least:>10,.0f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
