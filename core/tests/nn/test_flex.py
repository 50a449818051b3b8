"""What flex compiles by itself, as far as a CPU shows it: it has no backward of flex itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.nn.backends import KERNELS, register_kernel
from core.nn.flex import compiled_kernel
from core.testing.parity import Case, largest_differences, result_of
from core.testing.toy import Toy, toy_attention

calls: list[int] = []


@torch.library.custom_op("test_flex::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    """x, any shape, and one call more."""
    calls.append(1)
    return x.clone()


counted.register_fake(torch.empty_like)
counted.register_autograd(lambda ctx, gradient: gradient)


def attend(q_BNLH: Tensor, k_BKMH: Tensor, v_BKMV: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(counted(q_BNLH), k_BKMH, v_BKMV, is_causal=True, enable_gqa=True)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kernel that compiles itself as flex does."""
    monkeypatch.setattr("core.nn.backends.KERNELS", KERNELS.copy())

    @register_kernel("compiled")
    @dataclass(frozen=True)
    class Compiled:
        window: int | None = None

        def problem(self, use: Any) -> None:
            return None

        def mask(self, positions: Any) -> None:
            return None

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: None, **settings: Any) -> Tensor:
            return compiled_kernel(attend)(q, k, v)

    yield "compiled"
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor imports what uses it
def test_selective_does_not_run_a_compiled_kernel_again(kernel: str) -> None:
    case = Case(Toy.Config(attention=replace(toy_attention(), backend=kernel), n_layers=2), n_rows=2, length=16)
    found, n_calls = {}, {}
    for mode in ("none", "selective", "full"):
        calls.clear()
        found[mode] = result_of(replace(case, checkpoint=mode))
        n_calls[mode] = len(calls)
    assert n_calls["selective"] == n_calls["none"] > 0 and n_calls["full"] == 2 * n_calls["none"]
    assert max(largest_differences([found["selective"]], found["none"]).values()) < 1e-6
