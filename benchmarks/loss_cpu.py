"""The head and the loss on a CPU: ours in chunks, whole logits as ours were before, a chunked loss as Liger's kernels
compute it but of plain torch, and PyTorch's own chunked one.

    pip install models/qwen3
    OMP_WAIT_POLICY=PASSIVE python benchmarks/loss_cpu.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/loss_cpu.py --vocab-size 2048
    OMP_WAIT_POLICY=PASSIVE python benchmarks/loss_cpu.py --ignored 0.7

Forward and backward of the mean loss of some tokens in fp32. The contenders take turns in one process; losses and
gradients must agree. Ratios are to whole logits, per round of turns: median (lowest to highest). Memory is the peak of
all tensors that the loss makes: counted on fake tensors, so of any size, but for PyTorch's, which makes its own where
nobody can count; and measured, as what a process gains, for as many tokens as `--measured` says.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import in_turns, ratios
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from core.activation_checkpoint.meter import Meter
from core.data.packing import IGNORE
from core.nn.layers import Head
from core.parallel.vocabulary import WholeVocabulary
from core.step.loss import CrossEntropy

MeanLoss = Callable[[Tensor, Head, Tensor, int], Tensor]
"""Of a residual stream (B, L, D), a head, labels (B, L), of which so many are not IGNORE."""


def ours(x_BLD: Tensor, head: Head, labels_BL: Tensor, n: int) -> Tensor:
    loss = CrossEntropy.Config().build()
    return loss(x_BLD, labels_BL, head, WholeVocabulary(head.weight.shape[0]), n_labels=n, scale=1 / n)


def whole(x_BLD: Tensor, head: Head, labels_BL: Tensor, n: int) -> Tensor:
    losses = F.cross_entropy(head(x_BLD).flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.masked_fill(labels_BL.flatten() == IGNORE, 0.0).sum() / n


class LigerLike(torch.autograd.Function):
    """Chunks of T / (V / D) tokens; the gradient of the logits takes their place; zeros in the gradients are added to.

    The way of Liger-Kernel's fused linear cross-entropy (github.com/linkedin/Liger-Kernel), whose Triton kernel is
    here three operations of torch.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, n: int) -> Tensor:
        n_tokens, (vocab_size, dim) = x_TD.shape[0], weight_VD.shape
        rows = -(-n_tokens // -(-vocab_size // dim))
        rows = 1 << (rows - 1).bit_length()
        dx_TD, dweight_VD, total = torch.zeros_like(x_TD), torch.zeros_like(weight_VD), x_TD.new_zeros(())
        for x_CD, labels_C, dx_CD in zip(*(part.split(rows) for part in (x_TD, labels_T, dx_TD)), strict=True):
            log_p_CV = F.log_softmax(x_CD @ weight_VD.t(), -1)
            counts_C1 = (labels_C != IGNORE).unsqueeze(-1)
            index_C1 = labels_C.clamp(min=0).unsqueeze(-1)
            total -= (log_p_CV.gather(-1, index_C1) * counts_C1).sum() / n
            gradient_CV = log_p_CV.exp_()
            gradient_CV.scatter_add_(-1, index_C1, -torch.ones_like(index_C1, dtype=torch.float32))
            gradient_CV.mul_(counts_C1 / n)
            dx_CD.copy_(gradient_CV @ weight_VD)
            dweight_VD.addmm_(gradient_CV.t(), x_CD)
        ctx.save_for_backward(dx_TD, dweight_VD)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        dx_TD, dweight_VD = ctx.saved_tensors
        return dx_TD.mul_(grads[0]), dweight_VD.mul_(grads[0]), None, None


def liger_like(x_BLD: Tensor, head: Head, labels_BL: Tensor, n: int) -> Tensor:
    return LigerLike.apply(x_BLD.flatten(0, 1), head.weight, labels_BL.flatten(), n)


def torch_chunked(x_BLD: Tensor, head: Head, labels_BL: Tensor, n: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        x_BLD.flatten(0, 1), head.weight, labels_BL.flatten(), reduction="sum", ignore_index=IGNORE, options=options
    ).div(n)


CONTENDERS: dict[str, MeanLoss] = {
    "whole logits": whole,
    "ours": ours,
    "Liger's way": liger_like,
    "torch, chunked": torch_chunked,
}


def drawn(args: argparse.Namespace, n_tokens: int) -> tuple[Tensor, Head, Tensor, int]:
    generator = torch.Generator().manual_seed(1)
    head = Head(args.dim, args.vocab_size, std=0.02)
    head.weight.data = 0.02 * torch.randn(args.vocab_size, args.dim, generator=generator)
    x_BLD = torch.randn(1, n_tokens, args.dim, generator=generator).requires_grad_()
    labels_BL = torch.randint(args.vocab_size, (1, n_tokens), generator=generator)
    labels_BL[torch.rand(1, n_tokens, generator=generator) < args.ignored] = IGNORE
    return x_BLD, head, labels_BL, int((labels_BL != IGNORE).sum())


def train(loss: MeanLoss, x_BLD: Tensor, head: Head, labels_BL: Tensor, n: int) -> tuple[Tensor, ...]:
    mean = loss(x_BLD, head, labels_BL, n)
    return mean, *torch.autograd.grad(mean, (x_BLD, head.weight))


def counted(loss: MeanLoss, args: argparse.Namespace) -> int:
    """Bytes of the tensors that the loss makes, at their peak."""
    with FakeTensorMode():
        x_BLD = torch.empty(1, args.tokens, args.dim, requires_grad=True)
        head, labels_BL = Head(args.dim, args.vocab_size, std=0.02), torch.empty(1, args.tokens, dtype=torch.int64)
        with Meter() as meter:
            train(loss, x_BLD, head, labels_BL, round(args.tokens * (1 - args.ignored)))
        return meter.peak


def gained(name: str, args: argparse.Namespace) -> int:
    """Bytes that this process gains by the loss at its peak; the process is a fresh one."""
    inputs = drawn(args, args.measured)
    before = resident("VmRSS")
    train(CONTENDERS[name], *inputs)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process in memory: now, VmRSS, or at most, VmHWM (`ru_maxrss` begins with that of the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--ignored", type=float, default=0.0, help="share of the labels that do not count")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--measured", type=int, default=2048, help="tokens of the measured memory")
    args = parser.parse_args()
    inputs = drawn(args, args.tokens)
    expected = train(ours, *inputs)
    for loss in CONTENDERS.values():
        torch.testing.assert_close(train(loss, *inputs), expected, rtol=1e-4, atol=1e-7)
    steps = {name: lambda number, p=loss: train(p, *inputs)[0].item() for name, loss in CONTENDERS.items()}
    times = in_turns(steps, args.rounds)
    shown = ratios(times, to="whole logits", faster=False)
    print(f"{args.tokens} tokens of width {args.dim}, {args.vocab_size} words, {args.ignored:.0%} without a label")
    print(f"{'':16}{'CPU s':>8}  {'ratio by wall time':24}{'ratio by CPU time':24}{'counted':>9}{'measured':>10}  GiB")
    spawn = multiprocessing.get_context("spawn")
    for name, loss in CONTENDERS.items():
        peak = "" if loss is torch_chunked else f"{counted(loss, args) / 2**30:.2f}"
        with spawn.Pool(1) as pool:
            measured = pool.apply(gained, (name, args)) / 2**30
        seconds = statistics.median(cpu for _, cpu in times[name])
        print(f"{name:16}{seconds:>8.2f}  {shown[name]}{peak:>9}{measured:>10.2f}")


if __name__ == "__main__":
    main()
