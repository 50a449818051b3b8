"""A weight's start depends on the seed and its name, and on nothing else."""

import pytest
import torch
from torch import Tensor, nn

from core.nn.decoder import Decoder
from core.nn.init import LocalSlice, init_weights, materialise
from core.nn.module import Module
from core.nn.start import Constant, Normal, Scale, Start
from core.nn.weights import weights
from core.runtime.meta import meta_model
from core.testing.toy import Toy, on_cpu


def drawn(name: str, start: Start, seed: int = 0, shape: tuple[int, ...] = (64, 32)) -> Tensor:
    value = torch.empty(shape)
    init_weights([(name, value, start)], seed)
    return value


def values(model: Decoder) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def test_order_and_company_do_not_matter() -> None:
    starts = [(w.name, w.value, w.start) for w in weights(on_cpu(Toy.Config()))]
    expected = [value.detach().clone() for _, value, _ in starts]
    for _, value, _ in starts:
        value.detach().fill_(torch.nan)
    torch.manual_seed(1)  # nor does the global stream
    init_weights(reversed(starts[3:]), seed=0)
    init_weights(starts[:3], seed=0)
    for (name, value, _), wanted in zip(starts, expected, strict=True):
        assert torch.equal(value, wanted), name


def test_depth_matters_to_residual_writers_alone() -> None:
    shallow, deep = values(on_cpu(Toy.Config(n_layers=2))), values(on_cpu(Toy.Config(n_layers=8)))
    for name, value in shallow.items():
        if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
            torch.testing.assert_close(deep[name] * 2, value, rtol=1e-5, atol=0)
        else:
            assert torch.equal(deep[name], value), name


def test_residual_writers_are_drawn_smaller_and_nothing_else_is() -> None:
    config = Toy.Config(n_layers=3, init_std=0.05)
    residual = 0.05 / (2 * 3) ** 0.5
    for weight in weights(meta_model(config)):
        if weight.value.dim() == 1:
            assert weight.start == Constant(1.0), weight.name
        elif weight.name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
            assert weight.start == Normal(pytest.approx(residual), cut=3.0), weight.name
        else:
            assert weight.start == Normal(0.05, cut=3.0), weight.name


def test_scale_of_depth() -> None:
    assert Scale.of_depth(0.02, 8) == (0.02, 0.005)


def test_names_and_seeds_give_different_draws() -> None:
    draws = [drawn(name, Normal(1.0), seed) for name in ("layers.0.w", "layers.1.w", "layers.10.w") for seed in (0, 1)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].abs() < 0.1


@pytest.mark.parametrize("cut", [1.0, 3.0])
@pytest.mark.parametrize("std", [0.02, 1.5])
def test_the_cut_is_counted_in_standard_deviations(std: float, cut: float) -> None:
    value = drawn("w", Normal(std, cut), shape=(1000, 1000))
    assert 0.99 * cut * std < value.abs().max() <= cut * std * (1 + 1e-6)
    # the moments of a normal distribution between -c and c: variance 1 - 2 c phi(c) / (2 Phi(c) - 1)
    c = torch.tensor(cut, dtype=torch.float64)
    inside = torch.erf(c / 2**0.5)
    density = torch.exp(-c * c / 2) / (2 * torch.pi) ** 0.5
    variance = std**2 * (1 - 2 * c * density / inside)
    n = value.numel()
    assert value.double().mean().abs() < 5 * std / n**0.5
    assert (value.double().var() / variance - 1).abs() < 5 * (2 / n) ** 0.5


def test_bf16_weights_are_the_fp32_draw_cast() -> None:
    exact, cast = values(on_cpu(Toy.Config())), values(on_cpu(Toy.Config(), dtype=torch.bfloat16))
    for name, value in exact.items():
        assert cast[name].dtype == torch.bfloat16
        assert torch.equal(cast[name], value.bfloat16()), name


def test_materialise_keeps_ties_flags_and_buffers() -> None:
    model = meta_model(Toy.Config(tie_embeddings=True))
    model.norm.weight.requires_grad_(False)
    frequencies = model.rope.inverse_frequency.clone()
    materialise(model, torch.device("cpu"), torch.bfloat16)
    assert model.output.weight is model.tok_embeddings.weight
    assert not model.norm.weight.requires_grad and model.output.weight.requires_grad
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(weight.is_meta for weight in model.parameters())
    assert model.rope.inverse_frequency.dtype == torch.float32
    assert torch.equal(model.rope.inverse_frequency, frequencies)


def test_materialise_finds_both_names_of_a_weight_in_one_module() -> None:
    module = nn.Module()
    module.a = module.b = nn.Parameter(torch.empty(2, device="meta"))
    materialise(module, torch.device("cpu"), torch.float32)
    assert module.a is module.b and not module.b.is_meta


def test_materialise_does_not_lose_values() -> None:
    with pytest.raises(AssertionError, match="weight has a value, which would be lost"):
        model = on_cpu(Toy.Config())
        materialise(model.norm, torch.device("cpu"), torch.float32)


def test_a_buffer_must_have_a_value() -> None:
    module = Module()
    module.register_buffer("table", torch.empty(2, device="meta"))
    with pytest.raises(AssertionError, match="table must be built on a real device"):
        materialise(module, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("shape", [(7,), (6, 5), (4, 6, 5)], ids=str)
def test_a_piece_gets_the_numbers_that_the_whole_has_there(shape: tuple[int, ...]) -> None:
    full, cut = torch.empty(shape), tuple(slice(1, 3) for _ in shape)
    init_weights([("w", full, Normal(1.0))], seed=3)
    holder, part = torch.empty(shape, device="meta"), torch.empty(2, *[2 for _ in shape[1:]])
    init_weights([("w", holder, Normal(1.0))], seed=3, local_slice=lambda _: LocalSlice(part, tuple(1 for _ in shape)))
    assert torch.equal(part, full[cut])


def test_matrices_of_a_stack_differ() -> None:
    stack = torch.empty(3, 20, 20)
    init_weights([("w", stack, Normal(1.0))], seed=3)
    assert not any(torch.equal(stack[i], stack[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert stack.std().item() == pytest.approx(0.9866, abs=0.05)  # cut at three standard deviations
