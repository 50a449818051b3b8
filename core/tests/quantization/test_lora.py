"""Adapters: what they compute, what is trained, every layout; a run saves them alone, and folders have them merged."""

from typing import Any
from unittest import mock

import pytest
import torch
from converted_toys import EXACT, dense, one_rank, sparse, wide
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.survey import survey
from core.nn.adapter import add_adapter
from core.nn.grouped import GroupedLinear
from core.nn.init import init_weights, materialise
from core.nn.layers import Linear
from core.nn.weights import training_flops_per_token, weights
from core.parallel.settings import Parallelism
from core.quantization.converter import converted_model
from core.quantization.float8 import Float8LinearConverter
from core.quantization.lora import LoRAConverter
from core.testing import parity
from core.testing.parity import Case, largest_differences, result_of
from core.testing.ranks import run_ranks

LORA: list[Any] = [LoRAConverter.Config(rank=4, alpha=12.0)]
DORA: list[Any] = [LoRAConverter.Config(rank=4, alpha=12.0, dora=True, patterns=["layers.*.attention.*", "*.w2"])]
QLORA: list[Any] = [LoRAConverter.Config(rank=4, alpha=12.0, quantize_base=True)]
QDORA: list[Any] = [LoRAConverter.Config(rank=4, alpha=12.0, dora=True, quantize_base=True)]
FLOAT8: list[Any] = [Float8LinearConverter.Config(emulate=True, enable_fsdp_float8_all_gather=True)]
TP2, EP2, PP2 = (
    Parallelism(tensor_parallel_degree=2),
    Parallelism(expert_parallel_degree=2),
    Parallelism(pipeline_parallel_degree=2),
)
CASES = {
    "tp2-dora": Case(dense(), TP2, 2, converters=DORA, checkpoint="selective", **EXACT),
    "ep2": Case(sparse(), EP2, 2, converters=DORA, checkpoint="full", **EXACT),
    "tp2-nf4": Case(dense(), TP2, 2, converters=QDORA, checkpoint="selective", **EXACT),
    "fsdp2-nf4": Case(dense(), Parallelism(), 2, converters=QLORA, checkpoint="full", **EXACT),
    "float8-tp2": Case(dense(), TP2, 2, converters=[Float8LinearConverter.Config(emulate=True), *LORA], **EXACT),
}
MORE = {
    "fsdp2-dora": Case(dense(), Parallelism(), 2, converters=DORA, **EXACT),
    "tp2": Case(sparse(), TP2, 2, converters=LORA, **EXACT),
    "pp2": Case(dense(), PP2, 2, converters=LORA, **EXACT),
    "ep2-lora": Case(sparse(), EP2, 2, converters=LORA, checkpoint="full", **EXACT),
    "ep2-nf4": Case(wide(), EP2, 2, converters=QDORA, checkpoint="selective", **EXACT),
    "fsdp2-nf4-experts": Case(wide(), Parallelism(), 2, converters=QLORA, **EXACT),
    "pp2-nf4": Case(dense(), PP2, 2, converters=QLORA, **EXACT),
    "tp2-dora-experts": Case(sparse(), TP2, 2, converters=DORA, checkpoint="selective", **EXACT),
    "fsdp2-dora-experts": Case(sparse(), Parallelism(), 2, converters=DORA, **EXACT),
    "pp2-dora": Case(dense(), PP2, 2, converters=DORA, **EXACT),
    "float8-ep2": Case(sparse(), EP2, 2, converters=[*FLOAT8, *DORA], **EXACT),
    "float8-fsdp2": Case(sparse(), Parallelism(), 2, converters=[*FLOAT8, *LORA], **EXACT),
    "float8-fsdp2-dora": Case(sparse(), Parallelism(), 2, converters=[*FLOAT8, *DORA], **EXACT),
}


def stepped(cases: dict[str, Case]) -> dict[str, Any]:
    return {name: adapters_of(case) for name, case in cases.items()}


def adapters_of(case: Case) -> Any:
    """A step whose adapters matter: B begins at 0, so the first step moves it, and the second loss sees A and B."""
    whole = parity.full
    with mock.patch.object(parity, "full", lambda tensor: torch.zeros(1) if tensor is None else whole(tensor)):
        return result_of(case)


@pytest.mark.layout
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.matrix)], ids=["few", "more"])
def test_layouts_equal_one_rank(cases: dict[str, Case]) -> None:
    found = run_ranks(stepped, 2, cases)
    for name, case in cases.items():
        expected = adapters_of(one_rank(case))
        assert any(gradient.abs().max() > 0 for key, gradient in expected.gradients.items() if "lora_b" in key)
        assert not any(gradient.any() for key, gradient in expected.gradients.items() if key.endswith("weight"))
        differences = largest_differences([ranks[name] for ranks in found], expected)
        assert differences["start"] == 0 and differences["next loss"] < 1e-6, (name, differences)
        assert differences["gradient"] < 1e-5 and differences["loss"] < 1e-6, (name, differences)


def test_adapters_compute_what_they_say() -> None:
    x, generator = torch.randn(7, 6, requires_grad=True), torch.Generator().manual_seed(0)
    for magnitude in (False, True):
        layer: Any = Linear(6, 5, std=1.0, bias=True)
        add_adapter(layer, 2, 1.5, magnitude=magnitude)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.normal_(generator=generator)
        adapted = layer.weight + 1.5 * layer.lora_b @ layer.lora_a
        if magnitude:
            lengths = layer.weight.norm(dim=1) / adapted.norm(dim=1)
            adapted = (layer.magnitude * lengths).unsqueeze(1) * adapted
        torch.testing.assert_close(layer(x), F.linear(x, adapted, layer.bias))
    for magnitude in (False, True):
        stack: Any = GroupedLinear(3, 6, 5, std=1.0, bias=True)
        add_adapter(stack, 2, 1.5, magnitude=magnitude)
        with torch.no_grad():
            for weight in stack.parameters():
                weight.normal_(generator=generator)
        y = stack(x, torch.tensor([3, 0, 4]))
        for rows, i in ((slice(0, 3), 0), (slice(3, 7), 2)):
            adapted = stack.weight[i] + 1.5 * stack.lora_b[i] @ stack.lora_a[i]
            if magnitude:
                lengths = stack.weight[i].norm(dim=1) / adapted.norm(dim=1)
                adapted = (stack.magnitude[i] * lengths).unsqueeze(1) * adapted
            torch.testing.assert_close(y[rows], F.linear(x[rows], adapted, stack.bias[i]))


def test_only_adapters_are_trained_and_products_are_counted_as_before() -> None:
    model, (done,) = converted_model(sparse(), LORA)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert (
        trained == {f"{name}.{leaf}" for name in done.names for leaf in ("lora_a", "lora_b")} and len(done.names) == 17
    )
    plain, _ = converted_model(dense(), [])
    adapted, _ = converted_model(dense(), LORA)
    sizes = [128 + 64, 64 + 64, 64 + 64, 64 + 128, 128 + 64, 128 + 64, 64 + 128]
    twice = training_flops_per_token(plain, 64).matmul * 2 // 3  # forward, and the gradients of inputs
    assert training_flops_per_token(adapted, 64).matmul == twice + 3 * 2 * 2 * 4 * sum(sizes)
    mode, settings = ActivationCheckpoint.Config(mode="selective"), {"shape": (2, 64), "dtype": torch.float32}
    saved = [
        survey(dense(), mode, converters=each, **settings).kinds[0].saved  # pyrefly: ignore[bad-argument-type]
        for each in ([], LORA)
    ]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(("config", "converters"), [(sparse(), LORA), (wide(), QLORA)], ids=["lora", "nf4"])
def test_products_are_those_that_torch_counts(config: Any, converters: list[Any]) -> None:
    """But for the gradients of the input of the first block, which nobody asks for: below it all is frozen."""
    model, _ = converted_model(config, converters)
    materialise(model, torch.device("cpu"), torch.float32)
    init_weights(((weight.name, weight.value, weight.start) for weight in weights(model)), 0)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(64).view(2, 32) % 62).sum().backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    first: Any = model.layers["0"].attention
    unasked = 0
    for layer in (first.wq, first.wk, first.wv):
        unasked += 2 * (layer.n_numbers - layer.lora_b.numel())
    assert products == (training_flops_per_token(model, 32).matmul - unasked) * 64


def test_what_has_no_adapter_is_told() -> None:
    assert "(32 x 64 has no rank 40)" in str(converted_model(sparse(), [LoRAConverter.Config(rank=40)])[1][0])
    ((path, _),) = LoRAConverter.Config(alpha=0.0).problems()
    assert path == "alpha"
