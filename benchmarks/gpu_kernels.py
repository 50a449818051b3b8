"""Single operations, for `gpu.py`: attention kernels, the head with its loss, experts as grouped products."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gpu_steps import Cases, Row, reset_peak, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend

from core.config.errors import UserError
from core.data.packing import Batch
from core.nn.backends import kernel_class
from core.nn.dispatch import count
from core.nn.init import materialise
from core.nn.kernel import Kernel, KernelUse, Mask, Positions
from core.nn.layers import Head
from core.nn.moe import Experts
from core.nn.start import Scale
from core.parallel.layout import whole_rows
from core.parallel.vocabulary import WholeVocabulary
from core.runtime.device import GIB, peak_memory
from core.step.loss import CrossEntropy

Call = Callable[[], Tensor]
QUERIES = 512
"""So many at once are compared with their keys by definition."""


def milliseconds(call: Call, leaves: list[Tensor], device: torch.device, n: int) -> float:
    """The median time of forward and backward of `call`, after two that are not counted."""
    times = []
    for number in range(n + 2):
        synchronize(device)
        began = time.perf_counter()
        out = call()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        synchronize(device)
        if number > 1:
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


class Case(NamedTuple):
    """Rows of a number of equal documents, and heads as those of qwen3_1_7b."""

    rows: int
    length: int
    documents: int = 1
    window: int | None = None

    def positions(self, device: torch.device) -> Positions:
        """As a step has them, on the device, with what the host knows."""
        place, each = torch.arange(self.length), self.length // self.documents
        parts = ((part.expand(self.rows, -1).contiguous()) for part in (place, place, place % each, place // each))
        return whole_rows(Batch(*parts), device, documents=self.documents > 1).positions

    def seen(self, first: int, end: int, device: torch.device) -> Tensor:
        """Which keys before `end` the queries from `first` on see, (queries, keys): said anew, for comparison."""
        query, key = torch.arange(first, end, device=device)[:, None], torch.arange(end, device=device)
        each = self.length // self.documents
        near = query - key < (self.window or self.length)
        return (key <= query) & near & (query // each == key // each)

    def pairs(self) -> float:
        """Pairs of a query and a key that it sees."""
        each = self.length // self.documents
        window = min(self.window or each, each)
        return self.rows * self.documents * (window * (window + 1) / 2 + (each - window) * window)


def attention(device: torch.device, tiny: bool) -> Cases:
    """Forward and backward of the attention kernels in bf16, against the definition in fp32."""
    for rows, length in [(2, 64)] if tiny else [(4, 4096), (1, 32768)]:
        cases = [Case(rows, length), Case(rows, length, documents=8), Case(rows, length, window=length // 16)]
        for case in cases:
            expected: list[Tensor] = []
            for name in ("sdpa", "varlen", "flex"):
                yield {"kernel": name, **case._asdict()}, partial(measured, name, case, device, expected, tiny)


def by_definition(case: Case, sides: list[Tensor], grad_BNLH: Tensor, scale: float) -> list[Tensor]:
    """The result of attention to a case's queries, keys and values, and its gradients by these, in fp32: some queries
    after the other, as tables of queries by keys would not fit."""
    q_BNLH, k_BKLH, v_BKLH = (side.detach().float() for side in sides)
    shared = q_BNLH.shape[1] // k_BKLH.shape[1]
    out, sums = torch.empty_like(q_BNLH), [torch.zeros_like(side) for side in (q_BNLH, k_BKLH, v_BKLH)]
    for first in range(0, case.length, QUERIES):
        end = min(first + QUERIES, case.length)
        parts = [q_BNLH[:, :, first:end], k_BKLH[:, :, :end], v_BKLH[:, :, :end]]
        q, k, v = parts = [part.detach().requires_grad_() for part in parts]
        k, v = (side.repeat_interleave(shared, 1) for side in (k, v))
        scores = (scale * q @ k.mT).masked_fill(~case.seen(first, end, q.device), -torch.inf)
        of_chunk = scores.softmax(-1) @ v
        out[:, :, first:end] = of_chunk.detach()
        slices = (slice(first, end), slice(end), slice(end))
        found = torch.autograd.grad(of_chunk, parts, grad_BNLH[:, :, first:end].float())
        for total, where, part in zip(sums, slices, found, strict=True):
            total[:, :, where] += part
    return [out, *sums]


def measured(name: str, case: Case, device: torch.device, expected: list[Tensor], tiny: bool) -> Row:
    """A kernel's time; `expected` are the result and gradients to compare with, or none yet."""
    heads, width = (4, 2, 2), 16 if tiny else 128
    heads = heads if tiny else (16, 8, 8)
    kernel: Kernel = kernel_class(name)(case.window)
    use = KernelUse(heads[0], heads[1], width, width, device=device, dtype=torch.bfloat16, trains=True)
    if problem := kernel.problem(use._replace(documents=case.documents > 1)):
        raise UserError(problem)
    torch.manual_seed(0)
    shapes = [(case.rows, case.length, n, width) for n in (*heads, heads[0])]
    *sides, grad = [torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    for side in sides:
        side.requires_grad_()
    expected[:] = expected or by_definition(case, sides, grad, width**-0.5)
    positions = case.positions(device)
    masks: list[Mask] = []
    times = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        masks[:] = [kernel.mask(positions)]
        times.append(time.perf_counter() - began)
    (mask,) = masks
    reset_peak(device)
    call = partial(kernel, *sides, mask, scale=width**-0.5)
    out = call()
    found = [out.detach(), *torch.autograd.grad(out, sides, grad)]
    peak = None if device.type == "cpu" else peak_memory(device) / GIB
    off = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
    del out, found
    ms = milliseconds(call, sides, device, 1 if tiny else 5)
    flops = 2 * 7 * case.pairs() * heads[0] * width  # two products forward, five backward
    return {
        "ms": ms,
        "TFLOP/s": flops / ms / 1e9,
        "mask ms": 1000 * statistics.median(times),
        "off": off,
        "equal": off < 0.02,
        "peak GiB": peak,
        "by": chosen(sides, mask) if name == "sdpa" else None,
    }


def chosen(sides: list[Tensor], mask: Mask) -> str | None:
    """Which of its kernels PyTorch takes for queries, keys and values; None for masks that are our own."""
    if not (mask is None or isinstance(mask, Tensor)):
        return None
    number = torch._fused_sdp_choice(*sides, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return next(name.lower() for name, value in SDPBackend.__members__.items() if int(value) == number)


def loss(device: torch.device, tiny: bool) -> Cases:
    """Head and loss of qwen3_1_7b's vocabulary, in chunks and whole."""
    n_tokens, dim, words = (64, 16, 128) if tiny else (16384, 2048, 151936)
    torch.manual_seed(0)
    head = Head(dim, words, std=0.02).to(device)
    torch.nn.init.normal_(head.weight, std=0.02)
    x_BLD = torch.randn(1, n_tokens, dim, device=device).requires_grad_()
    labels_BL = torch.randint(words, (1, n_tokens), device=device)
    vocabulary, sizes = WholeVocabulary(words), {"n_labels": n_tokens, "scale": 1 / n_tokens}
    for chunks in (16 if tiny else "auto", "off"):
        for compiled in (False,) if tiny else (False, True):
            cost = CrossEntropy.Config(chunk_tokens=chunks).build(compile_backend="inductor" if compiled else None)
            call = partial(in_bf16, device, partial(cost, x_BLD, labels_BL, head, vocabulary, **sizes))
            figures = partial(timed, call, [x_BLD, head.weight], device, tiny)
            yield {"chunk_tokens": chunks, "compiled": compiled}, figures


def experts(device: torch.device, tiny: bool) -> Cases:
    """Experts of qwen3_30b_a3b's shape, 16,384 tokens of 8 choices, dealt out evenly and unevenly."""
    n_tokens, dim, width, n_experts, top_k = (32, 16, 8, 4, 2) if tiny else (16384, 2048, 768, 128, 8)
    with torch.device("meta"):
        network = Experts.Config(hidden_dim=width).build(n_experts=n_experts, dim=dim, scale=Scale(0.02, 0.02))
    materialise(network, device, torch.float32)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x_RD = torch.randn(n_tokens * top_k, dim, device=device).requires_grad_()
    even_R = torch.arange(len(x_RD), device=device) % n_experts
    flops = 3 * 3 * 2 * len(x_RD) * dim * width
    for load, ids_R in {"even": even_R, "half to one": torch.where(even_R % 2 == 0, even_R, 0)}.items():
        for compiled in (False,) if tiny else (False, True):
            forward = torch.compile(network) if compiled else network
            call = partial(in_bf16, device, partial(forward, x_RD, count(ids_R, n_experts)))
            figures = partial(timed, call, [x_RD, *network.parameters()], device, tiny, flops=flops)
            yield {"load": load, "compiled": compiled}, figures


def in_bf16(device: torch.device, call: Call) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        return call()


def timed(call: Call, leaves: list[Tensor], device: torch.device, tiny: bool, *, flops: float | None = None) -> Row:
    """Forward and backward of `call`, which needs `flops`."""
    mean = call().mean().item()
    reset_peak(device)
    ms = milliseconds(call, leaves, device, 1 if tiny else 5)
    peak = None if device.type == "cpu" else peak_memory(device) / GIB
    return {"ms": ms, "peak GiB": peak, "mean": mean} | ({} if flops is None else {"TFLOP/s": flops / ms / 1e9})
