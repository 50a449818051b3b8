"""Start-up: from the command to the first training step, against `import torch` alone.

    pip install models/qwen3
    python benchmarks/startup.py

The two commands take turns; the run stops where its first step would begin. The corpus is prepared before.
Prints seconds and ratios as median (lowest to highest); the ratio is to be at most 2.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time

TORCH = "import torch"
FIRST_STEP = """
import os, sys
from core.config.cli import main
from core.train import trainer
from qwen3 import configs
trainer.train_step = lambda *args, **settings: os._exit(0)
main(configs, ["--config", "qwen3_debug", "--dump_folder", sys.argv[1]])
"""


def seconds(code: str) -> tuple[float, float]:
    """(wall, CPU) of a new interpreter that runs `code`."""
    with tempfile.TemporaryDirectory() as folder:
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, folder], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - wall, cpu


def main(rounds: int = 7) -> None:
    for code in (TORCH, FIRST_STEP):
        seconds(code)
    pairs = [(seconds(TORCH), seconds(FIRST_STEP)) for _ in range(rounds)]
    for kind, name in enumerate(("wall", "CPU")):
        torch_s, ours_s = ([pair[who][kind] for pair in pairs] for who in (0, 1))
        ratios = sorted(ours / theirs for ours, theirs in zip(ours_s, torch_s, strict=True))
        print(
            f"{name:5} import torch {statistics.median(torch_s):.2f} s, first step {statistics.median(ours_s):.2f} s, "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
