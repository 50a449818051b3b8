"""What attention kernels and grouped products return on a GPU, where there is none: shapes, types and devices.

Meta tensors go forward and backward by PyTorch's own account of each operation. Fake tensors of a GPU need a torch for
CUDA, and go forward alone: autograd asks for the GPU.
"""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core.nn.backends import kernel_class
from core.nn.grouped import grouped_mm
from core.nn.kernel import Positions

B, N, K, L, H = 2, 4, 2, 256, 32
DOCUMENT = 64
NEEDS_CUDA = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake GPUs need a torch for CUDA")
DEVICES = ["meta", pytest.param("cuda", marks=NEEDS_CUDA)]


def check(out: torch.Tensor, shape: tuple[int, ...], leaves: list[torch.Tensor], device: str) -> None:
    """A result in bfloat16, and the gradients of the leaves where these have some."""
    assert (out.shape, out.dtype, out.device.type) == (shape, torch.bfloat16, device)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out)) if out.requires_grad else ()
    assert len(found) == (len(leaves) if device == "meta" else 0)
    for leaf, gradient in zip(leaves, found, strict=False):
        assert (gradient.shape, gradient.dtype, gradient.device.type) == (leaf.shape, leaf.dtype, device)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("name", ["sdpa", "varlen", "flex"])
def test_an_attention_kernel_stays_on_its_device(
    monkeypatch: pytest.MonkeyPatch, name: str, documents: bool, window: int | None, sinks: bool, device: str
) -> None:
    if name == "varlen" and sinks:
        pytest.skip("varlen has no sinks")
    if (name, device) == ("flex", "meta"):
        pytest.skip("PyTorch's flex_attention takes no meta tensors")
    monkeypatch.setattr("core.nn.flex.compiled_kernel", lambda function: function)  # Inductor asks for the GPU
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))  # varlen of 2.14 asks for it
    with FakeTensorMode():
        of: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": device == "meta"}
        sides = [torch.randn(B, n, L, H, **of) for n in (N, K, K)]
        sinks_N = torch.zeros(N, device=device, requires_grad=device == "meta") if sinks else None
        place_1L = torch.arange(L, device=device)[None]
        positions = Positions(place_1L)
        if documents:
            starts_S = torch.arange(0, B * L, DOCUMENT, device=device, dtype=torch.int32)
            spans = (starts_S, DOCUMENT, B)
            positions = Positions(place_1L % DOCUMENT, (place_1L // DOCUMENT).expand(B, -1), spans=spans)
        kernel = kernel_class(name)(window)
        out = kernel(*sides, kernel.mask(positions), scale=0.2, sinks_N=sinks_N)
        check(out, (B, N, L, H), [*sides, sinks_N] if sinks_N is not None else sides, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [False, True], ids=["our operation", "PyTorch's kernel"])
def test_a_grouped_product_stays_on_its_device(monkeypatch: pytest.MonkeyPatch, kernel: bool, device: str) -> None:
    """The choice asks a GPU what it is."""
    monkeypatch.setattr("core.nn.grouped._has_kernel", lambda *sides: kernel)
    with FakeTensorMode():
        of: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": device == "meta"}
        leaves = [torch.randn(40, 16, **of), torch.randn(3, 24, 16, **of)]
        out = grouped_mm(*leaves, torch.zeros(3, dtype=torch.int64, device=device))
        check(out, (40, 24), leaves, device)
