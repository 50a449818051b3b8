"""The two contracts on 1, 2 and 4 ranks, against loops over ranks, tokens and choices.

Each rank does all cases and gives back what it saw; the tests compare that with what all ranks sent.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from token_traffic import CASES, D, E, Traffic, arriving, numbers_like, traffic

from core.comm import ops
from core.testing.ranks import run_ranks

SIZES = [1, 2, 4]
PADS = [1, 4]


def sent_by_all(case: str, size: int) -> list[Traffic]:
    return [traffic(case, rank) for rank in range(size)]


def deepep_seen() -> dict[str, dict[str, Any]]:
    """For each case the outputs of `deepep::dispatch` and `combine`, and their gradients."""
    group, seed, seen = dist.group.WORLD.group_name, dist.get_rank(), {}
    for case in CASES:
        x, ids, weight = traffic(case, dist.get_rank())
        x.requires_grad_(), weight.requires_grad_()
        before = x.detach().clone(), ids.clone(), weight.detach().clone()
        rows, local, row_weight, counts, handle = ops.DEEPEP_DISPATCH(x, ids, weight, E, group)
        y, v = numbers_like(rows, seed).requires_grad_(), numbers_like(row_weight, seed + 9)
        v = v.where(local >= 0, 0.0)
        ((rows * y.detach()).sum() + (row_weight * v).sum()).backward()
        home = ops.DEEPEP_COMBINE(y, handle, len(x), group)
        u = numbers_like(home, seed + 5)
        (home * u).sum().backward()
        seen[case] = {
            "changed": not all(map(torch.equal, before, (x, ids, weight))),
            **{"rows": rows, "local": local, "row_weight": row_weight, "counts": counts, "y": y, "v": v, "u": u},
            **{"home": home, "x_grad": x.grad, "weight_grad": weight.grad, "y_grad": y.grad},
            "round_trip": ops.DEEPEP_COMBINE(rows, handle, len(x), group),
        }
        seen[case] = {name: getattr(value, "data", value) for name, value in seen[case].items()}
    return seen


def hybridep_seen(pad: int, share: float | None) -> dict[str, dict[str, Any]]:
    """The same of `hybridep::dispatch` and `combine`, with room for `share` of all choices of all ranks."""
    group, seed, seen = dist.group.WORLD.group_name, dist.get_rank(), {}
    for case in CASES:
        x, ids, weight = traffic(case, dist.get_rank())
        x.requires_grad_(), weight.requires_grad_()
        all_ids = sum(traffic(case, rank).ids_TK.numel() for rank in range(dist.get_world_size()))
        capacity = None if share is None else int(all_ids * share) // pad * pad + E * (pad - 1) // pad * pad
        rows, row_weight, counts, overflow, handle = ops.HYBRIDEP_DISPATCH(x, ids, weight, E, capacity, pad, group)
        y, v = numbers_like(rows, seed).requires_grad_(), numbers_like(row_weight, seed + 9)
        ((rows * y.detach()).sum() + (row_weight * v).sum()).backward()
        home = ops.HYBRIDEP_COMBINE(y, handle, len(x), group)
        u = numbers_like(home, seed + 5)
        (home * u).sum().backward()
        seen[case] = {
            **{"rows": rows, "row_weight": row_weight, "counts": counts, "overflow": overflow, "capacity": capacity},
            **{"y": y, "v": v, "u": u, "home": home, "x_grad": x.grad, "weight_grad": weight.grad, "y_grad": y.grad},
            "round_trip": ops.HYBRIDEP_COMBINE(rows, handle, len(x), group),
        }
        seen[case] = {name: getattr(value, "data", value) for name, value in seen[case].items()}
    return seen


@cache
def deepep(size: int) -> list[Any]:
    return run_ranks(deepep_seen, size)


@cache
def hybridep(size: int, pad: int, share: float | None = None) -> list[Any]:
    return run_ranks(hybridep_seen, size, pad, share)


every_case = pytest.mark.parametrize("case", CASES)
every_size = pytest.mark.parametrize("size", SIZES)
every_pad = pytest.mark.parametrize("pad", PADS)


@every_case
@every_size
def test_a_token_comes_to_a_rank_once(size: int, case: str) -> None:
    """Rows, local numbers of their experts (-1 elsewhere, weight 0), counts; in the order of source rank and token."""
    sent = sent_by_all(case, size)
    for rank, seen in enumerate(ranks[case] for ranks in deepep(size)):
        experts = arriving(sent, rank)
        tokens = sorted({(source, token) for choices in experts for source, token, _ in choices})
        assert seen["rows"][:, 0].tolist() == [100 * source + token for source, token in tokens]
        assert seen["counts"].tolist() == [len(choices) for choices in experts] and not seen["changed"]
        assert (seen["local"].dtype, seen["counts"].dtype) == (torch.int64, torch.int64)
        found = set()
        for row, (source, token) in enumerate(tokens):
            assert torch.equal(seen["rows"][row], sent[source].x_TD[token])
            for k, expert in enumerate(seen["local"][row].tolist()):
                weight = seen["row_weight"][row, k].item()
                if expert >= 0:
                    found.add((expert, source, token, k))
                    assert weight == sent[source].weight_TK[token, k].item()
                else:
                    assert (expert, weight) == (-1, 0.0)
        assert found == {(expert, *choice) for expert, choices in enumerate(experts) for choice in choices}


@every_case
@every_size
def test_there_and_back_counts_ranks(size: int, case: str) -> None:
    for sent, ranks in zip(sent_by_all(case, size), deepep(size), strict=True):
        n_ranks = [len({i // (E // size) for i in ids if i >= 0}) for ids in sent.ids_TK.tolist()]
        torch.testing.assert_close(ranks[case]["round_trip"], sent.x_TD * torch.tensor(n_ranks).view(-1, 1))


@every_pad
@every_case
@every_size
def test_there_and_back_counts_choices(size: int, case: str, pad: int) -> None:
    for sent, ranks in zip(sent_by_all(case, size), hybridep(size, pad), strict=True):
        n_choices = (sent.ids_TK >= 0).sum(1, keepdim=True)
        torch.testing.assert_close(ranks[case]["round_trip"], sent.x_TD * n_choices)


@pytest.mark.parametrize("namespace", ["deepep", "hybridep"])
@every_case
@every_size
def test_combine_is_the_transpose_of_dispatch(size: int, case: str, namespace: str) -> None:
    """<dispatch x, y> = <x, combine y>, summed over ranks; the backward of each is the other."""
    sent, found = sent_by_all(case, size), deepep(size) if namespace == "deepep" else hybridep(size, 4)
    there = sum((ranks[case]["rows"].double() * ranks[case]["y"]).sum().item() for ranks in found)
    back = sum((x.double() * ranks[case]["home"]).sum().item() for (x, _, _), ranks in zip(sent, found, strict=True))
    assert there == pytest.approx(back, rel=1e-5, abs=1e-4)
    for ranks in found:
        torch.testing.assert_close(ranks[case]["x_grad"], ranks[case]["home"], rtol=0, atol=0)
    for rank, ranks in enumerate(found):
        named = {source * 100 + token: u for source in range(size) for token, u in enumerate(found[source][case]["u"])}
        real = [row for row, weight in enumerate(rows_of(sent, rank, namespace, 4)) if weight is not None]
        for row in real:
            assert torch.equal(ranks[case]["y_grad"][row], named[int(ranks[case]["rows"][row, 0])])
        pads = sorted(set(range(len(ranks[case]["y_grad"]))) - set(real))
        assert not ranks[case]["y_grad"][pads].any()


def rows_of(sent: list[Traffic], rank: int, namespace: str, pad: int) -> list[Any]:
    """What is in each row of `rank`: a choice or, for DeepEP, a token; None for a pad."""
    experts = arriving(sent, rank)
    if namespace == "deepep":
        return sorted({choice[:2] for choices in experts for choice in choices})
    return [slot for choices in experts for slot in [*choices, *[None] * (-len(choices) % pad)]]


@every_case
@every_size
def test_gradients_of_weights_go_home(size: int, case: str) -> None:
    """Each choice gets the gradient of the one place where it arrived."""
    sent = sent_by_all(case, size)
    expected = [torch.zeros_like(weight) for _, _, weight in sent]
    for rank, ranks in enumerate(deepep(size)):
        tokens = rows_of(sent, rank, "deepep", 1)
        for choices in arriving(sent, rank):
            for source, token, k in choices:
                expected[source][token, k] = ranks[case]["v"][tokens.index((source, token)), k]
    for found, ranks in zip(expected, deepep(size), strict=True):
        torch.testing.assert_close(ranks[case]["weight_grad"], found, rtol=0, atol=0)


@every_pad
@every_case
@every_size
def test_rows_are_sorted_by_expert_and_filled_up(size: int, case: str, pad: int) -> None:
    """Pads are zero, weigh nothing, and take no gradient home."""
    sent = sent_by_all(case, size)
    expected = [torch.zeros_like(weight) for _, _, weight in sent]
    for rank, seen in enumerate(ranks[case] for ranks in hybridep(size, pad)):
        slots = rows_of(sent, rank, "hybridep", pad)
        assert seen["counts"].tolist() == [-(-len(choices) // pad) * pad for choices in arriving(sent, rank)]
        assert seen["rows"].shape == (len(slots), D) and seen["overflow"].tolist() == [0]
        for row, slot in enumerate(slots):
            if slot is None:
                assert not seen["rows"][row].any() and seen["row_weight"][row] == 0
                continue
            source, token, k = slot
            assert torch.equal(seen["rows"][row], sent[source].x_TD[token])
            assert seen["row_weight"][row] == sent[source].weight_TK[token, k]
            expected[source][token, k] = seen["v"][row]
    for found, ranks in zip(expected, hybridep(size, pad), strict=True):
        torch.testing.assert_close(ranks[case]["weight_grad"], found, rtol=0, atol=0)


@every_pad
@pytest.mark.parametrize("share", [1.0, 0.2])
@every_case
@every_size
def test_what_exceeds_the_capacity_is_dropped_and_told(size: int, case: str, share: float, pad: int) -> None:
    sent = sent_by_all(case, size)
    expected = [torch.zeros_like(x) for x, _, _ in sent]
    for rank, seen in enumerate(ranks[case] for ranks in hybridep(size, pad, share)):
        slots, capacity = rows_of(sent, rank, "hybridep", pad), seen["capacity"]
        assert seen["overflow"].tolist() == [int(len(slots) > capacity)] and seen["overflow"].dtype == torch.int32
        assert share < 1 or not seen["overflow"].any()
        full = [-(-len(choices) // pad) * pad for choices in arriving(sent, rank)]
        room = [max(0, min(n, capacity - sum(full[:i]))) for i, n in enumerate(full)]
        assert seen["counts"].tolist() == room and seen["rows"].shape == (capacity, D)
        for row in range(capacity):
            slot = slots[row] if row < len(slots) else None
            if slot is None:
                assert not seen["rows"][row].any() and seen["row_weight"][row] == 0
            else:
                assert torch.equal(seen["rows"][row], sent[slot[0]].x_TD[slot[1]])
                expected[slot[0]][slot[1]] += seen["y"][row]
    for found, ranks in zip(expected, hybridep(size, pad, share), strict=True):
        torch.testing.assert_close(ranks[case]["home"], found)


def in_bfloat16() -> list[torch.Tensor]:
    """A token of each rank goes to all ranks, and sums that only a wider type holds come back."""
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.full((1, 4), 0.5, requires_grad=True)
    ids = torch.tensor([[0, 2, 4, 6]])
    found = []
    for namespace, dispatch, combine, more in (
        ("deepep", ops.DEEPEP_DISPATCH, ops.DEEPEP_COMBINE, ()),
        ("hybridep", ops.HYBRIDEP_DISPATCH, ops.HYBRIDEP_COMBINE, (None, 1)),
    ):
        out = dispatch(x, ids, weight, E, *more, group)
        rows, row_weight, handle = out[0], out[2 if namespace == "deepep" else 1], out[-1]
        answer = torch.full_like(rows, 256.0 if rank == 0 else 1.0)  # 256 + 1 + 1 + 1 is 260 rounded once, 256 thrice
        found.append(combine(answer, handle, 1, group))
        here = row_weight != 0
        gradient = torch.full_like(row_weight, 1 + 2**-20).where(here, 0)
        found += torch.autograd.grad([rows, row_weight], [x, weight], [answer, gradient])
    return found


def test_sums_are_formed_in_fp32() -> None:
    for found in run_ranks(in_bfloat16, 4):
        assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32] * 2
        for home, x_grad, weight_grad in (found[:3], found[3:]):
            assert home.tolist() == x_grad.tolist() == [[260.0] * 4]
            assert weight_grad.tolist() == [[1 + 2**-20] * 4], "a weight's gradient keeps all its digits"
