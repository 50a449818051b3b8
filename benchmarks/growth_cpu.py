"""How the cost of a step grows on a CPU: with layers, length, documents, experts and accumulation.

    pip install models/qwen3 models/gpt_oss
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/growth_cpu.py

Steps of the debug recipes' width, `selective`, of one row of a table take turns; microseconds of CPU time per token,
median, and its ratio to the first of the row. A step has 4,096 tokens, but where microbatches are counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from random_rows import random_run

from core.train.trainer import Trainer
from gpt_oss.configs import gpt_oss_debug
from qwen3.configs import qwen3_debug, qwen3_moe_debug

TOKENS = 4096
Recipe = Callable[[], Trainer.Config]
Run = AbstractContextManager[Trainer]


def of_layers(n: int) -> Run:
    config = sized(qwen3_debug, 256)
    config.model.n_layers = n
    return on_cpu(config)


def of_length(recipe: Recipe, length: int) -> Run:
    return on_cpu(sized(recipe, length))


def of_documents(length: int) -> Run:
    """Rows of documents of 256 tokens."""
    config = sized(qwen3_debug, length)
    config.training.mask = "document"
    return on_cpu(config, document_tokens=256)


def of_experts(n: int) -> Run:
    config = sized(qwen3_moe_debug, 256)
    config.model.moe.router.n_experts = n
    return on_cpu(config)


def of_microbatches(n: int) -> Run:
    config = sized(qwen3_debug, 256)
    config.training.local_batch_size, config.training.global_batch_size = 4, 4 * n
    return on_cpu(config)


def sized(recipe: Recipe, length: int) -> Trainer.Config:
    config = recipe()
    config.training.seq_len, config.training.local_batch_size = length, TOKENS // length
    return config


def on_cpu(config: Trainer.Config, **rows: int) -> Run:
    return random_run(config, torch.device("cpu"), **rows)


LENGTHS = (256, 512, 1024, 2048, 4096)
TABLES: dict[str, tuple[Callable[[int], Run], tuple[int, ...]]] = {
    "layers": (of_layers, (4, 8, 16, 24)),
    "length, causal": (lambda n: of_length(qwen3_debug, n), LENGTHS),
    "length, documents of 256": (of_documents, LENGTHS),
    "length, gpt_oss": (lambda n: of_length(gpt_oss_debug, n), LENGTHS),
    "experts, top 4": (of_experts, (8, 32, 128)),
    "microbatches of 1,024": (of_microbatches, (1, 2, 4, 8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each size")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables")
    args = parser.parse_args()
    for name in args.only:
        build, numbers = TABLES[name]
        times: dict[int, list[float]] = {n: [] for n in numbers}
        with ExitStack() as runs:
            trainers = {n: runs.enter_context(build(n)) for n in numbers}
            for number in range(1, args.rounds + 2):
                for n, trainer in trainers.items():
                    began = time.process_time()
                    trainer.step(number)
                    if number > 1:  # the first makes what is made once
                        times[n].append(time.process_time() - began)
        each = {n: trainer.rows_per_step * trainer.config.training.seq_len for n, trainer in trainers.items()}
        us = {n: 1e6 * statistics.median(times[n]) / each[n] for n in numbers}
        print(f"{name:26}" + "".join(f"{n:>14,}" for n in numbers))
        print(f"{'us per token':26}" + "".join(f"{us[n]:14,.1f}" for n in numbers))
        print(f"{'to the first':26}" + "".join(f"{us[n] / us[numbers[0]]:14.2f}" for n in numbers), flush=True)


if __name__ == "__main__":
    main()
