"""Public runs beside what is predicted of them: python -m autolayout.published [--rank].

The runs are torchtitan's of December 2024 on H100 of 96 GB and 500 W, eight in a host, 400 Gb/s for each to other hosts
(benchmarks/llama3_h100_202412_torchtitan.md in its repository). Rows of 8,192 tokens where nothing else is said. Its
pipelines had as many microbatches as stages on different ranks then (pull request 781), and its loss held all logits.
Rates are fitted to some of them alone (FITTED).

With --rank each run's ranks are searched (half an hour), and it is printed where the published layout stands among
those that the program could run: gradients were not accumulated over microbatches (pull request 1238 did that in June
2025). PyTorch of that time compiled `full` with tensor parallelism, so that the checks are those of a run that is not
compiled.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from autolayout.estimate import Estimate, Estimator
from autolayout.hardware import H100
from autolayout.layout import Layout, candidates, possible
from autolayout.search import best_of_degrees
from core.config.help import show
from core.quantization.float8 import Float8LinearConverter
from core.train.trainer import Trainer
from llama3.configs import llama3_8b, llama3_70b, llama3_405b

ON_8 = Layout(rows=2)
ON_256 = Layout(tensor=8, rows=16, mode="full")
ON_512 = Layout(pipeline=8, tensor=8, rows=4, mode="full")
LOSS_BYTES = 10
"""PyTorch's cross_entropy keeps log-probabilities and a gradient of 4 bytes for each logit, and one of 2 bytes of what
the head made, where our loss writes over its logits."""
VOCABULARY = 128_256
RECIPES = {"8B": llama3_8b, "70B": llama3_70b, "405B": llama3_405b}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layout stands among those that fit, by the time of a step; the fastest is 1."""

    own: Estimate
    rank: int
    n: int
    of_degrees: int
    """Of its degrees, of each of which the fastest layout counts."""
    n_degrees: int
    of_best: float
    """The time of the fastest, of its own."""

    def __str__(self) -> str:
        whole = f"{self.of_degrees} of {self.n_degrees} degrees, {self.rank} of {self.n} layouts"
        return f"{whole}; the best takes {self.of_best:.2f} of its time, {self.own.peak_gib:.1f} GiB"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run, and the tokens a second of each of its ranks."""

    size: str
    world_size: int
    layout: Layout
    rows: int
    """Of a step."""
    tokens_per_second: float
    gib: float
    """Memory that the allocator of the fullest rank had reserved."""
    seq_len: int = 8192
    compiled: bool = True
    float8: bool = True
    asynchronous: bool = False
    """Tensor parallelism whose messages overlap with products."""

    def config(self) -> Trainer.Config:
        """Our run that is like it."""
        config = RECIPES[self.size]()
        config.training.seq_len, config.training.global_batch_size = self.seq_len, self.rows
        config.model.max_seq_len = max(config.model.max_seq_len, self.seq_len)
        config.compile.enable, config.loss.chunk_tokens = self.compiled, "off"
        converter = Float8LinearConverter.Config(enable_fsdp_float8_all_gather=True)
        config.converters = [converter] if self.float8 else []
        config.parallelism.enable_async_tensor_parallel = self.asynchronous
        return config

    def predicted(self) -> tuple[float, float]:
        """Tokens a second of a rank and the memory of the fullest one, as they are estimated."""
        found = self.with_its_loss(Estimator(self.config(), self.world_size, H100)(self.layout))
        return self.rows * self.seq_len / self.world_size / found.seconds, found.peak_gib

    def with_its_loss(self, found: Estimate) -> Estimate:
        """An estimate with what the program's loss held beside ours."""
        layout = found.layout
        logits = layout.rows * self.seq_len * VOCABULARY / (layout.context * layout.tensor)
        return replace(found, peak_bytes=found.peak_bytes + LOSS_BYTES * logits)

    def place(self) -> Place:
        """Where the layout stands among those of as many ranks of as much memory and rows of a step that its program
        could run."""
        plain = replace(self, compiled=False, asynchronous=False).config()
        offered = candidates(plain, self.world_size, H100.ranks_per_host)
        layouts, _ = possible(plain, self.world_size, filter(self.could_be, offered))
        estimate = Estimator(self.config(), self.world_size, H100)
        estimates = [self.with_its_loss(estimate(layout)) for layout in layouts]
        return place_of(self.layout, estimates, H100.memory_gib)

    def could_be(self, layout: Layout) -> bool:
        """Whether the program of then could run a layout: without a pipeline it had one microbatch in a step."""
        return layout.pipeline > 1 or layout.rows == self.rows // layout.data(self.world_size)

    def __str__(self) -> str:
        words = ["compiled"] * self.compiled + ["float8"] * self.float8 + ["asynchronous"] * self.asynchronous
        return f"{self.size} on {self.world_size}, {self.seq_len}: {', '.join([str(self.layout), *words])}"


RUNS = [
    Published(
        size="8B", world_size=8, layout=ON_8, rows=16, compiled=False, float8=False, tokens_per_second=5762, gib=82.4
    ),
    Published(size="8B", world_size=8, layout=ON_8, rows=16, float8=False, tokens_per_second=6667, gib=77.0),
    Published(size="8B", world_size=8, layout=ON_8, rows=16, tokens_per_second=8532, gib=76.8),
    Published(
        size="8B", world_size=128, layout=ON_8, rows=256, compiled=False, float8=False, tokens_per_second=5605, gib=67.0
    ),
    Published(size="8B", world_size=128, layout=ON_8, rows=256, float8=False, tokens_per_second=6514, gib=62.0),
    Published(size="8B", world_size=128, layout=ON_8, rows=256, tokens_per_second=8380, gib=61.8),
    Published(
        size="8B", world_size=8, layout=Layout(mode="full"), rows=8, seq_len=32768, tokens_per_second=3890, gib=83.9
    ),
    Published(
        size="8B",
        world_size=8,
        layout=Layout(context=2, mode="full"),
        rows=4,
        seq_len=65536,
        tokens_per_second=2540,
        gib=84.2,
    ),
    Published(size="70B", world_size=256, layout=ON_256, rows=512, tokens_per_second=829, gib=71.9),
    Published(
        size="70B",
        world_size=256,
        layout=ON_256,
        rows=512,
        asynchronous=True,
        tokens_per_second=876,
        gib=67.6,
    ),
    Published(
        size="405B",
        world_size=512,
        layout=ON_512,
        rows=256,
        asynchronous=True,
        tokens_per_second=100,
        gib=82.5,
    ),
    Published(
        size="405B",
        world_size=512,
        layout=replace(ON_512, interleaved=True),
        rows=256,
        asynchronous=True,
        tokens_per_second=128,
        gib=72.7,
    ),
]


FITTED = (0, 1, 2, 3, 4, 6, 8, 9)
"""The places in RUNS of those that the rates of `H100` were fitted to; no other run changed a figure."""
FURTHER = [
    *(
        Published(
            size="8B",
            world_size=8,
            layout=Layout(context=n, mode="full"),
            rows=8 // n,
            seq_len=32768 * n,
            tokens_per_second=rate,
            gib=gib,
        )
        for n, rate, gib in ((4, 1071, 84.0), (8, 548, 84.5))
    ),
    *(
        Published(
            size="405B",
            world_size=512,
            layout=replace(ON_512, rows=1, context=n),
            rows=64 // n,
            seq_len=32768 * n,
            asynchronous=True,
            tokens_per_second=rate,
            gib=gib,
        )
        for n, rate, gib in ((1, 76, 75.3), (2, 47, 75.9), (4, 31, 77.1), (8, 16, 84.9))
    ),
]
"""Further runs, of long rows."""


def place_of(layout: Layout, estimates: Iterable[Estimate], memory_gib: float) -> Place:
    """Where a layout stands among these, of which those that do not fit this memory are left out."""
    fits = sorted((each for each in estimates if each.peak_gib <= memory_gib), key=lambda each: each.seconds)
    (own,) = (each for each in fits if each.layout == layout)
    best = best_of_degrees(fits)
    return Place(
        own=own,
        rank=1 + sum(each.seconds < own.seconds for each in fits),
        n=len(fits),
        of_degrees=1 + [each.layout.degrees for each in best].index(layout.degrees),
        n_degrees=len(best),
        of_best=fits[0].seconds / own.seconds,
    )


def table(*, rank: bool = False) -> Iterator[str]:
    """A line for each run."""
    width = max(len(str(run)) for run in RUNS + FURTHER)
    yield f"{'':{width}}  published  predicted              GiB  predicted"
    for number, run in enumerate(RUNS + FURTHER):
        rate, gib = run.predicted()
        line = f"{run!s:{width}}  {run.tokens_per_second:9,.0f}  {rate:9,.0f}  {rate / run.tokens_per_second - 1:+5.0%}"
        line += f"  {run.gib:8.1f}  {gib:9.1f}  {'fitted' if number in FITTED else 'held out'}"
        yield f"{line}  {run.place()}" if rank and run in RUNS else line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Public runs beside what is predicted of them.")
    parser.add_argument("--rank", action="store_true", help="search each run's ranks, and say where its layout stands")
    for line in table(rank=parser.parse_args().rank):
        show(line)
