"""One graph per step against eager training and torch.compile per block, in one run: python -m graph_trainer.benchmark.

Prints, for a small Qwen3 on one thread of this machine's CPU: CPU seconds until the first step is done, which has all
tracing and compiling, compilers that are called included; the CPU time of a step, the median of rounds in which every
way takes its turn, and of eager's in the same round, with the least and the most; the most memory that a step has
allocated at once, by the profiler. Then, on two ranks, the peak and the bytes that a rank sends by FSDP2 and by simple
FSDP, with and without merging, interpreted.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

from core.activation_checkpoint.meter import Meter
from core.nn.balance import start_step
from core.parallel.layout import SingleRank
from core.parallel.many_ranks import ManyRanks
from core.plan.traffic import message
from core.runtime.device import MIB
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.testing.parity import Case, batches_of, build_case
from core.testing.ranks import run_ranks
from graph_trainer.settings import GraphCompile, PassName
from graph_trainer.steps import built_for_graphs
from qwen3.model import size

MERGED: list[PassName] = ["dead_code", "save_set", "merge_collectives", "prefetch"]
CPU = torch.device("cpu")


class Way(NamedTuple):
    """A way to train, and its first step."""

    name: str
    step: Callable[[], Any]
    first_s: float


def case_of(n_layers: int, n_rows: int, length: int, world_size: int = 1) -> Case:
    """A small Qwen3 in mode selective."""
    model = size("debug")
    model.n_layers = n_layers
    settings = {"n_rows": n_rows, "length": length, "loss": CrossEntropy.Config(), "empty_rows": 0}
    return Case(model, world_size=world_size, checkpoint="selective", **settings)


def eager_way(case: Case) -> Callable[[], Any]:
    """A step without a graph, on one rank or by FSDP2; compiled block by block if `case` says so."""
    layout = SingleRank(CPU) if case.world_size == 1 else ManyRanks(case.parallelism, CPU)
    built = build_case(case, layout)
    settings = {"layout": layout, "dtype": case.compute_dtype, "mask": case.mask}
    return step_of(case, Objective(built.models, case.loss.build(), **settings))


def graph_way(case: Case, graphs: GraphCompile) -> Callable[[], Any]:
    """A step by a graph."""
    _, objective = built_for_graphs(case, graphs)
    return step_of(case, objective)


def step_of(case: Case, objective: Objective) -> Callable[[], Any]:
    """Forward, loss and backward of the rank's rows, from no gradients."""
    (model,) = objective.stages
    (batch,) = batches_of(case, objective.layout)
    batch = batch._replace(labels_BL=batch.labels_BL.clamp(min=0))  # eager leaves out what has no label

    def step() -> Any:
        for weight in model.parameters():
            weight.grad = None
        start_step(model, 1.0)
        return objective.accumulate([batch], float(batch.labels_BL.numel()))

    return step


def timed(step: Callable[[], Any]) -> float:
    began = cpu_seconds()
    step()
    return cpu_seconds() - began


def cpu_seconds() -> float:
    """CPU time of this process so far, and of those that it waited for."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def allocated(step: Callable[[], Any]) -> float:
    """The most MiB that a step has allocated at once, beside what stood before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / MIB


def on_one_rank(n_layers: int, n_rows: int, length: int, rounds: int, whole: bool) -> None:
    """Print the table of one rank."""
    case = case_of(n_layers, n_rows, length)
    inductor.compile_threads = 1  # compilers as children that are waited for, whose time is known
    torch.compile(torch.sin)(torch.ones(8))  # what compiling anything needs once
    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "eager": lambda: eager_way(case),
        "torch.compile per block": lambda: eager_way(case_compiled(case)),
        "graph, interpreted": lambda: graph_way(case, GraphCompile()),
        "graph, compiled by blocks": lambda: graph_way(case, GraphCompile(enable=True, regions="blocks")),
    }
    if whole:
        ways["graph, compiled whole"] = lambda: graph_way(case, GraphCompile(enable=True))
    steps = []
    for name, make in ways.items():
        step = make()
        steps.append(Way(name, step, timed(step)))
    times: dict[str, list[float]] = {way.name: [] for way in steps}
    for _ in range(rounds):
        for way in steps:
            times[way.name].append(timed(way.step))
    print(f"Qwen3 of {n_layers} blocks of width {case.model.dim}, {n_rows} x {length} tokens, selective, one thread")
    print(f"{'':28}{'first step s':>14}{'step ms':>10}{'of eager':>22}{'peak MiB':>10}")
    for way in steps:
        ratios = sorted(own / eager for own, eager in zip(times[way.name], times["eager"], strict=True))
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        row = f"{way.first_s:14.1f}{1e3 * median(times[way.name]):10.1f}{spread:>22}{allocated(way.step):10.1f}"
        print(f"{way.name:28}{row}", flush=True)


def case_compiled(case: Case) -> Case:
    """The same, compiled block by block as core does it."""
    return replace(case, compile="inductor")


class Sent(TorchDispatchMode):
    """Adds up the bytes that this rank sends by the collectives that are dispatched inside, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (found := message(func, args, out)) is not None:
            self.n_bytes += found.n_bytes
            self.calls += 1
        return out


def measured_on_rank(case: Case) -> list[tuple[str, int, int, int]]:
    """Ways to share weights: name, the peak of a step, how many messages this rank sends, and their bytes."""
    ways = {
        "FSDP2": lambda: eager_way(case),
        "simple": lambda: graph_way(case, GraphCompile()),
        "simple, merged": lambda: graph_way(case, GraphCompile(passes=MERGED)),
    }
    found = []
    for name, make in ways.items():
        step = make()
        step()
        with Meter() as meter:
            step()
        with Sent() as sent:
            step()
        found.append((name, meter.peak, sent.calls, sent.n_bytes))
    return found


def on_two_ranks(n_layers: int, n_rows: int, length: int) -> None:
    """Print the table of two ranks."""
    first, _ = run_ranks(measured_on_rank, 2, case_of(n_layers, n_rows, length, world_size=2), timeout_s=600)
    print(f"{'two ranks':28}{'peak MiB':>14}{'messages':>10}{'sent MiB':>10}")
    for name, peak, calls, n_bytes in first:
        print(f"{name:28}{peak / MIB:14.1f}{calls:10}{n_bytes / MIB:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("rows", 2), ("length", 128), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-whole", action="store_true", help="leave out the graph that is compiled whole: minutes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="graph-benchmark-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what an earlier run compiled counts as well
    try:
        on_two_ranks(asked.layers, 2 * asked.rows, asked.length)
        on_one_rank(asked.layers, asked.rows, asked.length, asked.rounds, not asked.no_whole)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
