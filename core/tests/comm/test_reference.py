"""The two contracts on 1, 2 and 4 ranks, over every carrier, against loops over ranks, tokens and choices.

Each rank does all cases and gives back what it saw; the tests compare that with what all ranks sent. Rows of DeepEP may
come in any order: they are put in that of (source rank, token), which the reference has.
"""

from functools import cache
from typing import Any

import fake_deep_ep
import pytest
import torch
import torch.distributed as dist
from carriers import CARRIERS, EQUAL, carry, of, shuffles, wants_equal
from token_traffic import CASES, D, E, Traffic, arriving, numbers_like, traffic

from core.comm import ops
from core.testing.ranks import run_ranks

PADS = [1, 4]
SHARES = [1.0, 0.2]


def suited(name: str) -> list[str]:
    """The cases that a carrier can have."""
    return [case for case in CASES if not (wants_equal(name) and case in ("a rank without tokens", "no tokens at all"))]


def sent_by(name: str, case: str, rank: int) -> Traffic:
    return traffic(case, rank, EQUAL if wants_equal(name) else None)


def sent_by_all(name: str, case: str, size: int) -> list[Traffic]:
    return [sent_by(name, case, rank) for rank in range(size)]


def deepep_seen(name: str) -> dict[str, dict[str, Any]]:
    """For each case the outputs of `deepep::dispatch` and `combine`, and their gradients."""
    group, seed, seen = dist.group.WORLD.group_name, dist.get_rank(), {}
    carry(name, dist.group.WORLD)
    for case in suited(name):
        x, ids, weight = sent_by(name, case, dist.get_rank())
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
        order = rows[:, 0].argsort() if shuffles(name) else torch.arange(len(rows))
        seen[case] = {key: getattr(value, "data", value) for key, value in seen[case].items()}
        for key in ("rows", "local", "row_weight", "y", "v", "y_grad"):
            seen[case][key] = seen[case][key][order]
    return seen


def hybridep_seen(name: str) -> dict[tuple[int, float | None], dict[str, dict[str, Any]]]:
    """The same of `hybridep::dispatch` and `combine`, by the pads and the share of all ranks' choices that has room."""
    carry(name, dist.group.WORLD, n_tokens=EQUAL)
    return {(pad, share): padded_seen(name, pad, share) for pad in PADS for share in (None, *SHARES)}


def padded_seen(name: str, pad: int, share: float | None) -> dict[str, dict[str, Any]]:
    group, seed, seen = dist.group.WORLD.group_name, dist.get_rank(), {}
    for case in suited(name):
        x, ids, weight = sent_by(name, case, dist.get_rank())
        x.requires_grad_(), weight.requires_grad_()
        all_ids = sum(sent.ids_TK.numel() for sent in sent_by_all(name, case, dist.get_world_size()))
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
        seen[case] = {key: getattr(value, "data", value) for key, value in seen[case].items()}
    return seen


@cache
def deepep(name: str, size: int) -> list[Any]:
    return run_ranks(deepep_seen, size, name)


@cache
def all_hybridep(name: str, size: int) -> list[Any]:
    return run_ranks(hybridep_seen, size, name)


def hybridep(name: str, size: int, pad: int, share: float | None = None) -> list[Any]:
    return [seen[pad, share] for seen in all_hybridep(name, size)]


def each(*namespaces: str) -> pytest.MarkDecorator:
    """Every case that a carrier can have, on as many ranks as it can run on; libraries need two."""
    found = [
        (name, size, case)
        for namespace in namespaces
        for name in of(namespace)
        for size in ([2, 4] if CARRIERS[name].build else [1, 2, 4])
        for case in suited(name)
    ]
    ids = [f"{name}, {size}, {case}" for name, size, case in found]
    return pytest.mark.parametrize(("name", "size", "case"), found, ids=ids)


every_pad = pytest.mark.parametrize("pad", PADS)


@each("deepep")
def test_a_token_comes_to_a_rank_once(name: str, size: int, case: str) -> None:
    """Rows, local numbers of their experts (-1 elsewhere, weight 0), counts; in the order of source rank and token."""
    sent = sent_by_all(name, case, size)
    for rank, seen in enumerate(ranks[case] for ranks in deepep(name, size)):
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


@each("deepep")
def test_there_and_back_counts_ranks(name: str, size: int, case: str) -> None:
    for sent, ranks in zip(sent_by_all(name, case, size), deepep(name, size), strict=True):
        n_ranks = [len({i // (E // size) for i in ids if i >= 0}) for ids in sent.ids_TK.tolist()]
        torch.testing.assert_close(ranks[case]["round_trip"], sent.x_TD * torch.tensor(n_ranks).view(-1, 1))


@every_pad
@each("hybridep")
def test_there_and_back_counts_choices(name: str, size: int, case: str, pad: int) -> None:
    for sent, ranks in zip(sent_by_all(name, case, size), hybridep(name, size, pad), strict=True):
        n_choices = (sent.ids_TK >= 0).sum(1, keepdim=True)
        torch.testing.assert_close(ranks[case]["round_trip"], sent.x_TD * n_choices)


@each("deepep", "hybridep")
def test_combine_is_the_transpose_of_dispatch(name: str, size: int, case: str) -> None:
    """<dispatch x, y> = <x, combine y>, summed over ranks; the backward of each is the other."""
    namespace = CARRIERS[name].namespace
    sent, found = (
        sent_by_all(name, case, size),
        deepep(name, size) if namespace == "deepep" else hybridep(name, size, 4),
    )
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


@each("deepep")
def test_gradients_of_weights_go_home(name: str, size: int, case: str) -> None:
    """Each choice gets the gradient of the one place where it arrived."""
    sent = sent_by_all(name, case, size)
    expected = [torch.zeros_like(weight) for _, _, weight in sent]
    for rank, ranks in enumerate(deepep(name, size)):
        tokens = rows_of(sent, rank, "deepep", 1)
        for choices in arriving(sent, rank):
            for source, token, k in choices:
                expected[source][token, k] = ranks[case]["v"][tokens.index((source, token)), k]
    for found, ranks in zip(expected, deepep(name, size), strict=True):
        torch.testing.assert_close(ranks[case]["weight_grad"], found, rtol=0, atol=0)


@every_pad
@each("hybridep")
def test_rows_are_sorted_by_expert_and_filled_up(name: str, size: int, case: str, pad: int) -> None:
    """Pads are zero, weigh nothing, and take no gradient home."""
    sent = sent_by_all(name, case, size)
    expected = [torch.zeros_like(weight) for _, _, weight in sent]
    for rank, seen in enumerate(ranks[case] for ranks in hybridep(name, size, pad)):
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
    for found, ranks in zip(expected, hybridep(name, size, pad), strict=True):
        torch.testing.assert_close(ranks[case]["weight_grad"], found, rtol=0, atol=0)


@every_pad
@pytest.mark.parametrize("share", SHARES)
@each("hybridep")
def test_what_exceeds_the_capacity_is_dropped_and_told(name: str, size: int, case: str, share: float, pad: int) -> None:
    sent = sent_by_all(name, case, size)
    expected = [torch.zeros_like(x) for x, _, _ in sent]
    for rank, seen in enumerate(ranks[case] for ranks in hybridep(name, size, pad, share)):
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
    for found, ranks in zip(expected, hybridep(name, size, pad, share), strict=True):
        torch.testing.assert_close(ranks[case]["home"], found)


def in_bfloat16(name: str) -> list[torch.Tensor]:
    """A token of each rank goes to all ranks, and sums that only a wider type holds come back."""
    group, rank, namespace = dist.group.WORLD.group_name, dist.get_rank(), CARRIERS[name].namespace
    carry(name, dist.group.WORLD, n_tokens=1)
    fake_deep_ep.WIRE[0] = torch.bfloat16
    x = torch.full((1, D), 1.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.full((1, 4), 0.5, requires_grad=True)
    ids = torch.tensor([[0, 2, 4, 6]])
    dispatch, combine, more = {
        "deepep": (ops.DEEPEP_DISPATCH, ops.DEEPEP_COMBINE, ()),
        "hybridep": (ops.HYBRIDEP_DISPATCH, ops.HYBRIDEP_COMBINE, (None, 1)),
    }[namespace]
    out = dispatch(x, ids, weight, E, *more, group)
    rows, row_weight, handle = out[0], out[2 if namespace == "deepep" else 1], out[-1]
    answer = torch.full_like(rows, 256.0 if rank == 0 else 1.0)  # 256 + 1 + 1 + 1 is 260 rounded once, 256 thrice
    home = combine(answer, handle, 1, group)
    gradient = torch.full_like(row_weight, 1 + 2**-20).where(row_weight != 0, 0)
    return [home, *torch.autograd.grad([rows, row_weight], [x, weight], [answer, gradient])]


@pytest.mark.parametrize("name", CARRIERS)
def test_sums_are_formed_in_fp32(name: str) -> None:
    for home, x_grad, weight_grad in run_ranks(in_bfloat16, 4, name):
        assert (home.dtype, x_grad.dtype, weight_grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert home.tolist() == x_grad.tolist() == [[260.0] * D]
        assert weight_grad.tolist() == [[1 + 2**-20] * 4], "a weight's gradient keeps all its digits"
