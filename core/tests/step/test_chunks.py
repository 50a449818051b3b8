"""The loss in chunks: every setting equals a sum in double precision, and nothing of the size of all logits exists."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from core.config.errors import UserError
from core.config.validate import problems_of
from core.data.packing import IGNORE
from core.nn.layers import Head
from core.parallel.vocabulary import WholeVocabulary
from core.step.loss import CrossEntropy
from core.testing.oracles import cross_entropy

V, D = 31, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z": {"z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.2},
    "capped": {"soft_cap": 3.0},
    "all": {"z_loss": 0.05, "label_smoothing": 0.1, "soft_cap": 2.0},
}


def drawn(n_rows: int = 3, length: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Head, Tensor, Tensor]:
    """A head, a residual stream and labels, of which some do not count: all of the first of several rows."""
    generator = torch.Generator().manual_seed(2)
    head = Head(D, V, std=1.0)
    head.weight.data = torch.randn(V, D, generator=generator).to(dtype)
    x_BLD = torch.randn(n_rows, length, D, generator=generator).to(dtype).requires_grad_()
    labels_BL = torch.randint(V, (n_rows, length), generator=generator)
    if n_rows > 1:
        labels_BL[0] = labels_BL[1, 2] = IGNORE
    return head, x_BLD, labels_BL


def by_loop(head: Head, x_BLD: Tensor, labels_BL: Tensor, **settings: Any) -> tuple[float, Tensor, Tensor]:
    """The loss of a token after the other, and its gradients, in double precision."""
    z_loss, smoothing = settings.get("z_loss", 0.0), settings.get("label_smoothing", 0.0)
    x = x_BLD.detach().double().flatten(0, 1).requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    total = x.new_zeros(())
    for row, label in zip(x, labels_BL.flatten().tolist(), strict=True):
        if label != IGNORE:
            logits = weight @ row
            if cap := settings.get("soft_cap"):
                logits = cap * torch.tanh(logits / cap)
            z = torch.log(torch.exp(logits).sum())
            wanted = torch.full((V,), smoothing / V, dtype=torch.float64)
            wanted[label] += 1 - smoothing
            total = total + (wanted * (z - logits)).sum() + z_loss * z**2
    dx, dweight = torch.autograd.grad(total, (x, weight))
    return total.item(), dx.view_as(x_BLD), dweight


def found(
    loss: CrossEntropy, head: Head, x_BLD: Tensor, labels_BL: Tensor, **more: Any
) -> tuple[float, Tensor, Tensor]:
    """The loss, and its gradients."""
    total = loss(x_BLD, labels_BL, head, WholeVocabulary(V), **more)
    return total.item(), *torch.autograd.grad(total, (x_BLD, head.weight))


def assert_close(found: tuple[float, Tensor, Tensor], expected: tuple[float, Tensor, Tensor], rel: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=rel)
    for ours, exact in zip(found[1:], expected[1:], strict=True):
        assert (ours.double() - exact).abs().max() <= rel * exact.abs().max()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 15, 1000, "auto", "off"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_equals_a_loop(name: str, chunk_tokens: Any) -> None:
    """4 divides neither the tokens nor those with a label."""
    loss = CrossEntropy.Config(chunk_tokens=chunk_tokens, **SETTINGS[name]).build()
    expected = by_loop(*drawn(), **SETTINGS[name])
    for n_labels in (None, 15, 12, 9):
        assert_close(found(loss, *drawn(), n_labels=n_labels), expected, rel=1e-6)
    head, x_BLD, labels_BL = drawn()
    scaled = found(loss, head, x_BLD, labels_BL, n_labels=9, scale=1 / 9)
    assert_close(scaled, tuple(part / 9 for part in expected), rel=1e-6)
    with torch.no_grad():
        assert loss(x_BLD, labels_BL, head, WholeVocabulary(V)).item() == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_formula_that_is_compiled_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CrossEntropy.Config(chunk_tokens=4, **SETTINGS[name])
    closed = found(config.build(), *drawn())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(found(config.build(), *drawn()), closed, rel=1e-6)


def test_one_compiled_loss_serves_all_chunks() -> None:
    """9 tokens in chunks of 4: the last is shorter."""
    sizes = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        sizes.append(len(inputs))
        return graph

    config = CrossEntropy.Config(chunk_tokens=4, **SETTINGS["all"])
    compiled = found(config.build(compile_backend=counting), *drawn(), n_labels=9)
    assert_close(compiled, found(config.build(), *drawn()), rel=1e-6)
    assert 1 <= len(sizes) <= 2  # one for any number of tokens, after a first


@pytest.mark.parametrize("n_rows", [1, 3])
def test_no_label_at_all_costs_nothing_and_has_gradients(n_rows: int) -> None:
    head, x_BLD, labels_BL = drawn(n_rows)
    labels_BL.fill_(IGNORE)
    loss = CrossEntropy.Config(chunk_tokens=4, **SETTINGS["all"]).build()
    for n_labels in (None, 0):
        total, dx_BLD, dweight = found(loss, head, x_BLD, labels_BL, n_labels=n_labels)
        assert total == 0.0 and not dx_BLD.any() and not dweight.any()


def test_one_token() -> None:
    loss = CrossEntropy.Config(chunk_tokens=4, **SETTINGS["all"]).build()
    assert_close(found(loss, *drawn(1, 1)), by_loop(*drawn(1, 1), **SETTINGS["all"]), rel=1e-6)


class Watch(TorchDispatchMode):
    """How many numbers the largest result of an operation has, and the operations of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, part.numel() if isinstance(part, Tensor) else 0)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(("chunk_tokens", "largest"), [(4, 12 * 5 * D), (20, 20 * V), ("off", 12 * 5 * V)])
def test_the_largest_tensor_is_a_chunk_of_logits(chunk_tokens: Any, largest: int) -> None:
    """Or the residual stream, where that is larger."""
    head, x_BLD, labels_BL = drawn(12)
    with Watch() as watch:
        found(CrossEntropy.Config(chunk_tokens=chunk_tokens).build(), head, x_BLD, labels_BL)
    assert watch.largest == largest


@pytest.mark.parametrize("grad", [True, False])
def test_products_are_of_labelled_tokens(grad: bool) -> None:
    """Three for training, one to measure; a label that does not count costs none of them."""
    head, x_BLD, labels_BL = drawn(10, 10)
    labels_BL.fill_(3).flatten()[torch.randperm(100)[:70]] = IGNORE
    loss = CrossEntropy.Config(chunk_tokens=8).build()
    with torch.set_grad_enabled(grad), Watch() as watch:
        total = loss(x_BLD, labels_BL, head, WholeVocabulary(V), n_labels=30)
        if grad:
            total.backward()
    assert watch.flops == (3 if grad else 1) * 2 * 30 * V * D


def test_frozen_parts_get_no_product() -> None:
    head, x_BLD, labels_BL = drawn()
    loss = CrossEntropy.Config(chunk_tokens=4).build()
    expected = by_loop(head, x_BLD, labels_BL)
    head.weight.requires_grad_(False)
    with Watch() as watch:
        (dx_BLD,) = torch.autograd.grad(loss(x_BLD, labels_BL, head, WholeVocabulary(V)), (x_BLD,))
    assert watch.flops == 2 * 2 * 15 * V * D
    assert (dx_BLD - expected[1]).abs().max() < 1e-6 * expected[1].abs().max()


@pytest.mark.parametrize("way", ["weights in bfloat16", "autocast"])
def test_bfloat16_is_not_worse_than_whole_logits(way: str) -> None:
    """Over many tokens, where sums of the weight's gradient are long."""
    dtype = torch.bfloat16 if way == "weights in bfloat16" else torch.float32
    head, x_BLD, labels_BL = drawn(64, 64, dtype)
    labels_BL = labels_BL.clamp(min=0)
    exact = by_loop_of_all(head, x_BLD, labels_BL)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast", cache_enabled=False):
        chunked = found(CrossEntropy.Config(chunk_tokens=256).build(), head, x_BLD, labels_BL, scale=1 / 4096)
        whole = cross_entropy(head(x_BLD), labels_BL) / 4096
    whole = whole.item(), *torch.autograd.grad(whole, (x_BLD, head.weight))
    assert chunked[0] == pytest.approx(exact[0], rel=2e-3)
    for ours, theirs, right in zip(chunked[1:], whole[1:], exact[1:], strict=True):
        assert ours.dtype == theirs.dtype
        errors = [(part.double() - right).norm() / right.norm() for part in (ours, theirs)]
        assert errors[0] <= 1.02 * errors[1], errors


def by_loop_of_all(head: Head, x_BLD: Tensor, labels_BL: Tensor) -> tuple[float, Tensor, Tensor]:
    """The mean loss of many tokens and its gradients, in double precision."""
    x, weight = x_BLD.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    log_p_BLV = (x @ weight.T).log_softmax(-1)
    mean = -log_p_BLV.gather(-1, labels_BL.unsqueeze(-1)).mean()
    return mean.item(), *torch.autograd.grad(mean, (x, weight))


def test_the_head_runs_once() -> None:
    """So whoever gathers its weight for a forward does so once."""
    head, x_BLD, labels_BL = drawn()
    calls: list[tuple] = []
    head.register_forward_hook(lambda _, args, out: calls.append(tuple(out.shape)))
    found(CrossEntropy.Config(chunk_tokens=1).build(), head, x_BLD, labels_BL)
    assert calls == [()]


class Doubling(Head):
    """A head that is no plain product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight)


def test_a_head_of_ones_own_is_asked_for_its_logits() -> None:
    head, x_BLD, labels_BL = drawn()
    own = Doubling(D, V, std=1.0)
    own.weight.data = head.weight.data / 2
    assert_close(found(CrossEntropy.Config().build(), own, x_BLD, labels_BL), twice(drawn()), rel=1e-6)
    head.forward = lambda x: 2 * F.linear(x, head.weight / 2)
    assert_close(found(CrossEntropy.Config().build(), head, x_BLD, labels_BL), by_loop(*drawn()), rel=1e-6)
    for other in (own, head):
        with pytest.raises(UserError, match=r"loss.chunk_tokens 4 reads the head's weight.*set it to off"):
            CrossEntropy.Config(chunk_tokens=4).build()(x_BLD, labels_BL, other, WholeVocabulary(V))


def twice(of: tuple[Head, Tensor, Tensor]) -> tuple[float, Tensor, Tensor]:
    """By a loop, where the weight is half of what is computed with."""
    total, dx_BLD, dweight = by_loop(*of)
    return total, dx_BLD, 2 * dweight


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens 0 must be at least 1"),
        ({"chunk_tokens": "none"}, "chunk_tokens: expected int or 'auto' or 'off', got 'none'"),
        ({"z_loss": -1.0}, "z_loss -1.0 must be finite and not negative"),
        ({"z_loss": math.inf}, "z_loss inf must be finite"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0 must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"soft_cap": 0.0}, "soft_cap 0.0 must be finite and above 0"),
        ({"soft_cap": math.nan}, "soft_cap nan"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], message: str) -> None:
    ((path, text),) = problems_of(CrossEntropy.Config(**settings))
    assert message in f"{path}: {text}"


def test_auto_is_the_width_or_what_is_worth_no_cut() -> None:
    for dim, vocab_size, n_ranks in product((256, 7168), (2048, 151936), (1, 8)):
        tokens = CrossEntropy.Config().tokens_at_a_time(dim=dim, vocab_size=vocab_size, n_ranks=n_ranks)
        assert tokens is not None and tokens % n_ranks == 0
        assert tokens == dim or 2**24 <= tokens * vocab_size // n_ranks < 2**24 + vocab_size
    config = CrossEntropy.Config(chunk_tokens=10)
    assert config.tokens_at_a_time(dim=8, vocab_size=31, n_ranks=4) == 12
    assert config.least_bytes(100, dim=8, vocab_size=32, n_ranks=4) == 4 * (12 + 8) * 8
    assert CrossEntropy.Config(chunk_tokens="off").least_bytes(100, dim=8, vocab_size=32, n_ranks=4) == 4 * 100 * 8
