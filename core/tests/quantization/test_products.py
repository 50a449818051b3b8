"""The three products of converted layers: their operands, their gradients, a GPU's call, other programs' numbers."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from converted_toys import dense, sparse
from torch import Tensor

from core.nn.grouped import GroupedLinear
from core.nn.layers import Linear
from core.nn.product import put_product
from core.quantization.aware import QATConverter, RoundedWeight
from core.quantization.converter import Converter
from core.quantization.float8 import RECIPES, Float8LinearConverter
from core.quantization.forms import FORMS, rotated
from core.quantization.microscaling import FP4LinearConverter, MXFP8LinearConverter
from core.quantization.product import (
    AMAX,
    QUANTISED_GROUPED_MM,
    QUANTISED_GROUPED_MM_WEIGHT,
    QUANTISED_MM,
    Forms,
    Pair,
    QuantisedProduct,
)
from core.testing.parity import Case, StepResult, result_of

BLOCKS = {
    "mxfp8": MXFP8LinearConverter.Config(emulate=True),
    "mxfp8-floor": MXFP8LinearConverter.Config(emulate=True, recipe_name="mxfp8_floor"),
    "mxfp4": FP4LinearConverter.Config(emulate=True, recipe_name="mxfp4", stochastic_rounding=False),
    "nvfp4": FP4LinearConverter.Config(emulate=True, stochastic_rounding=False),
    "nvfp4-turned": FP4LinearConverter.Config(
        emulate=True, stochastic_rounding=False, random_hadamard=True, square_weight_blocks=True
    ),
}
RECIPES_OF_ALL: dict[str, Forms] = {
    **RECIPES,
    **{name: config.build().forms() for name, config in BLOCKS.items()},
}


CASES = {
    "dense": Case(dense(), checkpoint="selective"),
    "sparse": Case(sparse(), compute_dtype=torch.bfloat16),
}


@cache
def plain_step(name: str) -> StepResult:
    return result_of(CASES[name])


def operand(x: Tensor, name: str, amax: Tensor, rotate: bool) -> Tensor:
    """x (M, K) as an operand of a product, by one form."""
    x, amax = (rotated(x), 4 * amax) if rotate else (x, amax)
    return FORMS[name].quantised(x, amax) if name else x


def expected(a: Tensor, b: Tensor, pair: Pair, amax_a: Tensor, amax_b: Tensor) -> Tensor:
    return operand(a, pair.a, amax_a, pair.rotate) @ operand(b, pair.b, amax_b, pair.rotate).T


@pytest.mark.parametrize("recipe", RECIPES_OF_ALL)
def test_each_product_has_its_operands(recipe: str) -> None:
    """A linear layer, and a stack of experts of which one gets no row; 37 rows are no multiple of anything."""
    forms, generator = RECIPES_OF_ALL[recipe], torch.Generator().manual_seed(0)
    x = torch.randn(37, 64, generator=generator, requires_grad=True)
    grad = torch.randn(37, 32, generator=generator)
    linear, grouped = Linear(64, 32, std=1.0), GroupedLinear(3, 64, 32, std=1.0)
    for layer, counts in ((linear, None), (grouped, torch.tensor([20, 0, 17]))):
        put_product(layer, QuantisedProduct(forms, emulate=True, multiple=16))
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
        x.grad = None
        y = layer(x) if counts is None else layer(x, counts)
        y.backward(grad)
        weight, gradient, own = layer.weight.detach(), layer.weight.grad, x.detach()
        amax_x, amax_w, amax_g = own.abs().max(), weight.abs().max(), grad.abs().max()
        groups = [(slice(None), weight, gradient)] if counts is None else []
        for i, rows in enumerate((slice(0, 20), slice(20, 20), slice(20, 37)) if counts is not None else ()):
            groups.append((rows, weight[i], gradient[i]))
        for rows, w, dw in groups:
            assert torch.equal(y[rows], expected(own[rows], w, forms.output, amax_x, amax_w))
            assert torch.equal(x.grad[rows], expected(grad[rows], w.T, forms.grad_input, amax_g, amax_w))
            assert torch.equal(dw, expected(grad[rows].T, own[rows].T, forms.grad_weight, amax_g, amax_x))


@pytest.mark.parametrize(
    "recipe",
    [
        "tensorwise",
        pytest.param(
            "rowwise",
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 scales no rows on a CPU"),
        ),
    ],
)
def test_a_gpu_is_asked_for_the_same(recipe: str) -> None:
    """PyTorch computes its kernels' products on a CPU, too: the same operands and scales, sums in another order."""
    layers = [Linear(64, 32, std=1.0) for _ in range(2)]
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for layer, emulate in zip(layers, (True, False), strict=True):
        layer.bfloat16()
        put_product(layer, QuantisedProduct(RECIPES[recipe], emulate=emulate, multiple=16))
        with torch.no_grad():
            layer.weight.normal_(generator=torch.Generator().manual_seed(1))
        own = x.clone().requires_grad_()
        layer(own).square().sum().backward()
        results.append([layer(own), own.grad, layer.weight.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ((ours - theirs).norm() / ours.norm()).item() < 0.01, "bfloat16 is off by up to 0.004"


@pytest.mark.parametrize(("form", "rotate"), [("e4m3_tensorwise", False), ("e4m3_rowwise", False), ("mxfp8", True)])
def test_operations_say_what_they_return(form: str, rotate: bool) -> None:
    """Shapes, types and strides without numbers, and tracing with sizes that change, as PyTorch checks them."""
    x_RI, weight_GOI = torch.randn(5, 32).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    counts_G, grad_RO = torch.tensor([2, 0, 3]), torch.randn(5, 16).bfloat16()
    amax = torch.tensor(4.0) if form == "e4m3_tensorwise" else None
    way = (amax, amax, form, form, rotate, True)
    torch.library.opcheck(AMAX, (x_RI,))
    torch.library.opcheck(QUANTISED_MM, (x_RI, weight_GOI[0], *way))
    torch.library.opcheck(QUANTISED_MM, (grad_RO, weight_GOI[0].mT, *way))
    torch.library.opcheck(QUANTISED_GROUPED_MM, (x_RI, weight_GOI, counts_G, *way))
    torch.library.opcheck(QUANTISED_GROUPED_MM_WEIGHT, (grad_RO, x_RI, counts_G, *way))


def test_a_rounded_weight_gets_the_gradient_of_the_plain_one() -> None:
    layer = Linear(64, 32, std=1.0)
    put_product(layer, RoundedWeight("mxfp4"))
    x = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        layer.weight.normal_()
    layer(x).sum().backward()
    numbers = FORMS["mxfp4"].quantised(layer.weight.detach(), None)
    torch.testing.assert_close(layer(x), x @ numbers.T)
    torch.testing.assert_close(x.grad, numbers.sum(0).expand(5, 64))
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(32, 64))


@pytest.mark.parametrize(
    ("converter", "limit"),
    [
        (Float8LinearConverter.Config(emulate=True), 0.05),
        (MXFP8LinearConverter.Config(emulate=True), 0.05),
        (FP4LinearConverter.Config(emulate=True, random_hadamard=True), 0.3),
        (QATConverter.Config(), 0.3),
    ],
    ids=["float8", "mxfp8", "nvfp4", "qat"],
)
def test_a_step_is_near_that_of_the_plain_model(converter: Converter.Config, limit: float) -> None:
    """And not that itself: dense with checkpointed blocks, and of experts in bfloat16."""
    torch.manual_seed(0)
    for name, case in CASES.items():
        plain, found = plain_step(name), result_of(replace(case, converters=[converter]))
        assert 0 < abs(found.loss - plain.loss) < limit and abs(found.next_loss - plain.next_loss) < 3 * limit
        assert found.grad_norm == pytest.approx(plain.grad_norm, rel=4 * limit)


def test_torchao_has_the_same_numbers() -> None:
    """Of float8 the whole layer; of blocks its references of the formats."""
    pytest.importorskip("torchao", reason="a reference that a test environment need not have")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 128)
    modes: dict[str, tuple[Any, Any]] = {
        "mxfp8": (torch.float8_e4m3fn, ScaleCalculationMode.RCEIL),
        "mxfp8_floor": (torch.float8_e4m3fn, ScaleCalculationMode.FLOOR),
        "mxfp4": (torch.float4_e2m1fn_x2, ScaleCalculationMode.FLOOR),
    }
    for name, (dtype, mode) in modes.items():
        theirs = MXTensor.to_mx(x, dtype, 32, mode).dequantize(torch.float32)
        assert torch.equal(FORMS[name].quantised(x, None), theirs), name
    scale = x.abs().max() / (448 * 6)
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(FORMS["nvfp4"].quantised(x, x.abs().max()), theirs)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    for recipe in ("tensorwise", "rowwise"):
        plain = torch.nn.Sequential(torch.nn.Linear(128, 32, bias=False))
        settings = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        converted, ours = convert_to_float8_training(plain, config=settings), Linear(128, 32, std=1.0)
        put_product(ours, QuantisedProduct(RECIPES[recipe], emulate=True, multiple=16))
        results = []
        for layer, module in ((converted[0], converted), (ours, ours)):
            with torch.no_grad():
                layer.weight.copy_(weight)
            own = x.clone().requires_grad_()
            y = module(own)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            results.append([y.detach(), own.grad, layer.weight.grad])
        for found, reference in zip(*results, strict=True):
            torch.testing.assert_close(found, reference, rtol=0, atol=2e-6 * reference.abs().max().item())
