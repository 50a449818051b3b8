"""The parts of tensor parallelism: the cut vocabulary, the two collectives, and what a module sees of its weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_cases import dense
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from core.data.packing import IGNORE
from core.nn.layers import Embedding, Linear
from core.parallel.tensor import (
    CutVocabulary,
    apply_tensor,
    gather_tokens,
    local,
    look_up_own_rows,
    own_vocabulary,
    read,
    scatter_sum,
    store_as_dtensor,
    stored,
)
from core.runtime.meta import meta_model
from core.testing.oracles import cross_entropy
from core.testing.ranks import run_ranks
from core.testing.toy import Toy


def line(n: int) -> DeviceMesh:
    return init_device_mesh("cpu", (n,))


def drawn(vocab_size: int, *, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V) and labels, of which some do not count: all of the first row, and all of the last rank."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_BLV = torch.randn(3, 8, vocab_size, generator=generator) * scale
    labels_BL = torch.randint(vocab_size, (3, 8), generator=generator)
    labels_BL[0] = labels_BL[:, 6:] = IGNORE
    return logits_BLV, labels_BL


def loss_of_cut(vocab_size: int, n: int, scale: float, dtype: torch.dtype) -> dict[str, Any]:
    mesh = line(n)
    logits_BLV, labels_BL = drawn(vocab_size, scale=scale)
    first, size = own_vocabulary(vocab_size, mesh)
    own_BLV = logits_BLV[..., first : first + size].to(dtype).requires_grad_()
    loss = CutVocabulary(mesh, vocab_size).cross_entropy(own_BLV.float(), labels_BL).sum()
    (loss / 7).backward()
    return {"rows": (first, size), "loss": loss.item(), "gradient": own_BLV.grad}


@pytest.mark.parametrize("scale", [3.0, 3000.0])
@pytest.mark.parametrize(("n", "vocab_size"), [(2, 62), (2, 61), (2, 1), (4, 62), (4, 9), (4, 5), (4, 3), (4, 2)])
def test_loss_of_a_cut_vocabulary(n: int, vocab_size: int, scale: float) -> None:
    found = run_ranks(loss_of_cut, n, vocab_size, n, scale, torch.float32)
    logits_BLV, labels_BL = drawn(vocab_size, scale=scale)
    logits_BLV.requires_grad_()
    loss = cross_entropy(logits_BLV, labels_BL)
    (loss / 7).backward()
    assert sum(part["loss"] for part in found) == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    pieces = [part["gradient"] for part in found]
    torch.testing.assert_close(torch.cat(pieces, -1), logits_BLV.grad, rtol=1e-5, atol=1e-7)
    chunks = torch.arange(vocab_size).chunk(n)
    rows = [(chunk[0].item(), len(chunk)) for chunk in chunks] + [(vocab_size, 0)] * (n - len(chunks))
    assert [part["rows"] for part in found] == rows
    assert n == 2 or found[-1]["loss"] == 0.0


def test_loss_is_computed_in_fp32() -> None:
    found = run_ranks(loss_of_cut, 2, 62, 2, 3.0, torch.bfloat16)
    logits_BLV, labels_BL = drawn(62)
    expected = F.cross_entropy(
        logits_BLV.bfloat16().float().flatten(0, 1), labels_BL.flatten(), reduction="sum", ignore_index=IGNORE
    )
    assert sum(part["loss"] for part in found) == pytest.approx(expected.item(), rel=1e-6)
    assert found[0]["gradient"].dtype == torch.bfloat16


def lookup(vocab_size: int, n: int) -> dict[str, Tensor]:
    mesh = line(n)
    embedding = Embedding(vocab_size, 4, std=1.0)
    weight = torch.arange(vocab_size * 4.0).view(vocab_size, 4)
    embedding.weight.data.copy_(weight)
    store_as_dtensor(embedding, "weight", mesh, Shard(0), {})
    read(embedding, "weight", local)
    look_up_own_rows(embedding, mesh)
    tokens_BL = torch.arange(16).view(2, 8) % vocab_size
    own_BLD = embedding(tokens_BL)
    (own_BLD * (1 + dist.get_rank())).sum().backward()
    gradient = stored(embedding, "weight").grad
    assert isinstance(gradient, DTensor)
    return {"own": own_BLD, "gradient": gradient.full_tensor()}


@pytest.mark.parametrize(("n", "vocab_size"), [(2, 6), (2, 7), (4, 9), (4, 5)])
def test_every_rank_gets_the_rows_of_its_tokens(n: int, vocab_size: int) -> None:
    found = run_ranks(lookup, n, vocab_size, n)
    weight = torch.arange(vocab_size * 4.0).view(vocab_size, 4).requires_grad_()
    tokens_BL = torch.arange(16).view(2, 8) % vocab_size
    rows = F.embedding(tokens_BL, weight)
    assert torch.equal(torch.cat([part["own"] for part in found], 1), rows)
    factor_L = torch.arange(n).repeat_interleave(8 // n) + 1
    (rows * factor_L[None, :, None]).sum().backward()
    for part in found:
        assert torch.equal(part["gradient"], weight.grad)


def both_ways(n: int) -> dict[str, Tensor]:
    mesh, rank = line(n), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3 * n, 5, generator=generator)
    found = {"x": x, "y": y}
    for name, function, given, other in (("gather", gather_tokens, x, y), ("scatter_sum", scatter_sum, y, x)):
        given = given.clone().requires_grad_()
        out = function(given, mesh)
        (out * other).sum().backward()
        assert given.grad is not None
        found |= {name: out, f"{name} back": given.grad}
    return found


@pytest.mark.parametrize("n", [2, 4])
def test_each_collective_is_the_transpose_of_the_other(n: int) -> None:
    found = run_ranks(both_ways, n, n)
    tokens = torch.cat([part["x"] for part in found], 1)
    summed = sum(part["y"] for part in found)
    for rank, part in enumerate(found):
        own = slice(3 * rank, 3 * rank + 3)
        assert torch.equal(part["gather"], tokens) and torch.equal(part["scatter_sum back"], tokens)
        torch.testing.assert_close(part["scatter_sum"], summed[:, own])
        torch.testing.assert_close(part["gather back"], summed[:, own])


def seen_by_modules() -> dict[str, Any]:
    """What stands in the modules of a cut model, and what their forward is told."""
    model = meta_model(dense(tie_embeddings=True))
    names = list(model.state_dict())
    apply_tensor(model, line(2))
    kinds = {name: type(value).__name__ for name, value in model.named_parameters()}
    cuts = {name: value.placements for name, value in model.named_parameters() if isinstance(value, DTensor)}
    attention = model.layers["0"].attention
    told: Callable[[Any], Any] = partial(getattr, attention.wq)
    shape = tuple(stored(attention.wq, "weight").shape)
    return {
        "names": names == list(model.state_dict()),
        "kinds": set(kinds.values()),
        "tied": stored(model.output, "weight") is stored(model.tok_embeddings, "weight"),
        "cuts": cuts,
        "told": (type(told("weight")).__name__, tuple(told("weight").shape), shape),
        "its class": (type(attention.wq).__qualname__, isinstance(attention.wq, Linear)),
    }


def test_weights_carry_a_label_and_modules_see_tensors() -> None:
    for found in run_ranks(seen_by_modules, 2):
        assert found["names"] and found["tied"] and found["its class"] == ("Linear", True)
        assert found["kinds"] == {"DTensor"}
        assert found["told"] == ("Tensor", (16, 16), (32, 16))
        cuts = found["cuts"]
        assert cuts["layers.1.attention.wo.weight"] == (Shard(1),) and cuts["layers.1.attention.wo.bias"] == (
            Replicate(),
        )
        assert cuts["layers.0.feed_forward.w1.weight"] == (Shard(0),) and cuts["norm.weight"] == (Replicate(),)
    assert Toy and distribute_tensor
