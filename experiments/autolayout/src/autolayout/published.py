"""Public runs beside what is predicted of them: python -m autolayout.published.

The runs are torchtitan's of December 2024 on H100 of 96 GB and 500 W, eight in a host, 400 Gb/s for each to other hosts
(benchmarks/llama3_h100_202412_torchtitan.md in its repository). Rows of 8,192 tokens where nothing else is said.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from autolayout.estimate import Estimator
from autolayout.hardware import H100
from autolayout.layout import Layout
from core.config.help import show
from core.quantization.float8 import Float8LinearConverter
from core.train.trainer import Trainer
from llama3.configs import llama3_8b, llama3_70b, llama3_405b

ON_8 = Layout(rows=2)
ON_256 = Layout(tensor=8, rows=16, mode="full")
ON_512 = Layout(pipeline=8, tensor=8, mode="full")
RECIPES = {"8B": llama3_8b, "70B": llama3_70b, "405B": llama3_405b}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run, and the tokens a second of each of its ranks."""

    size: str
    world_size: int
    layout: Layout
    rows: int
    """Of a step."""
    tokens_per_second: float
    seq_len: int = 8192
    compiled: bool = True
    float8: bool = True
    asynchronous: bool = False
    """Tensor parallelism whose messages overlap with products."""

    def config(self) -> Trainer.Config:
        """Our run that is like it."""
        config = RECIPES[self.size]()
        config.training.seq_len, config.training.global_batch_size = self.seq_len, self.rows
        config.compile.enable = self.compiled
        converter = Float8LinearConverter.Config(enable_fsdp_float8_all_gather=True)
        config.converters = [converter] if self.float8 else []
        config.parallelism.enable_async_tensor_parallel = self.asynchronous
        return config

    def predicted(self) -> float:
        """Tokens a second of a rank, as they are estimated."""
        seconds = Estimator(self.config(), self.world_size, H100)(self.layout).seconds
        return self.rows * self.seq_len / self.world_size / seconds

    def __str__(self) -> str:
        words = ["compiled"] * self.compiled + ["float8"] * self.float8 + ["asynchronous"] * self.asynchronous
        return f"{self.size} on {self.world_size}, {self.seq_len}: {', '.join([str(self.layout), *words])}"


RUNS = [
    Published(size="8B", world_size=8, layout=ON_8, rows=16, compiled=False, float8=False, tokens_per_second=5762),
    Published(size="8B", world_size=8, layout=ON_8, rows=16, float8=False, tokens_per_second=6667),
    Published(size="8B", world_size=8, layout=ON_8, rows=16, tokens_per_second=8532),
    Published(size="8B", world_size=128, layout=ON_8, rows=256, compiled=False, float8=False, tokens_per_second=5605),
    Published(size="8B", world_size=128, layout=ON_8, rows=256, float8=False, tokens_per_second=6514),
    Published(size="8B", world_size=128, layout=ON_8, rows=256, tokens_per_second=8380),
    Published(size="8B", world_size=8, layout=Layout(mode="full"), rows=8, seq_len=32768, tokens_per_second=3890),
    Published(
        size="8B", world_size=8, layout=Layout(context=2, mode="full"), rows=4, seq_len=65536, tokens_per_second=2540
    ),
    Published(size="70B", world_size=256, layout=ON_256, rows=512, tokens_per_second=829),
    Published(size="70B", world_size=256, layout=ON_256, rows=512, asynchronous=True, tokens_per_second=876),
    Published(size="405B", world_size=512, layout=ON_512, rows=256, asynchronous=True, tokens_per_second=100),
    Published(
        size="405B",
        world_size=512,
        layout=Layout(pipeline=8, interleaved=True, tensor=8, mode="full"),
        rows=256,
        asynchronous=True,
        tokens_per_second=128,
    ),
]


def table() -> Iterator[str]:
    """A line for each run."""
    width = max(len(str(run)) for run in RUNS)
    yield f"{'':{width}}  published  predicted"
    for run in RUNS:
        found = run.predicted()
        yield f"{run!s:{width}}  {run.tokens_per_second:9,.0f}  {found:9,.0f}  {found / run.tokens_per_second - 1:+.0%}"


if __name__ == "__main__":
    for line in table():
        show(line)
