"""Attention on a CPU, forward and backward: in tiles, and in one call of PyTorch's kernel with a table for a mask.

    pip install models/qwen3
    OMP_NUM_THREADS=1 python benchmarks/attention_cpu.py

Both take turns on the same numbers and must agree before anything is timed. Ratios are to the one call, by CPU time:
median (lowest to highest); less is faster. The last column compares with rows that are single documents.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.nn.kernel import Positions, visible
from core.nn.sdpa import SDPA, with_sinks


class Case(NamedTuple):
    """One row of the table: `documents` of equal length in a row, 8 query heads of width 64 to 2 key/value heads."""

    name: str
    rows: int
    length: int
    documents: int = 1
    window: int | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def positions(self) -> Positions:
        if self.documents == 1:
            return Positions.rows(torch.zeros(self.rows, self.length))
        place, each = torch.arange(self.length), self.length // self.documents
        return Positions(*((part.expand(self.rows, -1).contiguous()) for part in (place % each, place // each)))


CASES = [
    Case("causal", 2, 512),
    Case("causal", 8, 256),
    Case("causal", 1, 2048),
    Case("causal, bf16", 8, 256, dtype=torch.bfloat16),
    Case("causal, bf16", 1, 2048, dtype=torch.bfloat16),
    Case("window of 128, sinks", 2, 512, window=128, sinks=True),
    Case("window of 128, sinks", 1, 2048, window=128, sinks=True),
    Case("window of 128, sinks", 1, 4096, window=128, sinks=True),
    Case("sinks", 1, 2048, sinks=True),
    Case("8 documents", 2, 2048, documents=8),
    Case("64 documents", 2, 2048, documents=64),
    Case("512 documents", 2, 2048, documents=512),
]


def in_one_call(case: Case) -> Callable[..., Tensor]:
    """PyTorch's scaled_dot_product_attention with a table of queries by keys, unless the causal flag says it all."""
    rule, place = visible(case.positions, case.window), torch.arange(case.length)
    row = torch.arange(case.positions.grid[0])
    table = rule(row[:, None, None], None, place[None, :, None], place[None, None])[:, None]
    plain = case.documents == 1 and case.window is None and not case.sinks

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor | None = None) -> Tensor:
        scale, mask = q.shape[-1] ** -0.5, None if plain else table
        if sinks_N is not None:
            q, k, v, mask = with_sinks(q, k, v, mask, sinks_N / scale)
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, enable_gqa=True, scale=scale)
        return o[..., :64]

    return attend


def in_tiles(case: Case) -> Callable[..., Tensor]:
    kernel = SDPA(case.window)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor | None = None) -> Tensor:
        return kernel(q, k, v, kernel.mask(case.positions), scale=q.shape[-1] ** -0.5, sinks_N=sinks_N)

    return attend


def seconds(attend: Callable[..., Tensor], sides: list[Tensor]) -> tuple[float, list[Tensor]]:
    """CPU time of forward and backward, and the result with the gradients."""
    began = time.process_time()
    o = attend(*sides)
    gradients = torch.autograd.grad(o, sides, torch.ones_like(o))
    return time.process_time() - began, [o, *gradients]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    rounds = parser.parse_args().rounds
    print(f"{'rows x length':14}{'':22}{'one call ms':>12}{'tiles ms':>10}  {'tiles to one call':22}{'to causal':>10}")
    for case in CASES:
        heads = [(case.rows, case.length, n, 64) for n in (8, 2, 2)]
        sides = [torch.randn(shape, dtype=case.dtype).transpose(1, 2).requires_grad_() for shape in heads]
        sinks = [torch.randn(8, requires_grad=True)] * case.sinks
        contenders = {"one call": in_one_call(case), "tiles": in_tiles(case)}
        causal = in_tiles(Case("causal", case.rows, case.length))
        (_, expected), (_, found) = (seconds(attend, sides + sinks) for attend in contenders.values())
        tolerance = 2e-4 if case.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        times = {name: [] for name in (*contenders, "causal")}
        for _ in range(rounds):
            for name, attend in contenders.items():
                times[name].append(seconds(attend, sides + sinks)[0])
            times["causal"].append(seconds(causal, sides)[0])
        row = sorted(b / a for a, b in zip(times["one call"], times["tiles"], strict=True))
        one, tiled, plain = (1000 * statistics.median(times[name]) for name in times)
        ratio = f"{statistics.median(row):.2f} ({row[0]:.2f} to {row[-1]:.2f})"
        shape = f"{case.rows} x {case.length}"
        print(f"{shape:14}{case.name:22}{one:>12.1f}{tiled:>10.1f}  {ratio:22}{tiled / plain:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
