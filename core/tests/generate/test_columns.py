"""Weights that lie by columns are the same weights."""

import pytest
import torch
from tiny_models import KINDS, tiny

from core.generate.cache import CachedDecoder, Memory
from core.generate.columns import lay_by_columns
from core.nn.grouped import GroupedLinear
from core.nn.layers import Linear


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_by_columns_is_the_same_model(kind: str) -> None:
    model = tiny(kind)
    tokens_BL = torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))
    expected_BLV = model(tokens_BL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lay_by_columns(model)
    layers = [module for module in model.modules() if isinstance(module, Linear | GroupedLinear)]
    embedding = model.tok_embeddings
    assert embedding is not None and embedding.weight.is_contiguous()
    tied = [layer for layer in layers if layer.weight is embedding.weight]
    assert len(tied) == (model.config.tie_embeddings)
    assert all(layer.weight.mT.is_contiguous() for layer in layers if layer not in tied)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with CachedDecoder(model, n_pads=[0] * 5, capacity=12) as cached:
        for end, piece_BL in zip((7, 8, 9, 12), tokens_BL.split([7, 1, 1, 3], dim=1), strict=True):
            torch.testing.assert_close(cached(piece_BL), expected_BLV[:, end - 1], rtol=0, atol=1e-5)


def test_bf16_stays_by_rows() -> None:
    model = tiny("tied").bfloat16()
    lay_by_columns(model)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_kept_tokens_of_a_head_stand_side_by_side() -> None:
    memory, module = Memory(capacity=6), torch.nn.Identity()
    sides = torch.arange(48.0).view(2, 4, 2, 3), torch.arange(16.0).view(2, 4, 2)
    for new in (slice(0, 3), slice(3, 4)):
        found = memory(module, (), tuple(side[:, new] for side in sides))
    assert all(torch.equal(kept, side) for kept, side in zip(found, sides, strict=True))
    heads, latent = found
    assert heads.transpose(1, 2).stride() == (36, 18, 3, 1)
    assert latent.stride() == (12, 2, 1)
