"""The grouped product of a mixture of experts on a CPU: ours, PyTorch's kernel, and a Python loop over groups.

    pip install models/qwen3
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/grouped_cpu.py

Forward and backward of 4,096 rows of width 256 times matrices of 512 x 256 in fp32, the rows spread over the groups at
random. The contenders take turns in one process; results and gradients must agree. Ratios are to ours, per round of
turns: median (lowest to highest).
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from side_by_side import in_turns, ratios
from torch import Tensor
from torch.nn import functional as F

from core.nn.grouped import grouped_mm

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernel(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
    return torch._grouped_mm(x_RI, weight_GOI.mT, offs=counts_G.cumsum(0, dtype=torch.int32))


def loop(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor) -> Tensor:
    return torch.cat([F.linear(x, weight) for x, weight in zip(x_RI.split(counts_G.tolist()), weight_GOI, strict=True)])


CONTENDERS: dict[str, Product] = {"ours": grouped_mm, "torch._grouped_mm": kernel, "loop of F.linear": loop}


def table(n_groups: int, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(n_groups)
    counts_G = torch.randint(n_groups, (args.rows,), generator=generator).bincount(minlength=n_groups)
    x_RI = torch.randn(args.rows, args.n_in, generator=generator, requires_grad=True)
    weight_GOI = torch.randn(n_groups, args.n_out, args.n_in, generator=generator, requires_grad=True)
    grad_RO = torch.randn(args.rows, args.n_out, generator=generator)

    def train(product: Product) -> tuple[Tensor, ...]:
        y_RO = product(x_RI, weight_GOI, counts_G)
        return y_RO, *torch.autograd.grad(y_RO, (x_RI, weight_GOI), grad_RO)

    expected = train(grouped_mm)
    for product in CONTENDERS.values():
        torch.testing.assert_close(train(product), expected, rtol=1e-4, atol=1e-3)
    steps = {name: lambda number, p=product: train(p)[0].sum().item() for name, product in CONTENDERS.items()}
    times = in_turns(steps, args.rounds)
    print(f"\n{f'{n_groups} groups':18}{'CPU ms':>8}  {'ratio by wall time':24}{'ratio by CPU time':24}")
    for name, shown in ratios(times, to="ours", faster=False).items():
        print(f"{name:18}{1e3 * statistics.median(cpu for _, cpu in times[name]):>8.1f}  {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--n_in", type=int, default=256)
    parser.add_argument("--n_out", type=int, default=512)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender")
    args = parser.parse_args()
    for n_groups in args.groups:
        table(n_groups, args)


if __name__ == "__main__":
    main()
