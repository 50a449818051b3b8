"""Rotary embedding against complex numbers, and its frequencies against the papers' formulas and transformers."""

import math
import random
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.rope import RoPE, amplitude, inverse_frequencies
from core.nn.rope_hf import rope_from_hf, rope_to_hf

LLAMA = RoPE.Config(theta=500_000.0, scaling="llama", scaling_factor=8.0, original_seq_len=8192)
YARN = RoPE.Config(theta=10_000.0, scaling="yarn", scaling_factor=40.0, original_seq_len=4096)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def turned_by_complex_numbers(x_BLNH: Tensor, position_BL: Tensor, theta: float, layout: str) -> Tensor:
    """Pair j of a head as a complex number, times e^(i p theta^(-2 j / H)) at position p, in double precision."""
    width = x_BLNH.shape[-1]
    pairs = range(width // 2)
    parts = [(2 * j, 2 * j + 1) if layout == "interleaved" else (j, j + width // 2) for j in pairs]
    out = torch.empty_like(x_BLNH, dtype=torch.float64)
    for j, (real, imaginary) in enumerate(parts):
        z_BLN = torch.complex(x_BLNH[..., real].double(), x_BLNH[..., imaginary].double())
        angle_BL = position_BL.double() * theta ** (-2 * j / width)
        z_BLN = z_BLN * torch.polar(torch.ones_like(angle_BL), angle_BL)[..., None]
        out[..., real], out[..., imaginary] = z_BLN.real, z_BLN.imag
    return out


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("head_dim", [2, 6, 16])
def test_rotation_is_a_complex_product(layout: Literal["half", "interleaved"], head_dim: int) -> None:
    rope = RoPE.Config(theta=100.0, layout=layout).build(head_dim=head_dim)
    x_BLNH = randn(2, 7, 3, head_dim)
    position_BL = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 50, 2]])
    expected = turned_by_complex_numbers(x_BLNH, position_BL, 100.0, layout)
    torch.testing.assert_close(rope(position_BL)(x_BLNH).double(), expected, rtol=0, atol=2e-5)


def test_positions_of_one_row_serve_all_rows() -> None:
    rope = RoPE.Config().build(head_dim=8)
    x_BLNH, position_1L = randn(3, 5, 2, 8), torch.arange(5)[None]
    assert torch.equal(rope(position_1L)(x_BLNH), rope(position_1L.expand(3, 5))(x_BLNH))


@pytest.mark.parametrize("plain", [True, False])
def test_layouts_differ_by_the_order_of_a_head_alone(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit in plain PyTorch; the forms of a CPU multiply complex numbers in one of the two."""
    if plain:
        monkeypatch.setattr("core.nn.rope.cpu_forms", lambda x: None)
    x_BLNH, position_BL = randn(2, 5, 3, 8), torch.arange(5)[None]
    halves = RoPE.Config(layout="half").build(head_dim=8)(position_BL)
    neighbours = RoPE.Config(layout="interleaved").build(head_dim=8)(position_BL)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    found, expected = neighbours(x_BLNH[..., order]), halves(x_BLNH)[..., order]
    torch.testing.assert_close(found, expected, **({"rtol": 0, "atol": 0} if plain else {}))


def test_scores_depend_on_the_distance_alone() -> None:
    rope = RoPE.Config(theta=100.0).build(head_dim=8)
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8).flip(-1)
    scores = [(rope(torch.tensor([[p + 3]]))(q) * rope(torch.tensor([[p]]))(k)).sum() for p in (0, 5, 40)]
    torch.testing.assert_close(scores[1:], [scores[0], scores[0]])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_bf16_is_turned_in_fp32(layout: Literal["half", "interleaved"]) -> None:
    rotation = RoPE.Config(layout=layout).build(head_dim=8)(torch.arange(64)[None])
    x_BLNH = randn(1, 64, 2, 8).bfloat16()
    turned = rotation(x_BLNH)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotation(x_BLNH.float()).bfloat16())


def test_table_does_not_depend_on_the_length_of_the_run() -> None:
    rope = YARN.build(head_dim=64)
    short, long = rope(torch.arange(16)[None]), rope(torch.arange(8192)[None])
    assert torch.equal(short.cos, long.cos[:, :16]) and torch.equal(short.sin, long.sin[:, :16])


def llama_by_wavelength(config: RoPE.Config, head_dim: int) -> list[float]:
    """Llama 3.1's three cases, stated in wavelengths as published."""
    frequencies = []
    for i in range(head_dim // 2):
        f = config.theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / f
        if wavelength > config.original_seq_len / config.low_freq_factor:
            f = f / config.scaling_factor
        elif wavelength >= config.original_seq_len / config.high_freq_factor:
            smooth = (config.original_seq_len / wavelength - config.low_freq_factor) / (
                config.high_freq_factor - config.low_freq_factor
            )
            f = (1 - smooth) * f / config.scaling_factor + smooth * f
        frequencies.append(f)
    return frequencies


def yarn_by_ramp(config: RoPE.Config, head_dim: int) -> list[float]:
    """YaRN with the ramp between the dimensions that turn beta_fast and beta_slow times, stated as a mask."""

    def correction(turns: float) -> float:
        return head_dim * math.log(config.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = correction(config.beta_fast), correction(config.beta_slow)
    if config.yarn_round:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for i in range(head_dim // 2):
        f = config.theta ** (-2 * i / head_dim)
        mask = 1 - min(max((i - low) / (high - low), 0), 1)
        frequencies.append(f / config.scaling_factor * (1 - mask) + f * mask)
    return frequencies


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_llama_frequencies(head_dim: int, factor: float) -> None:
    config = RoPE.Config(theta=500_000.0, scaling="llama", scaling_factor=factor, original_seq_len=8192)
    assert inverse_frequencies(config, head_dim) == pytest.approx(llama_by_wavelength(config, head_dim), rel=1e-12)
    assert amplitude(config) == 1.0


def test_llama_has_all_three_cases() -> None:
    plain = inverse_frequencies(RoPE.Config(theta=LLAMA.theta), 128)
    ratios = [new / old for new, old in zip(inverse_frequencies(LLAMA, 128), plain, strict=True)]
    assert ratios[0] == 1.0 and ratios[-1] == 1 / 8
    assert any(1 / 8 < ratio < 1.0 for ratio in ratios)
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (8.0, 0.25), (1.01, 1.0)])
@pytest.mark.parametrize("theta", [20.0, 10_000.0])
def test_yarn_frequencies(head_dim: int, rounded: bool, fast: float, slow: float, theta: float) -> None:
    config = RoPE.Config(
        theta=theta,
        scaling="yarn",
        scaling_factor=40.0,
        original_seq_len=4096,
        beta_fast=fast,
        beta_slow=slow,
        yarn_round=rounded,
    )
    assert inverse_frequencies(config, head_dim) == pytest.approx(yarn_by_ramp(config, head_dim), rel=1e-12)


def test_yarn_amplitude() -> None:
    """cos and sin grow by 0.1 ln(40) + 1, or not at all where attention scales its logits itself."""
    assert amplitude(YARN) == pytest.approx(1.3688879454113936)
    shared = RoPE.Config(scaling="yarn", scaling_factor=40.0, mscale=0.7, mscale_all_dim=0.7)
    assert amplitude(shared) == 1.0
    rotation = YARN.build(head_dim=8)(torch.tensor([[0]]))
    torch.testing.assert_close(rotation.cos, torch.full((1, 1, 1, 4), 1.3688879454113936))


def test_yarn_switched_off_leaves_no_temperature() -> None:
    """As by --model.rope.scaling none, which leaves the numbers of YaRN where they are."""
    rope = RoPE.Config(scaling="yarn", scaling_factor=40.0, mscale=0.7, mscale_all_dim=0.7)
    assert rope.build(head_dim=8).temperature == pytest.approx(0.07 * math.log(40) + 1)
    rope.scaling = "none"
    assert rope.build(head_dim=8).temperature == rope.build(head_dim=8).amplitude == 1.0


def drawn(seed: int) -> tuple[RoPE.Config, int]:
    draw = random.Random(seed)
    config = RoPE.Config(
        theta=10 ** draw.uniform(3, 6.5),
        scaling=draw.choice(["llama", "yarn"]),
        scaling_factor=draw.uniform(1, 40),
        original_seq_len=2 ** draw.randrange(9, 15),
        low_freq_factor=draw.uniform(0.5, 1.5),
        high_freq_factor=draw.uniform(2, 6),
        beta_fast=draw.uniform(8, 40),
        beta_slow=draw.uniform(0.5, 4),
        yarn_round=draw.random() < 0.5,
    )
    if draw.random() < 0.5:
        config.mscale, config.mscale_all_dim = draw.uniform(0.5, 1.5), draw.uniform(0.5, 1.5)
    return config, draw.choice([16, 64, 128])


@pytest.mark.parametrize("seed", range(20))
def test_scaling_equals_that_of_transformers(seed: int) -> None:
    config, head_dim = drawn(seed)
    parameters = rope_to_hf(config)["rope_parameters"]
    theirs = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=int(config.original_seq_len * config.scaling_factor),
        rope_parameters={key: value for key, value in parameters.items() if key != "attention_factor"},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"))
    ours = torch.tensor(inverse_frequencies(config, head_dim))
    torch.testing.assert_close(ours, frequencies, rtol=1e-5, atol=0)
    assert amplitude(config) == pytest.approx(factor)


@pytest.mark.parametrize("seed", range(10))
def test_hugging_face_settings_round_trip(seed: int) -> None:
    config, _ = drawn(seed)
    if config.scaling == "llama":
        unused = RoPE.Config()
        config.beta_fast, config.beta_slow, config.yarn_round = unused.beta_fast, unused.beta_slow, unused.yarn_round
        config.mscale, config.mscale_all_dim = unused.mscale, unused.mscale_all_dim
    else:
        config.low_freq_factor, config.high_freq_factor = RoPE.Config().low_freq_factor, RoPE.Config().high_freq_factor
    both = rope_to_hf(config)
    version_5 = {"rope_parameters": both["rope_parameters"]}
    version_4 = {"rope_theta": both["rope_theta"], "rope_scaling": both["rope_scaling"]}
    for hf in (both, version_5, version_4):
        assert rope_from_hf(hf, layout="half") == config
    assert rope_from_hf(rope_to_hf(RoPE.Config(theta=7.0)), layout="half") == RoPE.Config(theta=7.0)


def test_original_length_may_be_that_of_the_model() -> None:
    """transformers takes max_position_embeddings where the scaling does not state the original length."""
    hf = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 512}
    assert rope_from_hf(hf, layout="half").original_seq_len == 512
    del hf["max_position_embeddings"]
    with pytest.raises(UserError, match="max_position_embeddings"):
        rope_from_hf(hf, layout="half")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": 1.0}, "theta: theta 1.0 must be above 1"),
        ({"scaling": "yarn", "scaling_factor": 0.5}, "scaling_factor: scaling_factor 0.5 must be at least 1"),
        ({"scaling": "llama", "original_seq_len": 0}, "original_seq_len: original_seq_len 0 must be at least 1"),
        ({"scaling": "llama", "high_freq_factor": 1.0}, "high_freq_factor 1.0 must be above low_freq_factor 1.0"),
        ({"scaling": "yarn", "beta_slow": 33.0}, "beta_fast 32.0 must be at least beta_slow 33.0"),
        ({"scaling": "yarn", "beta_slow": 0.0}, "beta_slow 0.0, both above 0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(RoPE.Config(**change))
