"""Weights in few bits, against plain loops over every number and against transformers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from weight_trees import Weights

from core.config.errors import UserError
from core.weights import shard_file
from core.weights.hf import load_hf
from core.weights.key_map import hf_key_map
from core.weights.keys import Stacked
from core.weights.quantised import mxfp4, scaled
from core.weights.shard_file import stretches
from core.weights.source import WeightSource

SIZES = [(1, 1), (128, 128), (127, 129), (300, 200), (256, 384)]


def drawn(shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits and its factors."""
    generator = torch.Generator().manual_seed(seed)
    blocks = *shape[:-2], *((size + 127) // 128 for size in shape[-2:])
    weight = torch.randn(shape, generator=generator).mul(100).to(torch.float8_e4m3fn)
    return weight, torch.rand(blocks, generator=generator) + 0.01


def looped(weight: Tensor, factors: Tensor) -> Tensor:
    out = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = float(weight[i, j].float()) * float(factors[i // 128, j // 128])
    return out


def load(tensors: dict[str, Tensor], folder: Path, shape: tuple[int, ...], *, stacked: bool = False) -> Tensor:
    """What a model with one weight w of this shape reads from a file with these tensors."""
    model = Weights({"w": Stacked("x") if stacked else "x"}, {"w": shape})
    save_file(tensors, folder / "model.safetensors")
    before = model.values()["w"]
    try:
        load_hf(model, folder)
    except UserError:
        assert torch.equal(model.state_dict()["w"], before)
        raise
    return model.state_dict()["w"]


@pytest.mark.parametrize("shape", SIZES[:4])
def test_eight_bits_equal_a_loop(shape: tuple[int, int]) -> None:
    weight, factors = drawn(shape)
    assert torch.equal(scaled(weight, factors), looped(weight, factors))


@pytest.mark.parametrize("shape", SIZES)
def test_eight_bits_are_read(shape: tuple[int, int], tmp_path: Path) -> None:
    weight, factors = drawn(shape)
    tensors = {"x": weight, "x_scale_inv": factors}
    assert torch.equal(load(tensors, tmp_path, shape), scaled(weight, factors))


def test_eight_bits_of_all_experts_are_read(tmp_path: Path) -> None:
    weight, factors = drawn((3, 130, 140))
    expected = torch.stack([scaled(*pair) for pair in zip(weight, factors, strict=True)])
    assert torch.equal(load({"x": weight, "x_scale_inv": factors}, tmp_path, (3, 130, 140), stacked=True), expected)


def test_whole_blocks_of_rows_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight whose rows stand in another order there, too."""
    monkeypatch.setattr(shard_file, "STRETCH_BYTES", 100)
    model = Weights({"w": "x"}, {"w": (264, 140)})
    model.HF_HALVES = frozenset({"w"})
    weight, factors = drawn((264, 140))
    save_file({"x": weight, "x_scale_inv": factors}, tmp_path / "model.safetensors")
    source = WeightSource(hf_key_map(model), tmp_path)
    spans = list(stretches([264, 140], torch.float32, source.row_block("w") or 0))
    assert spans == [slice(0, 128), slice(128, 256), slice(256, 264)]
    expected = scaled(weight, factors).view(33, 2, 4, 140).transpose(1, 2).reshape(264, 140)
    assert torch.equal(torch.cat([source.read_rows("w", rows) for rows in spans]), expected)


def test_every_byte_of_mxfp4() -> None:
    """Sign, two bits of exponent, one of mantissa; the low half of the byte is the first number."""

    def number(half: int) -> float:
        sign, exponent, mantissa = -1.0 if half & 8 else 1.0, (half >> 1) & 3, half & 1
        return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    expected = torch.tensor([[number(byte & 15), number(byte >> 4)] for byte in range(256)]).flatten()
    scales = torch.full((1, 16), 127, dtype=torch.uint8)
    assert torch.equal(mxfp4(blocks, scales), expected[:, None])


def test_mxfp4_equals_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 4), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (3, 128, 10)
    assert torch.equal(mxfp4(blocks, scales), expected.float())
    for scale in (0, 1, 254):
        scales = torch.full((3, 10, 4), scale, dtype=torch.uint8)
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(mxfp4(blocks, scales), expected), scale


W, F = drawn((130, 140))
BLOCKS, SCALES = torch.ones(2, 8, 3, 16, dtype=torch.uint8), torch.ones(2, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": W}, "x is stored as F8_E4M3, which needs x_scale_inv"),
        ({"x": torch.ones(130, 140, dtype=torch.int8)}, "x is stored as I8, which is none of F64, F32, F16, BF16"),
        ({"x_scale_inv": F}, "x_scale_inv has no x"),
        ({"x": W, "x_scale_inv": F[:1]}, "x has scales of shape [1, 2], it needs [2, 2]"),
        ({"x": W.float(), "x_scale_inv": F}, "x is stored as F32, but its scales are for F8_E4M3"),
        ({"x_blocks": BLOCKS}, "x_blocks has no x_scales"),
        ({"x_scales": SCALES}, "x_scales has no x_blocks"),
        ({"x_blocks": BLOCKS, "x_scales": SCALES[:, :4]}, "x_blocks has scales of shape [2, 4, 3], it needs [2, 8, 3]"),
        ({"x_blocks": BLOCKS.float(), "x_scales": SCALES}, "x_blocks is stored as F32, but its scales are for U8"),
        ({"x_blocks": BLOCKS[..., :8], "x_scales": SCALES}, "x_blocks has shape [2, 8, 3, 8], which does not end in"),
        ({"x_blocks": BLOCKS, "x_scales": SCALES}, "x has shape [2, 96, 8], the model wants [130, 140]"),
        ({"x": W, "x_scale_inv": F, "x_blocks": BLOCKS}, "x cannot stand beside x_blocks and x_scale_inv"),
        ({"x": W, "x_scale_inv": F, "y_scales": SCALES}, "y_scales is unknown to Weights"),
    ],
)
def test_what_does_not_belong_together(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    with pytest.raises(UserError, match=r"\n  model.safetensors: " + re.escape(message)):
        load(tensors, tmp_path, (130, 140))
