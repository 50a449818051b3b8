"""Start-up: from the command to the first training step, and `--help`, against `import torch` alone.

    pip install models/qwen3
    python benchmarks/startup.py

The commands take turns; the run stops where its first step would begin. The corpus is prepared before.
Prints seconds and ratios as median (lowest to highest); both are to be at most 1.05.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "import torch": "import torch",
    "--help": """
from core.config.cli import main
main("qwen3.configs", ["--help"])
""",
    "first step": """
import os, sys
from core.config import cli
recipe_module = cli.recipe_module
def ending(configs):
    module = recipe_module(configs)
    from core.train import trainer
    trainer.train_step = lambda *args, **settings: os._exit(0)
    return module
cli.recipe_module = ending
cli.main("qwen3.configs", ["--config", "qwen3_debug", "--dump_folder", sys.argv[1]])
""",
}


def seconds(code: str) -> tuple[float, float]:
    """(wall, CPU) of a new interpreter that runs `code`."""
    with tempfile.TemporaryDirectory() as folder:
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, folder], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - wall, cpu


def main(rounds: int = 7) -> None:
    for code in COMMANDS.values():
        seconds(code)
    times = [{name: seconds(code) for name, code in COMMANDS.items()} for _ in range(rounds)]
    for kind, clock in enumerate(("wall", "CPU")):
        for name in COMMANDS:
            ratios = sorted(turn[name][kind] / turn["import torch"][kind] for turn in times)
            print(
                f"{clock:5}{name:14}{statistics.median(turn[name][kind] for turn in times):6.2f} s   "
                f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
