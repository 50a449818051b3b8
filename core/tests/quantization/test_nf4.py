"""Weights of 4 bits: the published numbers, bytes as bitsandbytes writes them, products, and what a run keeps."""

from typing import Any

import pytest
import torch
from converted_toys import dense, wide
from torch.nn import functional as F

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.survey import survey
from core.config.errors import UserError
from core.nn.adapter import numbers_of
from core.nn.grouped import grouped_mm
from core.nn.init import init_weights, materialise
from core.nn.nf4 import LEVELS, NF4_GROUPED_MM, NF4_MM, from_nf4, to_nf4
from core.nn.weights import n_numbers, parameter_count, training_flops_per_token, weights
from core.parallel.settings import Parallelism
from core.quantization.converter import converted_model
from core.quantization.float8 import Float8LinearConverter
from core.quantization.lora import LoRAConverter
from core.step.converted import block_problems
from core.step.settings import Training
from core.train.memory import estimate
from core.train.trainer import Trainer

LORA: list[Any] = [LoRAConverter.Config(rank=4)]
QLORA: list[Any] = [LoRAConverter.Config(rank=4, quantize_base=True)]
QDORA: list[Any] = [LoRAConverter.Config(rank=4, quantize_base=True, dora=True)]


def by_formula(values: torch.Tensor) -> torch.Tensor:
    """The nearest level of each number, block by block, times the largest."""
    blocks = values.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(LEVELS)
    distances = (blocks.unsqueeze(-1) / largest.unsqueeze(-1) - table).abs()
    return (table[distances.argmin(-1)] * largest).view_as(values)


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: 8 quantiles above zero and 7 below, as far out as both tails leave on average, and zero."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), levels / levels.max(), rtol=0, atol=2e-7)


def test_numbers_become_the_nearest_levels() -> None:
    values = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(0))
    values[0, 0, :64] = 0.0
    stored = to_nf4(values)
    assert stored.dtype == torch.uint8 and stored.shape == (3, 5, 108)
    found = from_nf4(stored, torch.float32)
    assert not found[0, 0, :64].any()
    torch.testing.assert_close(found[1:], by_formula(values[1:]), rtol=0, atol=0)
    torch.testing.assert_close(from_nf4(to_nf4(found), torch.float32), found, rtol=0, atol=0)
    assert torch.equal(stored[:, 2:4, 36:72], to_nf4(values[:, 2:4, 64:128]))


def test_bitsandbytes_writes_the_same_bytes() -> None:
    reference = pytest.importorskip("bitsandbytes", reason="a reference that a test environment need not have")
    values = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    bits, state = reference.functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    blocks = to_nf4(values).view(-1, 36)
    assert torch.equal(blocks[:, :32].reshape(-1), bits.view(-1))
    assert torch.equal(blocks[:, 32:].contiguous().view(torch.float32).view(-1), state.absmax)
    found = reference.functional.dequantize_4bit(bits, state)
    torch.testing.assert_close(from_nf4(to_nf4(values), torch.float32), found, rtol=0, atol=0)


def test_products_are_those_of_the_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 128, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 5, 128, generator=generator)
    stored, counts = to_nf4(values), torch.tensor([3, 0, 4])
    numbers = from_nf4(stored, torch.float64)
    for made, expected in (
        (NF4_MM(x, stored[0], False), F.linear(x, numbers[0])),
        (NF4_GROUPED_MM(x, stored, counts, False), grouped_mm(x, numbers, counts)),
    ):
        torch.testing.assert_close(made, expected)
        grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (made, expected)))
    torch.library.opcheck(NF4_MM, (x, stored[0], False))
    torch.library.opcheck(NF4_GROUPED_MM, (x.detach(), stored, counts, False))


def test_a_model_keeps_few_bytes_and_counts_its_numbers() -> None:
    for config in (dense(), wide()):
        (whole, _), (model, (done,)) = (converted_model(config, each) for each in (LORA, QLORA))
        assert parameter_count(model) == parameter_count(whole)
        assert training_flops_per_token(model, 64) == training_flops_per_token(whole, 64)
        materialise(model, torch.device("cpu"), torch.float32)
        init_weights(((w.name, w.value, w.start) for w in weights(model)), 0)
        materialise(whole, torch.device("cpu"), torch.float32)
        init_weights(((w.name, w.value, w.start) for w in weights(whole)), 0)
        for name in done.names:
            layer, other = model.get_submodule(name), whole.get_submodule(name)
            assert layer.weight.nbytes * 64 == other.weight.numel() * 36
            torch.testing.assert_close(numbers_of(layer), by_formula(other.weight.detach()), rtol=0, atol=0)
            torch.testing.assert_close(layer.lora_a, other.lora_a, rtol=0, atol=0)


def test_an_estimate_and_a_plan_count_the_bytes() -> None:
    found = {}
    for name, converters in (("plain", []), ("nf4", QDORA)):
        run = Trainer.Config(model=wide(), training=Training(steps=1, seq_len=32, local_batch_size=2, device="cpu"))
        run.converters, run.checkpoint.enable, run.checkpoint.initial_load_path = converters, True, "base"
        model, _ = converted_model(run.model, converters)
        frozen = [weight for weight in model.parameters() if not weight.is_floating_point()]
        n_bytes = 4 * (parameter_count(model) - sum(map(n_numbers, frozen))) + sum(weight.nbytes for weight in frozen)
        assert estimate(model, run.optimizer, run.loss, run.training).weights == n_bytes
        for world_size in (1, 2):
            plan = Trainer.plan(run, world_size=world_size, rank=0)
            assert plan.weights_bytes * world_size == n_bytes and plan.model_parameters == parameter_count(model)
        found[name] = n_bytes
        assert bool(frozen) == any("lora: " in note for note in plan.notes)
    assert found["nf4"] < 0.4 * found["plain"]


def test_ranks_want_a_torch_that_shares_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.parallel.data.HAS_MESH_PER_WEIGHT", False)
    run = Trainer.Config(model=wide(), training=Training(steps=1, seq_len=32, local_batch_size=2, device="cpu"))
    run.converters, run.checkpoint.enable, run.checkpoint.initial_load_path = QLORA, True, "base"
    with pytest.raises(UserError, match=r"converters: .* in 4 bits on several ranks needs torch 2\.12, this is "):
        Trainer.plan(run, world_size=2, rank=0)
    run.converters = LORA
    Trainer.plan(run, world_size=2, rank=0)


def test_checkpoints_of_activations_count_its_products() -> None:
    for mode in ("selective", "full"):
        settings: Any = {"shape": (2, 64), "dtype": torch.float32}
        saved = [
            survey(dense(), ActivationCheckpoint.Config(mode=mode), converters=each, **settings).kinds[0]  # pyrefly: ignore[bad-argument-type]
            for each in ([], QLORA)
        ]
        assert saved[0].saved == saved[1].saved


def test_layers_that_cannot_be_kept_so_are_told() -> None:
    config = dense(dim=96)
    told = str(converted_model(config, QLORA)[1][0])
    assert "96 inputs are no multiple of 64, which quantize_base needs" in told
    both: list[Any] = [Float8LinearConverter.Config(emulate=True), *QLORA]
    with pytest.raises(UserError, match="another converter has its product, and quantize_base needs a plain one"):
        converted_model(dense(), both)
    model, _ = converted_model(dense(), QLORA)
    ((_, message),) = list(block_problems(model, Parallelism(tensor_parallel_degree=4)))[:1]
    assert "tensor_parallel_degree 4 cuts" in message and "128 into parts that are no multiples of 64" in message
