"""What torch.compile costs before the first step on a CPU: debug recipes, with nothing kept from before, and again.

    pip install models/llama3 models/qwen3 models/deepseek_v3 models/gpt_oss
    python benchmarks/compile_cpu.py

Each is a whole run of one step in a new process. Its first has an empty cache, and compiles PyTorch's header too, which
recipes share otherwise; its second finds all. Seconds of CPU are those of all processes.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = {
    "llama3_debug": "llama3",
    "qwen3_debug": "qwen3",
    "qwen3_moe_debug": "qwen3",
    "gpt_oss_debug": "gpt_oss",
    "deepseek_v3_debug": "deepseek_v3",
}


def seconds(recipe: str, folder: Path, *options: str) -> tuple[float, float]:
    """(wall, CPU) of a run of one step, whose cache is in `folder`."""
    words = ["-m", f"{RECIPES[recipe]}.train", "--config", recipe, "--training.steps", "1", "--validator.no-enable"]
    env = {**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    with tempfile.TemporaryDirectory() as run:
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, *words, "--dump_folder", f"{run}/run", *options]
        ran = subprocess.run(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            raise SystemExit(f"{recipe}: {ran.stderr[-3000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="these alone")
    print(f"{'':20}{'first: wall, CPU s':>22}{'again: wall, CPU s':>22}{'eager: wall, CPU s':>22}")
    for recipe in parser.parse_args().recipes:
        with tempfile.TemporaryDirectory() as folder:
            turns = [seconds(recipe, Path(folder), *options) for options in [["--compile.enable"]] * 2 + [[]]]
        print(f"{recipe:20}" + "".join(f"{f'{wall:.1f}, {cpu:.1f}':>22}" for wall, cpu in turns), flush=True)


if __name__ == "__main__":
    main()
