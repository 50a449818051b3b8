"""Where the tokens of a row go, and that each takes its position, document and label along."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from core.data.packing import Batch, count_labels
from core.nn.kernel import Positions, visible
from core.nn.sdpa import SDPA
from core.parallel.context import HeadsForTokens, order, split_rows
from core.parallel.pipeline import Microbatch
from core.testing.parity import drawn_batch
from core.testing.ranks import run_ranks
from core.testing.toy import Toy
from core.train.attention_logits import WatchedKernel, largest_logit


def test_order_by_hand() -> None:
    assert order(8, 2, balanced=True).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert order(12, 3, balanced=True).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert order(8, 2, balanced=False).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7])
def test_every_token_has_one_rank_and_ranks_have_equally_many(n_ranks: int, balanced: bool) -> None:
    places = order(6 * n_ranks, n_ranks, balanced=balanced)
    assert places.shape == (n_ranks, 6)
    assert sorted(places.flatten().tolist()) == list(range(6 * n_ranks))


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7])
def test_balanced_ranks_see_equally_many_keys(n_ranks: int) -> None:
    seen = (order(10 * n_ranks, n_ranks, balanced=True) + 1).sum(1)
    assert len(set(seen.tolist())) == 1


def parts_of_rows(documents: bool, balanced: bool, n_ranks: int) -> Microbatch:
    mesh, batch = init_device_mesh("cpu", (n_ranks,)), drawn_batch(Toy.Config(), 3, 16)
    return split_rows(batch, mesh, torch.device("cpu"), documents=documents, balanced=balanced)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("documents", "n_ranks"), [(True, 2), (False, 2), (True, 4)])
def test_tokens_take_everything_along(documents: bool, n_ranks: int, balanced: bool) -> None:
    batch: Batch = drawn_batch(Toy.Config(), 3, 16)
    parts = run_ranks(parts_of_rows, n_ranks, documents, balanced, n_ranks)
    index_BL = torch.arange(16).expand(3, -1)
    expected = {
        "tokens": batch.tokens_BL,
        "labels": batch.labels_BL,
        "position": batch.positions_BL if documents else index_BL,
        "index": index_BL,
        "document": batch.documents_BL if documents else torch.zeros_like(index_BL),
    }
    own = [
        {
            "tokens": tokens_BL,
            "labels": labels_BL,
            "position": positions.position_BL.expand(3, -1),
            "index": positions.index_BL.expand(3, -1),
            "document": positions.document_BL if documents else torch.zeros_like(tokens_BL),
        }
        for tokens_BL, labels_BL, positions, *_ in parts
    ]
    joined = {name: torch.cat([part[name] for part in own], 1) for name in expected}
    back_L = joined["index"][0].argsort()
    for name, whole in expected.items():
        assert torch.equal(joined[name][:, back_L], whole), name
    for _, labels_BL, positions, n_labels, _ in parts:
        assert n_labels == count_labels(labels_BL)
        assert torch.equal(positions.key_index_BM.expand(3, -1), joined["index"])
        if documents:
            assert torch.equal(positions.key_document_BM, joined["document"])
        else:
            assert positions.document_BL is positions.key_document_BM is None


def kernel(window: int | None) -> Any:
    return HeadsForTokens(SDPA(window), mesh=None)  # pyrefly: ignore[bad-argument-type] - it is not used


def test_equal_kernels_share_a_mask() -> None:
    assert kernel(3) == kernel(3) and hash(kernel(3)) == hash(kernel(3))
    assert kernel(3) != kernel(4) and kernel(3) != SDPA(3)
    assert len({kernel(3): 0, kernel(3): 0, kernel(4): 0, SDPA(3): 0}) == 3


def heads_for_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_ranks: int) -> dict[str, torch.Tensor]:
    """Attention of this rank's tokens, and the gradients of what it was given."""
    mesh = init_device_mesh("cpu", (n_ranks,))
    own_L = order(q.shape[2], n_ranks, balanced=True)[mesh.get_local_rank()]
    all_M = order(q.shape[2], n_ranks, balanced=True).flatten()
    mine = [side[:, :, own_L].clone().requires_grad_() for side in (q, k, v)]
    sinks_N = torch.linspace(-1, 1, q.shape[1]).requires_grad_()
    watched, positions = WatchedKernel(SDPA(4)), Positions(own_L[None], None, own_L[None], all_M[None], None)
    wide = HeadsForTokens(watched, mesh)  # pyrefly: ignore[bad-argument-type] - it is not built from a window
    mask = wide.mask(positions)
    out = wide(*mine, mask, scale=0.3, sinks_N=sinks_N)
    (out * torch.arange(out.numel() * n_ranks).view(*out.shape[:2], -1, out.shape[-1])[:, :, own_L]).sum().backward()
    gathered = largest_logit(mine[0].detach(), k[:, :, all_M], visible(positions, 4), scale=0.3)
    largest = {"largest of heads": watched.found[0], "largest of tokens": gathered}
    return largest | {
        "index": own_L,
        "out": out,
        "sinks": sinks_N.grad,
        **dict(zip("qkv", (x.grad for x in mine), strict=True)),
    }


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_heads_are_given_for_tokens(n_ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 8, 6, generator=generator) for n in (8, 4))
    v = torch.randn(2, 4, 8, 5, generator=generator)
    found = run_ranks(heads_for_tokens, n_ranks, q, k, v, n_ranks)
    whole = [side.clone().requires_grad_() for side in (q, k, v)]
    sinks_N = torch.linspace(-1, 1, 8).requires_grad_()
    plain = SDPA(4)
    out = plain(*whole, plain.mask(Positions(torch.arange(8)[None])), scale=0.3, sinks_N=sinks_N)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    rule = visible(Positions(torch.arange(8)[None]), 4)
    for name in ("largest of heads", "largest of tokens"):
        largest = largest_logit(q, k, rule, scale=0.3)
        torch.testing.assert_close(torch.stack([part[name] for part in found]).max(), largest)
    back_L = torch.cat([part["index"] for part in found]).argsort()
    expected = {"out": out, **dict(zip("qkv", (x.grad for x in whole), strict=True))}
    for name, value in expected.items():
        joined = torch.cat([part[name] for part in found], 2)[:, :, back_L]
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-4, msg=name)
    torch.testing.assert_close(sum(part["sinks"] for part in found), sinks_N.grad, rtol=1e-5, atol=1e-4)
