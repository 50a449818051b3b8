"""Converters: which layers they change and which not, what they leave alone, and mistakes."""

from typing import Any

import pytest
import torch
from converted_toys import dense, sparse
from torch import Tensor
from torch.nn import functional as F

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.activation_checkpoint.survey import survey
from core.config.errors import UserError
from core.nn.layers import Linear
from core.nn.product import layer_products
from core.nn.weights import training_flops_per_token, weights
from core.parallel.settings import Parallelism
from core.quantization import kernels
from core.quantization.aware import QATConverter
from core.quantization.converter import Converter, converted_model
from core.quantization.float8 import Float8LinearConverter
from core.quantization.lora import LoRAConverter
from core.quantization.microscaling import FP4LinearConverter, MXFP8LinearConverter
from core.runtime.meta import meta_model
from core.step.converted import block_problems, device_problems
from core.testing.toy import on_cpu

CPU = torch.device("cpu")


def float8(**settings: Any) -> Float8LinearConverter.Config:
    return Float8LinearConverter.Config(emulate=True, **settings)


def said(config: Any, *converters: Converter.Config) -> str:
    return "; ".join(map(str, converted_model(config, converters)[1]))


def test_what_is_converted_and_what_is_left_out_is_told() -> None:
    text = said(sparse(), float8(patterns=["layers.1.*", "output"], filter_fqns=["wo"], min_dim=64))
    assert text == (
        "float8: 6 of 12 layers, layers.*.attention.wq, layers.*.attention.wk, layers.*.attention.wv, "
        "layers.*.moe.shared_experts.w1, layers.*.moe.shared_experts.w3, layers.*.moe.shared_experts.w2; left out: "
        "layers.*.attention.wo (filter_fqns wo); layers.*.moe.router.gate (a gate, which computes in fp32); "
        "layers.*.moe.experts.w1, layers.*.moe.experts.w3 (32 x 64 is below min_dim 64); "
        "layers.*.moe.experts.w2 (64 x 32 is below min_dim 64); output (the head, whose product is the loss's)"
    )


def test_layers_of_sizes_that_do_not_fit_are_left_out() -> None:
    config = dense()
    config.feed_forward.hidden_dim = 72
    assert "layers.*.feed_forward.w2 (64 x 72 is no multiple of 16)" in said(config, float8())


def test_a_layer_with_a_forward_of_its_own_is_left_out() -> None:
    class Twice(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2.0 * self.weight)

    model = meta_model(dense())
    model.layers["0"].attention.wq.__class__ = Twice
    done = float8(patterns=["layers.0.attention.*"]).build().apply(model)
    assert done.left == {"layers.0.attention.wq": "a forward of its own"} and len(done.names) == 3


def test_names_axes_and_flops_stay() -> None:
    (model, _), plain = converted_model(sparse(), [float8()]), meta_model(sparse())
    assert [weight._replace(value=None) for weight in weights(model)] == [
        weight._replace(value=None) for weight in weights(plain)
    ]
    assert training_flops_per_token(model, 64) == training_flops_per_token(plain, 64)
    assert len(list(layer_products(model))) == 4 + 3 + 4 + 3 + 3


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("config", [dense(), sparse()], ids=["dense", "sparse"])
def test_checkpointing_saves_and_repeats_as_for_plain_products(config: Any, recipe: Any) -> None:
    """The same bytes per block but for the maxima, a few numbers each, and the same share of the work twice."""
    settings: dict[str, Any] = {"shape": (2, 64), "dtype": torch.float32}
    mode = ActivationCheckpoint.Config(mode="selective")
    plain, found = (
        survey(config, mode, **settings),
        survey(config, mode, converters=[float8(recipe_name=recipe)], **settings),
    )
    assert found.recomputed_share == plain.recomputed_share > 0
    for ours, theirs in zip(found.kinds, plain.kinds, strict=True):
        assert 0 <= ours.saved - theirs.saved <= 200
    forced = ActivationCheckpoint.Config(mode="selective", force_recompute=["attention.wq"])
    more = [survey(config, forced, converters=each, **settings).recomputed_share for each in ([], [float8()])]
    assert more[0] == more[1] != plain.recomputed_share


def test_the_bias_is_added_and_other_layers_are_untouched() -> None:
    config = dense()
    plain, model = on_cpu(config), on_cpu(config)
    float8(patterns=["*.wq"]).build().apply(model)
    layer, x = model.layers["0"].attention.wq, torch.randn(2, 3, 64)
    with torch.no_grad():
        layer.bias.fill_(100.0)
        expected = layer.product(x, layer.weight) + 100.0
        assert torch.equal(layer(x), expected) and (expected - 100.0 - F.linear(x, layer.weight)).abs().max() > 0
        other = plain.layers["0"].attention.wk
        assert torch.equal(model.layers["0"].attention.wk(x), other(x))


@pytest.mark.parametrize(
    ("converters", "error"),
    [
        ([float8(patterns=["*.wz"])], r"float8: no layer is called \*\.wz; there are .*\.wq"),
        ([float8(filter_fqns=["router.gate"])], "no layer is called router.gate; "),
        ([float8(patterns=["output"])], "leaves out every layer that its patterns name: output: the head"),
        ([float8(min_dim=4096)], "leaves out every layer .* is below min_dim 4,096; .*and 12 more"),
        ([float8(), float8()], "layers.0.attention.wq: it has been converted before"),
        ([float8(patterns=[])], "float8: patterns is empty: name layers, or leave it out for all"),
        ([LoRAConverter.Config(), float8()], "wq: it has an adapter: put this converter in front of that one"),
        ([QATConverter.Config(), LoRAConverter.Config()], "quantisation-aware changes how weights are trained, and be"),
        ([LoRAConverter.Config(), QATConverter.Config()], "quantisation-aware changes how weights are trained, and be"),
        (
            [QATConverter.Config(patterns=["*.wq"]), LoRAConverter.Config(patterns=["*.wv"])],
            "quantisation-aware changes how weights are trained, and beside adapters none is: use one",
        ),
    ],
)
def test_mistakes_are_told(converters: list[Converter.Config], error: str) -> None:
    with pytest.raises(UserError, match=error):
        converted_model(dense(), converters)


def test_settings_and_devices_that_do_not_fit_are_told() -> None:
    ((path, message),) = float8(recipe_name="rowwise", enable_fsdp_float8_all_gather=True).problems()
    assert path == "enable_fsdp_float8_all_gather" and "use tensorwise" in message
    ((path, message),) = device_problems([float8(), Float8LinearConverter.Config()], CPU)
    assert path == "converters.1" and "needs a GPU of compute capability 8.9" in message and "set emulate" in message
    ((path, message),) = MXFP8LinearConverter.Config().problems()
    assert path == "emulate" and "emulated alone, and are slower than plain products: set emulate" in message
    mixed = FP4LinearConverter.Config(emulate=True, recipe_name="mxfp4", square_weight_blocks=True)
    ((path, message),) = mixed.problems()
    assert path == "square_weight_blocks" and "recipe_name mxfp4 has blocks in rows alone" in message
    model, _ = converted_model(dense(), [float8()])
    assert not list(block_problems(model, Parallelism(tensor_parallel_degree=4)))
    found = [message for _, message in block_problems(model, Parallelism(tensor_parallel_degree=8))]
    assert found == [
        "layers.0.attention.wk.weight: tensor_parallel_degree 8 cuts heads 64 into parts that are no multiples of 16: "
        "use a lower degree, or leave the layer out with filter_fqns"
    ]


def test_a_gpu_without_the_format_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, told in {
        (8, 0): "float8 needs compute capability 8.9, this GPU has 8.0: set emulate",
        (9, 0): "",
    }.items():
        monkeypatch.setattr(kernels, "n_gpus", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert Float8LinearConverter.Config().build().device_problem(torch.device("cuda")) == told
