"""The forms for CPUs against the plain ones beside them, and their gradients against differences in fp64."""

import functools
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import core.nn.feed_forward
import core.nn.layers
import core.nn.moe
import core.nn.rope
from core.activation_checkpoint.policy import default_activation_checkpoint_policy
from core.nn import cpu_forms
from core.nn.feed_forward import swiglu
from core.nn.layers import Linear, RMSNorm
from core.nn.module import cpu_forms as forms_for
from core.nn.moe import Experts
from core.nn.rope import RoPE, Rotation
from core.nn.start import Scale

PLACES = [core.nn.feed_forward, core.nn.layers, core.nn.moe, core.nn.rope]


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    layer = RMSNorm(x.shape[-1], eps=0.01)
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def turned(x: Tensor, *, interleaved: bool) -> Tensor:
    angle = numbers(1, x.shape[1], 1, x.shape[-1] // 2, dtype=torch.float32, seed=9)
    return Rotation(angle.cos(), angle.sin(), interleaved)(x)


def clamped(x: Tensor, weights: Tensor) -> Tensor:
    """Experts of GPT-OSS, whose gates and values reach beyond where they are clamped."""
    experts = Experts.Config(hidden_dim=4, activation="clamped_swiglu").build(n_experts=2, dim=4, scale=Scale(1.0, 1.0))
    matrices = dict(zip(("w1.weight", "w3.weight", "w2.weight"), weights.unbind(), strict=True))
    return torch.func.functional_call(experts, matrices, (x, torch.tensor([4, 2])))


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "norm": (norm, [numbers(2, 3, 8), numbers(8, seed=1)]),
    "norm of heads": (norm, [numbers(2, 64, 2, 4), numbers(4, seed=1)]),
    "norm of a part of a row": (lambda x, w: norm(x[..., 3:7], w), [numbers(2, 5, 9), numbers(4, seed=1)]),
    "halves turned": (functools.partial(turned, interleaved=False), [numbers(2, 5, 3, 6)]),
    "neighbours turned": (functools.partial(turned, interleaved=True), [numbers(2, 5, 3, 6)]),
    "part of a head turned": (lambda x: turned(x[..., 2:], interleaved=True), [numbers(2, 5, 3, 6)]),
    "swiglu": (swiglu, [3 * numbers(5, 6), 3 * numbers(5, 6, seed=1)]),
    "clamped swiglu": (clamped, [3 * numbers(6, 4), 3 * numbers(3, 2, 4, 4, seed=1)]),
}
every_form = pytest.mark.parametrize(("compute", "sides"), CASES.values(), ids=CASES.keys())


def with_gradients(compute: Callable[..., Tensor], sides: list[Tensor]) -> list[Tensor]:
    leaves = [side.clone().requires_grad_() for side in sides]
    out = compute(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, numbers(*out.shape, seed=5).to(out.dtype))]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in PLACES:
        monkeypatch.setattr(place, "cpu_forms", lambda x: None)


@every_form
def test_a_form_is_the_plain_one(
    compute: Callable[..., Tensor], sides: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding, in the same dtype; a rotation computes in fp32 whatever comes."""
    near = {torch.float64: 1e-6 if len(sides) == 1 else 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.1}
    found = {dtype: with_gradients(compute, [side.to(dtype) for side in sides]) for dtype in near}
    plain(monkeypatch)
    for dtype, ours in found.items():
        for our, their in zip(ours, with_gradients(compute, [side.to(dtype) for side in sides]), strict=True):
            torch.testing.assert_close(our, their, rtol=near[dtype], atol=near[dtype])


@every_form
def test_inference_computes_the_same(
    compute: Callable[..., Tensor], sides: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = {torch.float64: 1e-6 if len(sides) == 1 else 1e-9, torch.float32: 5e-6, torch.bfloat16: 0.1}
    with torch.inference_mode():
        found = {dtype: compute(*(side.to(dtype) for side in sides)) for dtype in near}
    plain(monkeypatch)
    for dtype, ours in found.items():
        their = compute(*(side.to(dtype) for side in sides))
        torch.testing.assert_close(ours.clone(), their, rtol=near[dtype], atol=near[dtype])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_turns_as_training_does(layout: Literal["half", "interleaved"], dtype: torch.dtype) -> None:
    rope = RoPE.Config(theta=100.0, layout=layout).build(head_dim=6)
    position_BL, x = torch.tensor([[0, 3, 9], [5, 6, 7]]), numbers(2, 3, 4, 6, dtype=torch.float32).to(dtype)
    with torch.inference_mode():
        found = rope(position_BL)(x)
    expected = rope(position_BL)(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found.clone(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 4, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_few_rows_is_the_product(n_rows: int, bias: bool, dtype: torch.dtype, by_columns: bool) -> None:
    layer = Linear(40, 24, std=1.0, bias=bias)
    with torch.no_grad():
        for i, weight in enumerate(layer.parameters()):
            weight.copy_(numbers(*weight.shape, seed=i))
    if by_columns:
        layer.weight.data = layer.weight.data.mT.contiguous().mT
    x = numbers(n_rows, 1, 80, seed=3)[..., ::2]
    expected = torch.nn.functional.linear(x, *(weight.detach().double() for weight in layer.parameters()))
    with torch.inference_mode():
        found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("name", [name for name in CASES if "turned" not in name])
def test_gradients_are_those_of_differences(name: str) -> None:
    compute, sides = CASES[name]
    assert gradcheck(compute, [side.clone().requires_grad_() for side in sides])


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_is_undone_by_its_gradient(interleaved: bool) -> None:
    """A rotation's transpose is its inverse."""
    x = numbers(2, 5, 3, 6, dtype=torch.float32).requires_grad_()
    out = turned(x, interleaved=interleaved)
    (back,) = torch.autograd.grad(out, x, out.detach())
    torch.testing.assert_close(back, x.detach())


def test_sums_over_many_tokens_do_not_gather_rounding() -> None:
    """One product over all of them would be wrong by 6e-6."""
    x, factor = (numbers(2**16, width, dtype=torch.float32, seed=width) for width in (16, 1))
    factor = factor.abs()
    exact_D = (x.double() * factor.double()).sum(0)
    error_D = cpu_forms.weighted_sum(x, factor) - exact_D
    assert error_D.abs().max() < 5e-7 * exact_D.abs().max()


@pytest.mark.parametrize("name", [name for name in CASES if name != "swiglu"])
def test_a_form_is_one_operation_that_a_checkpointed_block_repeats(name: str) -> None:
    compute, sides = CASES[name]
    forward, _ = default_activation_checkpoint_policy(mode="selective")()
    with forward:
        compute(*(side.clone().requires_grad_() for side in sides))
    names = [str(op) for op in forward.trace.ops if str(op).startswith("armature.cpu_")]
    assert len(names) == 1, forward.trace.ops


def test_a_compiler_and_other_devices_get_plain_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forms_for(torch.ones(1)) is cpu_forms and forms_for(torch.ones(1, device="meta")) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert forms_for(torch.ones(1)) is None


def test_a_gate_saves_its_two_sides_alone() -> None:
    gate, up = (numbers(4, 4, seed=seed).requires_grad_() for seed in (0, 1))
    for form in (cpu_forms.swiglu, cpu_forms.clamped_swiglu):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            form(gate, up)
        assert [each is side for each, side in zip(saved, (gate, up), strict=True)] == [True, True]


def test_a_clamped_gate_has_a_gradient_up_to_its_limit() -> None:
    """As `clamp` has: at the limit, not beyond."""
    sides = [torch.tensor([7.0, 7.0000005, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 7.0, -7.0, -7.0000005])]
    _, for_gate, for_up = with_gradients(cpu_forms.clamped_swiglu, sides)
    assert [bool(g) for g in for_gate] == [True, False, True, True, True]
    assert [bool(g) for g in for_up] == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_say_what_they_return(dtype: torch.dtype) -> None:
    """Shapes, types and strides without numbers, and tracing with sizes that change, as PyTorch checks them."""
    x, weight_D = (numbers(*shape, dtype=dtype) for shape in ((2, 6, 4, 8), (8,)))
    cos, sin = (numbers(1, 6, 1, 4, dtype=torch.float32, seed=seed) for seed in (1, 2))
    torch.library.opcheck(cpu_forms.RMS_NORM, (x, weight_D, 1e-6))
    _, reciprocal = cpu_forms.RMS_NORM(x, weight_D, 1e-6)
    torch.library.opcheck(cpu_forms.RMS_NORM_BACKWARD, (x, x, weight_D, reciprocal))
    for interleaved in (False, True):
        torch.library.opcheck(cpu_forms.ROTATE, (x, cos, sin, interleaved))
        torch.library.opcheck(cpu_forms.ROTATE, (x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, interleaved))
    torch.library.opcheck(cpu_forms.CLAMPED_SWIGLU, (x, x))
