"""What it costs to convert weights, beside copying their files: from-hf, to-hf, in files and in processes of their own.

    pip install models/qwen3
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/convert_cpu.py --gib 4

A Qwen3 of so many GiB in bfloat16, with drawn bytes, in files of one GiB, converted to our form and back, and copied,
each flushed to the disk, in turns; what was written is removed before the next turn. Ratios are to the copy: above 1 is
faster. Memory is the most that a process had, PyTorch's own included. The clocks of a conversion begin when its process
has loaded the command, because a copy loads nothing; what the command loads later counts. `import` is what a process
takes that loads the command and does nothing.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.runtime.meta import meta_model
from core.weights.atomic_folder import flush_all
from core.weights.files import write_files
from core.weights.hf import write_hf_config
from core.weights.key_map import hf_key_map
from core.weights.shard_file import Output, stretches
from qwen3.model import size

CALL = """
import sys, time
from qwen3.convert import *
wall, cpu = time.perf_counter(), time.process_time()
main({"qwen3": Qwen3}, sys.argv[1:]) if sys.argv[1:] else None
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(time.perf_counter() - wall, time.process_time() - cpu, peak)
"""


def drawn(shape: list[int], number: int) -> Iterator[Tensor]:
    """Values that are the same in every run."""
    generator = torch.Generator().manual_seed(number)
    for rows in stretches(shape, torch.bfloat16):
        n_rows = rows.stop - rows.start
        values = torch.randint(-(2**14), 2**14, (n_rows, *shape[1:]), generator=generator, dtype=torch.int16)
        yield values.view(torch.bfloat16)


def write_model(folder: Path, gib: float) -> None:
    """A Hugging Face folder of a Qwen3 with as many blocks as make up that size."""
    config = size("1.7B")
    config.n_layers = 1
    model = meta_model(config)
    ends, block = 0, 0
    for name, weight in model.named_parameters():
        if name.startswith("layers."):
            block += 2 * weight.numel()
        else:
            ends += 2 * weight.numel()
    config.n_layers = max(1, round((gib * 2**30 - ends) / block))
    model = meta_model(config)
    places = hf_key_map(model).places
    made = []
    for number, (name, weight) in enumerate(hf_key_map(model).weights.items()):
        shape = list(weight.shape)
        made.append(Output(places[name][0][0].key, shape, torch.bfloat16, partial(drawn, shape, number)))
    folder.mkdir()
    write_files(folder, made, 1.0)
    write_hf_config(model.to_hf_config(), made, folder)
    flush_all(folder)


class Taken(NamedTuple):
    wall_s: float
    cpu_s: float
    memory_mib: float


def convert(*words: str | Path) -> Taken:
    """What a process takes that converts, once it has loaded the command; or that just does this."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", CALL, *map(str, words)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    wall_s, cpu_s, peak_kib = map(float, run.stdout.split()[-3:])
    if not words:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall_s = time.perf_counter() - began
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(wall_s, cpu_s, peak_kib / 1024)


def copy(src: Path, dst: Path) -> Taken:
    began, before = time.perf_counter(), time.process_time()
    shutil.copytree(src, dst)
    flush_all(dst)
    return Taken(time.perf_counter() - began, time.process_time() - before, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the folder (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        there, here = Path(place) / "there", Path(place) / "here"
        write_model(there, asked.gib)
        convert("from-hf", there, here)
        gib = sum(file.stat().st_size for file in there.glob("*.safetensors")) / 2**30
        n_layers = json.loads((there / "config.json").read_text())["num_hidden_layers"]
        print(f"{gib:.2f} GiB, {n_layers} blocks", flush=True)
        taken: dict[str, list[Taken]] = {"import": [], "copy": [], "from-hf": [], "to-hf": []}
        for _ in range(asked.rounds):
            for name in taken:
                os.sync()
                dst = Path(place) / "dst"
                if name == "copy":
                    taken[name].append(copy(there, dst))
                else:
                    words = [] if name == "import" else [name, there if name == "from-hf" else here, dst]
                    taken[name].append(convert(*words))
                shutil.rmtree(dst, ignore_errors=True)
        show(taken, gib * 1024)


def show(taken: dict[str, list[Taken]], mib: float) -> None:
    """A line for each."""
    print(f"{'':10}{'wall s':>8}  {'copy to it':22}{'MiB/s':>8}{'CPU s':>8}{'memory':>12}")
    for name, each in taken.items():
        wall_s, cpu_s, _ = zip(*each, strict=True)
        ratios = sorted(copied.wall_s / one for copied, one in zip(taken["copy"], wall_s, strict=True))
        told = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed, most = mib / statistics.median(wall_s), max(one.memory_mib for one in each)
        words = [f"{told:22}", f"{speed:>8,.0f}"] if name != "import" else [" " * 22, " " * 8]
        memory = f"{most:,.0f} MiB" if most else ""
        print(
            f"{name:10}{statistics.median(wall_s):>8.1f}  {''.join(words)}{statistics.median(cpu_s):>8.1f}{memory:>12}"
        )


if __name__ == "__main__":
    main()
