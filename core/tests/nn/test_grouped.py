"""The grouped product and GroupedLinear against a plain loop over rows, in every mode that training uses."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from core.activation_checkpoint.ops import saved_ops
from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.nn import grouped
from core.nn.grouped import GROUPED_MM, GROUPED_MM_WEIGHT, GroupedLinear, grouped_mm
from core.nn.module import Module
from core.nn.start import Constant, Normal
from core.nn.weights import weights
from core.runtime.device import n_gpus
from core.testing.activation_checkpoint import Dispatched

I, O = 5, 7  # noqa: E741 - the letters of the file under test
COUNTS = {
    "mixed": [3, 1, 6, 2],
    "empty groups": [0, 4, 0, 0, 9, 0],
    "one row": [0, 1, 0],
    "no rows": [0, 0, 0],
    "all rows to one": [0, 0, 11],
    "one group": [6],
    "many": [13, 0, 29, 1, 0, 17, 31, 2],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, counts and a gradient of the result."""
    generator = torch.Generator().manual_seed(len(counts))
    x_RI = torch.randn(sum(counts), I, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_GOI = torch.randn(len(counts), O, I, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad_RO = torch.randn(sum(counts), O, generator=generator, dtype=torch.float64).to(dtype)
    return x_RI, weight_GOI, torch.tensor(counts), grad_RO


def group_of_rows(counts: list[int]) -> list[int]:
    return [group for group, count in enumerate(counts) for _ in range(count)]


def oracle(x_RI: Tensor, weight_GOI: Tensor, counts: list[int], grad_RO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result and both gradients in fp64, row by row and by hand."""
    x_RI, weight_GOI, grad_RO = (tensor.detach().double() for tensor in (x_RI, weight_GOI, grad_RO))
    y_RO, grad_RI, grad_GOI = torch.zeros_like(grad_RO), torch.zeros_like(x_RI), torch.zeros_like(weight_GOI)
    for row, group in enumerate(group_of_rows(counts)):
        y_RO[row] = (weight_GOI[group] * x_RI[row]).sum(-1)
        grad_RI[row] = (weight_GOI[group] * grad_RO[row][:, None]).sum(0)
        grad_GOI[group] += grad_RO[row][:, None] * x_RI[row]
    return y_RO, grad_RI, grad_GOI


def check(x_RI: Tensor, weight_GOI: Tensor, counts_G: Tensor, grad_RO: Tensor) -> None:
    """Compare the result and both gradients with the oracle, in the precision of their dtype."""
    expected = oracle(x_RI, weight_GOI, counts_G.tolist(), grad_RO)
    y_RO = grouped_mm(x_RI, weight_GOI, counts_G)
    assert y_RO.dtype == x_RI.dtype
    found = (y_RO, *torch.autograd.grad(y_RO, (x_RI, weight_GOI), grad_RO))
    rtol, atol = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5)}.get(x_RI.dtype, (2**-8, 1e-6))
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_result_and_gradients(counts: list[int], dtype: torch.dtype) -> None:
    check(*make(counts, dtype))


def test_random_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        n_groups = int(torch.randint(1, 9, (), generator=generator))
        check(*make(torch.randint(0, 6, (n_groups,), generator=generator).tolist()))


@pytest.mark.parametrize("counts", [COUNTS["mixed"], COUNTS["empty groups"]])
def test_operands_may_lie_anyhow(counts: list[int]) -> None:
    """Columns of something wider, transposed, every second one; and the gradient that `sum` gives, all strides zero."""
    x_RI, weight_GOI, counts_G, grad_RO = (tensor.detach() for tensor in make(counts))
    wide_RI, turned_RI = torch.cat((x_RI, x_RI), 1)[:, 2 : 2 + I], x_RI.t().contiguous().t()
    assert not wide_RI.is_contiguous() and not turned_RI.is_contiguous()
    spread_RO = torch.stack((grad_RO, grad_RO), -1)[..., 0]
    turned_GOI = weight_GOI.mT.contiguous().mT
    assert not spread_RO.is_contiguous() and not turned_GOI.is_contiguous()
    for x in (wide_RI, turned_RI):
        for weight in (weight_GOI, turned_GOI):
            check(x.requires_grad_(), weight.requires_grad_(), counts_G, spread_RO)
    ones_RO = torch.ones((), dtype=torch.float64).expand_as(grad_RO)
    assert ones_RO.stride() == (0, 0)
    check(x_RI.requires_grad_(), weight_GOI.requires_grad_(), counts_G, ones_RO)
    expected = oracle(x_RI, weight_GOI, counts, torch.ones_like(grad_RO))
    grouped_mm(x_RI, weight_GOI, counts_G).sum().backward()
    torch.testing.assert_close((x_RI.grad, weight_GOI.grad), expected[1:])


def test_gradients_of_first_and_second_order() -> None:
    x_RI, weight_GOI, counts_G, _ = make([2, 0, 3])
    assert gradcheck(lambda x, weight: grouped_mm(x, weight, counts_G), (x_RI, weight_GOI))
    assert gradgradcheck(lambda x, weight: grouped_mm(x, weight, counts_G), (x_RI, weight_GOI))


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    x_RI, weight_GOI, counts_G, grad_RO = make([2, 0, 3])
    for wanted, op in ((x_RI, GROUPED_MM), (weight_GOI, GROUPED_MM_WEIGHT)):
        arguments = [tensor if tensor is wanted else tensor.detach() for tensor in (x_RI, weight_GOI)]
        y_RO = grouped_mm(*arguments, counts_G)
        with Dispatched() as dispatched:
            torch.autograd.grad(y_RO, wanted, grad_RO)
        assert [call for call, _ in dispatched.calls if call.namespace == "armature"] == [op]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck looks at copies, torch 2.14
def test_registration_is_sound() -> None:
    x_RI, weight_GOI, counts_G, grad_RO = make(COUNTS["empty groups"])
    torch.library.opcheck(GROUPED_MM, (x_RI, weight_GOI, counts_G))
    torch.library.opcheck(GROUPED_MM, (grad_RO, weight_GOI.detach().mT.requires_grad_(), counts_G))
    torch.library.opcheck(GROUPED_MM_WEIGHT, (grad_RO.requires_grad_(), x_RI, counts_G))


@pytest.mark.parametrize("counts", [[2, 3], [2, 3, 1], [6]], ids=["a row too few", "a group too many", "too few"])
def test_counts_that_do_not_fit_are_an_error(counts: list[int]) -> None:
    x_RI, weight_GOI, _, _ = make([2, 4])
    with pytest.raises((RuntimeError, ValueError), match="split_sizes|is (shorter|longer) than argument 1"):
        grouped_mm(x_RI, weight_GOI, torch.tensor(counts))


def linear(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[GroupedLinear, Tensor, Tensor, Tensor]:
    """A GroupedLinear with bias, rows, counts, and a gradient of the result."""
    x_RI, weight_GOI, counts_G, grad_RO = make(counts, dtype)
    layer = GroupedLinear(len(counts), I, O, std=0.1, bias=True).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight_GOI)
        layer.bias.copy_(torch.arange(layer.bias.numel()).view_as(layer.bias) / 8)
    return layer, x_RI, counts_G, grad_RO


def trained(layer: GroupedLinear, x_RI: Tensor, y_RO: Tensor, grad_RO: Tensor) -> tuple[Tensor, ...]:
    return y_RO, *torch.autograd.grad(y_RO, (x_RI, layer.weight, layer.bias), grad_RO)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_linear_is_a_linear_for_each_group(counts: list[int], dtype: torch.dtype) -> None:
    layer, x_RI, counts_G, grad_RO = linear(counts, dtype)
    y_RO, grad_RI, grad_GOI = oracle(x_RI, layer.weight, counts, grad_RO)
    grad_GO = torch.zeros(len(counts), O, dtype=torch.float64)
    for row, group in enumerate(group_of_rows(counts)):
        y_RO[row] += layer.bias[group].detach()
        grad_GO[group] += grad_RO[row]
    found = trained(layer, x_RI, layer(x_RI, counts_G), grad_RO)
    assert [value.dtype for value in found] == [dtype] * 4
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    tolerance = {"rtol": 2**-7, "atol": 2e-2} if dtype == torch.bfloat16 else tolerance
    for value, exact in zip(found, (y_RO, grad_RI, grad_GOI, grad_GO), strict=True):
        torch.testing.assert_close(value.double(), exact, **tolerance)
    for by_columns in (False, True):
        if by_columns:
            layer.weight.data = layer.weight.data.mT.contiguous().mT
        with torch.inference_mode():
            inferred = layer(x_RI.detach(), counts_G).clone()
        assert inferred.dtype == dtype
        torch.testing.assert_close(inferred.double(), y_RO, **tolerance)


def test_without_a_gradient_only_groups_with_rows_are_looked_at() -> None:
    layer, x_RI, counts_G, _ = linear([0, 1, 0, 0, 1, 0, 0, 0, 0], torch.float32)
    with torch.inference_mode(), Dispatched() as dispatched:
        layer(x_RI.detach(), counts_G)
    names = [str(op).removeprefix("aten.").partition(".")[0] for op, _ in dispatched.calls]
    assert names.count("addmv_") == names.count("select") == 2 and "armature.grouped_mm" not in str(dispatched.calls)


def test_grouped_linear_says_how_it_starts_and_its_parent_names_the_axes() -> None:
    class Parent(Module):
        AXES = {"up": ("expert", "ffn", "embed"), "down": ("expert", "embed", "ffn")}

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = GroupedLinear(3, 5, 7, std=0.1, bias=True), GroupedLinear(3, 7, 5, std=0.2)

    found = {weight.name: (tuple(weight.value.shape), weight.axes, weight.start) for weight in weights(Parent())}
    assert found == {
        "up.weight": ((3, 7, 5), ("expert", "ffn", "embed"), Normal(0.1)),
        "up.bias": ((3, 7), ("expert", "ffn"), Constant(0.0)),
        "down.weight": ((3, 5, 7), ("expert", "embed", "ffn"), Normal(0.2)),
    }
    assert GroupedLinear(3, 7, 5, std=0.2).bias is None


def test_gradient_of_a_bias_in_bf16_is_added_up_in_fp32() -> None:
    """In bf16 a sum of ones ends at 256. A CPU's kernel adds in fp32 by itself, a GPU's does not."""
    layer = GroupedLinear(2, 1, 3, std=0.1, bias=True).bfloat16()
    y_RO = layer(torch.zeros(4096, 1, dtype=torch.bfloat16), torch.tensor([1024, 3072]))
    with Dispatched() as backward:
        y_RO.sum().backward()
    sums = [arguments[0][0] for op, (*arguments,) in backward.calls if "index_add" in str(op)]
    assert [total.dtype for total in sums] == [torch.float32]
    assert layer.bias.grad.tolist() == [[1024.0] * 3, [3072.0] * 3]


def test_autocast_computes_as_linear_does() -> None:
    layer, x_RI, counts_G, grad_RO = linear([3, 0, 5], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(layer, x_RI, layer(x_RI, counts_G), grad_RO.bfloat16())
        bare_RO = grouped_mm(x_RI, layer.weight, counts_G)
        rows = zip(x_RI.split([3, 0, 5]), layer.weight, layer.bias, strict=True)
        expected_RO = torch.cat([F.linear(x, weight, bias) for x, weight, bias in rows])
        expected = trained(layer, x_RI, expected_RO, grad_RO.bfloat16())
        double_RO = grouped_mm(x_RI.double(), layer.weight.double(), counts_G)
        assert F.linear(x_RI.double(), layer.weight[0].double()).dtype == double_RO.dtype == torch.float64
    assert found[0].dtype == bare_RO.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found[1:]] == [torch.float32] * 3
    exact_RO = oracle(x_RI.bfloat16(), layer.weight.bfloat16(), [3, 0, 5], grad_RO)[0]
    assert torch.equal(bare_RO, exact_RO.bfloat16())
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["plain", "autocast"])
def test_fake_tensors_have_shapes_and_gradients(dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        layer, counts_G = GroupedLinear(3, I, O, std=0.1, bias=True), torch.zeros(3, dtype=torch.int64)
        x_RI = torch.empty(4096, I, requires_grad=True)
        y_RO = layer(x_RI, counts_G)
        assert (y_RO.shape, y_RO.dtype) == ((4096, O), dtype)
        y_RO.sum().backward()
    for tensor in (x_RI, layer.weight, layer.bias):
        assert (tensor.grad.shape, tensor.grad.stride()) == (tensor.shape, tensor.stride())
        assert tensor.grad.dtype == torch.float32


def test_fake_tensors_have_shapes_without_a_gradient() -> None:
    with FakeTensorMode(), torch.inference_mode():
        y_RO = GroupedLinear(3, I, O, std=0.1, bias=True)(torch.empty(4, I), torch.empty(3, dtype=torch.int64))
    assert y_RO.shape == (4, O)


def test_meta_device_has_shapes() -> None:
    layer = GroupedLinear(3, I, O, std=0.1, bias=True).to("meta")
    counts_G = torch.zeros(3, dtype=torch.int64, device="meta")
    assert layer(torch.empty(11, I, device="meta"), counts_G).shape == (11, O)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_once_for_all_counts(autocast: bool) -> None:
    layer, *_ = linear([3, 1, 6, 2], torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, counts: layer(x, counts), fullgraph=True, backend=counter, dynamic=True)
    for counts in ([3, 1, 6, 2], [0, 9, 0, 5], [0, 0, 0, 4]):
        x_RI, _, counts_G, grad_RO = make(counts, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            both = [
                trained(layer, x_RI, y_RO, grad_RO.to(y_RO.dtype))
                for y_RO in (run(x_RI, counts_G) for run in (compiled, layer))
            ]
        assert both[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
        for value, eager in zip(*both, strict=True):
            assert torch.equal(value, eager)
    assert counter.frame_count == 1


def test_each_product_is_one_operation_that_checkpointing_saves() -> None:
    layer, x_RI, counts_G, _ = linear(COUNTS["mixed"])
    assert GROUPED_MM in saved_ops() and GROUPED_MM_WEIGHT not in saved_ops()
    with Dispatched() as forward:
        layer(x_RI, counts_G)
    names = [str(op) for op, _ in forward.calls]
    assert [name for name in names if "mm" in name or not name.startswith("aten")] == ["armature.grouped_mm.default"]
    y_RO = checkpoint(
        lambda x: layer(x, counts_G).sin(),
        x_RI,
        use_reentrant=False,
        context_fn=default_activation_checkpoint_policy(),
        early_stop=False,
    )
    with Dispatched() as backward:
        y_RO.sum().backward()
    products = [op for op, _ in backward.calls if op.namespace == "armature"]
    assert products.count(GROUPED_MM) == products.count(GROUPED_MM_WEIGHT) == 1  # the gradient of x, and of the weight
    expected = torch.autograd.grad(layer(x_RI, counts_G).sin().sum(), (x_RI, layer.weight, layer.bias))
    torch.testing.assert_close((x_RI.grad, layer.weight.grad, layer.bias.grad), expected, rtol=0, atol=0)


def test_flops_are_counted() -> None:
    x_RI, weight_GOI, counts_G, grad_RO = make(COUNTS["empty groups"])
    product = 2 * 13 * I * O
    with FlopCounterMode(display=False) as counter:
        y_RO = grouped_mm(x_RI, weight_GOI, counts_G)
        assert counter.get_total_flops() == product
        y_RO.backward(grad_RO)
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:  # PyTorch's own operation, in rows of whole 16 bytes
        x_RI = torch.randn(12, 8, requires_grad=True)
        y_RO = torch._grouped_mm(
            x_RI, torch.randn(3, 16, 8, requires_grad=True).mT, offs=torch.tensor([4, 4, 12]).int()
        )
        y_RO.backward(torch.ones_like(y_RO))
    assert counter.get_total_flops() == 3 * 2 * 12 * 16 * 8


def test_use_imports_no_compiler() -> None:
    """Neither the import nor a step may bring torch._dynamo or sympy, which cost as long as torch itself; nor may the
    memory of a model or the estimate of its state."""
    code = """
import sys, torch
before = {name for name in ("torch._dynamo", "sympy", "torch._functorch.partitioners") if name in sys.modules}
from core.nn.grouped import GroupedLinear
layer = GroupedLinear(2, 3, 4, std=0.1, bias=True)
with torch.autocast("cpu", torch.bfloat16):
    layer(torch.randn(5, 3, requires_grad=True), torch.tensor([2, 3])).sum().backward()
from core.optim.adam import AdamW
from core.runtime.meta import meta_model
from core.step.loss import CrossEntropy
from core.step.settings import Training
from core.testing.toy import Toy, on_cpu, toy_attention
from core.train.memory import estimate
config = Toy.Config(attention=toy_attention())
on_cpu(config)
estimate(meta_model(config), AdamW.Config(), CrossEntropy.Config(), Training())
after = {name for name in ("torch._dynamo", "sympy", "torch._functorch.partitioners") if name in sys.modules}
sys.exit(str(after - before) if after - before else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_kernel_of_pytorch_is_called_as_it_wants(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, on a CPU, where the same operation exists."""
    monkeypatch.setattr(grouped, "_has_kernel", lambda x, weight: True)
    settings = {"dtype": torch.bfloat16, "generator": torch.Generator().manual_seed(0)}
    x_RI = torch.randn(sum(counts), 16, requires_grad=True, **settings)
    weight_GOI = torch.randn(len(counts), 24, 16, requires_grad=True, **settings)
    grad_RO = torch.randn(sum(counts), 24, **settings)
    with Dispatched() as dispatched:
        check(x_RI, weight_GOI, torch.tensor(counts), grad_RO)
    names = {str(op) for op, _ in dispatched.calls}
    assert "aten._grouped_mm.default" in names and "armature.grouped_mm.default" not in names


@pytest.mark.parametrize(
    ("has", "case"),
    [
        (True, {}),
        (True, {"major": 10}),
        (False, {"major": 8}),
        (False, {"is_cuda": False}),
        (False, {"dtype": torch.float32}),
        (False, {"n_in": 12}),
        (False, {"n_out": 20}),
    ],
)
def test_kernel_of_pytorch_is_for_bf16_in_whole_16_bytes_on_hopper(
    has: bool, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"major": 9, "is_cuda": True, "dtype": torch.bfloat16, "n_in": 16, "n_out": 24} | case
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=case["major"]))
    x_RI = SimpleNamespace(is_cuda=case["is_cuda"], dtype=case["dtype"], device=torch.device("cuda"))
    assert grouped._has_kernel(x_RI, torch.empty(3, case["n_out"], case["n_in"])) is has


def has_grouped_kernel() -> bool:
    return n_gpus() > 0 and torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not has_grouped_kernel(), reason="the grouped kernel needs a GPU of capability 9.0 or later")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_kernel_of_the_gpu_equals_our_operation(counts: list[int]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    n_rows, n_groups = sum(counts), len(counts)
    settings = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    x_RI = torch.randn(n_rows, 64, requires_grad=True, **settings)
    weight_GOI = torch.randn(n_groups, 48, 64, requires_grad=True, **settings)
    counts_G, grad_RO = torch.tensor(counts, device="cuda"), torch.randn(n_rows, 48, **settings)
    with Dispatched() as dispatched:
        y_RO = grouped_mm(x_RI, weight_GOI, counts_G)
    names = [str(op) for op, _ in dispatched.calls]
    assert "aten._grouped_mm.default" in names and "armature.grouped_mm.default" not in names
    own_RO = GROUPED_MM(x_RI, weight_GOI, counts_G)
    found, expected = ((y, *torch.autograd.grad(y, (x_RI, weight_GOI), grad_RO)) for y in (y_RO, own_RO))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2**-7, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not has_grouped_kernel(), reason="the grouped kernel needs a GPU of capability 9.0 or later")
def test_rows_of_odd_width_on_a_gpu_take_our_operation() -> None:
    x_RI, weight_GOI, counts_G, grad_RO = (tensor.detach().cuda() for tensor in make(COUNTS["mixed"], torch.bfloat16))
    check(x_RI.requires_grad_(), weight_GOI.requires_grad_(), counts_G, grad_RO)
