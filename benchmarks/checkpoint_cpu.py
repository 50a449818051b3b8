"""What saving, verifying and loading a checkpoint cost: our saver beside torch.save, plain dcp.save and the bare disk.

    pip install models/qwen3
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/checkpoint_cpu.py

All save the same tensors, flush them to the disk, remove what they saved before, and load them again, in turns in one
process; between turns the disk comes to rest. Ours also sums up what it writes, reads it back and compares; loading
with it verifies first. The bare disk is one write of as many bytes from memory, flushed, and one read. Ratios are to
plain dcp, of wall and of CPU times, per round of turns: median (lowest to highest); below 1 is faster. A file that a
verification reads twice ends the run.

Then steps of a small model, of which every tenth is saved: the stall is what the loop waits for the saver, as a share
of all steps; `all told` is what the steps between take longer as well, while the writing goes on behind them.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from side_by_side import DEFAULTS, make_trainer, ratios
from torch import Tensor

from core.checkpoint.find import Found
from core.checkpoint.manifest import Progress
from core.checkpoint.saver import Saver
from core.checkpoint.settings import Checkpoint
from core.checkpoint.sums import SUM_BYTES
from core.runtime.ranks import Ranks
from core.train.state import model_tensors, optimizer_tensors

State = dict[str, Tensor]
INTERVAL = 10


def state(mib: int) -> State:
    """Weights and two moments of layers of four matrices each, of so many MiB in all."""
    n_layers = max(1, mib // 48)
    shapes = {f"layers.{i}.w{j}": (1024, 1024) for i in range(n_layers) for j in range(4)}
    kinds = ("model", "optimizer.first", "optimizer.second")
    return {f"{kind}.{name}": torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


class Ours:
    def __init__(self, folder: Path) -> None:
        settings = Checkpoint(enable=True, keep_latest_k=1)
        (folder / settings.folder).mkdir(parents=True)
        self.saver = Saver(settings, Ranks(), run_folder=folder, config="{}", export=lambda found, path: None)
        self.step = 0

    def save(self, tensors: State) -> None:
        self.step += 1
        self.saver.save(Progress(step=self.step), tensors, kind="full", wait=True)

    def find(self) -> Found:
        found = self.saver.find()
        assert found is not None
        return found

    def load(self, tensors: State) -> None:
        self.saver.load(self.find(), tensors)

    def check_reads(self) -> None:
        """Every stretch of every file of a checkpoint is summed up once when it is verified."""
        summed: list[str] = []
        storage: Any = self.saver.storage
        undisturbed = storage._stretch
        storage._stretch = lambda name, *place: (summed.append(name.rpartition("/")[2]), undisturbed(name, *place))[1]
        files = self.find().manifest.files
        del storage._stretch
        wanted = {name: max(1, -(-file.n_bytes // SUM_BYTES)) for name, file in files.items()}
        assert {name: summed.count(name) for name in files} == wanted, f"summed up: {summed}"


class Other(ABC):
    """Another way to save, which keeps what it saved last until the next is written, as ours does."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = folder / "old", folder / "new"

    def save(self, tensors: State) -> None:
        self.new.mkdir(parents=True)
        self.write(tensors)
        shutil.rmtree(self.old, ignore_errors=True)
        self.new.rename(self.old)

    @abstractmethod
    def write(self, tensors: State) -> None:
        """Write to `new`, flushed."""

    @abstractmethod
    def load(self, tensors: State) -> None:
        """Read from `old` into the tensors."""


class Torch(Other):
    def write(self, tensors: State) -> None:
        with (self.new / "state.pt").open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, tensors: State) -> None:
        for name, values in torch.load(self.old / "state.pt", weights_only=True).items():
            tensors[name].copy_(values)


class Plain(Other):
    def write(self, tensors: State) -> None:
        dcp.save(tensors, checkpoint_id=self.new, no_dist=True)

    def load(self, tensors: State) -> None:
        dcp.load(tensors, checkpoint_id=self.old, no_dist=True)


class Disk(Other):
    bytes = bytearray()

    def write(self, tensors: State) -> None:
        if not self.bytes:
            self.bytes = bytearray(sum(tensor.nbytes for tensor in tensors.values()))
        with (self.new / "bytes").open("wb", buffering=0) as file:
            file.write(self.bytes)
            os.fsync(file.fileno())

    def load(self, tensors: State) -> None:
        with (self.old / "bytes").open("rb", buffering=0) as file:
            file.readinto(self.bytes)


def seconds(do: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds; CPU time counts all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(folder: Path, mib: int, rounds: int) -> None:
    tensors = state(mib)
    n_mib = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    kinds = {"armature": Ours, "plain dcp": Plain, "torch": Torch, "disk": Disk}
    contenders = {name: kind(folder / name) for name, kind in kinds.items()}
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {"save": {}, "load": {}}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            target = {key: torch.zeros_like(value) for key, value in tensors.items()}
            os.sync()
            times = {"save": seconds(lambda c=contender: c.save(tensors))}
            times["load"] = seconds(lambda c=contender, t=target: c.load(t))
            if name != "disk":
                assert all(torch.equal(target[key], value) for key, value in tensors.items()), name
            if number > 0:
                for way, clocks in times.items():
                    taken[way].setdefault(name, []).append(clocks)
    ours = contenders["armature"]
    assert isinstance(ours, Ours)
    ours.check_reads()
    print(f"{n_mib:,.0f} MiB in {len(tensors)} tensors\n{'':18}{'MiB/s':>8}  {'wall time':24}CPU time")
    for way, times in taken.items():
        for name, shown in ratios(times, to="plain dcp", faster=False).items():
            speed = n_mib / statistics.median(wall for wall, _ in times[name])
            print(f"{way + ' ' + name:18}{speed:>8,.0f}  {shown}")


def stall(folder: Path, rounds: int) -> None:
    trainer = make_trainer(folder / "trainer", argparse.Namespace(**DEFAULTS | {"rows": 4, "length": 256}), mode="none")
    saver = trainer.checkpoints.saver
    tensors = model_tensors(trainer.built.models) | optimizer_tensors(trainer.optimizer)
    waits: dict[str, list[float]] = {}
    walls: dict[str, list[float]] = {}
    step = 0
    for _ in range(rounds + 1):
        for mode in ("nothing", "disabled", "async"):
            os.sync()
            waited, began = 0.0, time.perf_counter()
            for number in range(INTERVAL):
                step += 1
                trainer.step(step)
                if number == 0 and mode != "nothing":
                    saver.settings.async_mode = mode
                    progress = trainer.checkpoints.progress(step)
                    waited += seconds(lambda p=progress: saver.save(p, tensors, kind="full", wait=False))[0]
            waited += seconds(saver.wait)[0]
            walls.setdefault(mode, []).append(time.perf_counter() - began)
            waits.setdefault(mode, []).append(waited)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    step_s = statistics.median(walls["nothing"][1:]) / INTERVAL
    print(f"\n{size:,.0f} MiB saved every {INTERVAL} steps of {step_s:.2f} s\n{'async_mode':18}{'stall':>8}  all told")
    for mode in ("disabled", "async"):
        shares = [wait / wall for wait, wall in zip(waits[mode][1:], walls["nothing"][1:], strict=True)]
        more = sorted(a / b - 1 for a, b in zip(walls[mode][1:], walls["nothing"][1:], strict=True))
        told = f"{statistics.median(more):.1%} ({more[0]:.1%} to {more[-1]:.1%})"
        print(f"{mode:18}{statistics.median(shares):>8.1%}  {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=384, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args.mib, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        stall(Path(folder), args.rounds)


if __name__ == "__main__":
    main()
