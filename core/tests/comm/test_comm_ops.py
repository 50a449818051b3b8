"""The four operations as PyTorch sees them: registered, saved, traceable, bound to transports."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from carriers import CARRIERS, carry, deterministic
from token_traffic import E, Watched, reference, traffic
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from core.activation_checkpoint.ops import saved_ops
from core.activation_checkpoint.save_output import OURS
from core.comm import ops, transport
from core.testing.ranks import run_ranks

FOUR = [ops.DEEPEP_DISPATCH, ops.DEEPEP_COMBINE, ops.HYBRIDEP_DISPATCH, ops.HYBRIDEP_COMBINE]


def test_the_policy_saves_all_four() -> None:
    names = ["deepep.dispatch", "deepep.combine", "hybridep.dispatch", "hybridep.combine"]
    assert [str(op) for op in FOUR] == [f"{name}.default" for name in names]
    assert set(FOUR) <= OURS <= saved_ops()


def test_names_of_arguments_are_those_of_the_contract() -> None:
    names = [[argument.name for argument in op._schema.arguments] for op in FOUR]
    assert names == [
        ["x", "topk_idx", "topk_weights", "num_experts", "group"],
        ["rows", "handle", "num_tokens", "group"],
        ["x", "topk_idx", "topk_weights", "num_experts", "capacity", "pad_multiple", "group"],
        ["rows", "handle", "num_tokens", "group"],
    ]
    results = [[result.name for result in op._schema.returns] for op in FOUR]
    assert results[0] == ["rows", "local_idx", "row_weights", "counts", "handle"]
    assert results[2] == ["rows", "row_weights", "counts", "overflow", "handle"]


def checks(carrier: str) -> dict[str, dict[str, str]]:
    """`torch.library.opcheck` of every operation: schema, autograd, fake results, tracing with changing sizes."""
    group, found, namespace = dist.group.WORLD.group_name, {}, CARRIERS[carrier].namespace
    deterministic()
    carry(carrier, dist.group.WORLD, n_tokens=8)
    x, ids, weight = traffic("masked", dist.get_rank(), 8)
    x.requires_grad_(), weight.requires_grad_()
    more = () if namespace == "deepep" else (None, 4)
    if namespace == "hybridep":
        found["with capacity"] = torch.library.opcheck(ops.HYBRIDEP_DISPATCH, (x, ids, weight, E, 64, 4, group))
    names = getattr(torch.ops, namespace)
    sent = (x, ids, weight, E, *more, group)
    rows, *others, handle = [
        [tensor.detach() for tensor in part] if isinstance(part, list) else part.detach()
        for part in names.dispatch(*sent)
    ]
    row_weight = others[1 if namespace == "deepep" else 0]
    back = (handle, len(x), group) if namespace == "deepep" else (ids, handle, group)
    calls: dict[str, tuple[Any, ...]] = {
        "dispatch": sent,
        "combine": (rows.clone().requires_grad_(), handle, len(x), group),
        "_dispatch_cached": (x.detach(), handle, len(rows), group),
        "_combine_weights": (rows, row_weight, *back),
    }
    for name, args in calls.items():
        found[name] = torch.library.opcheck(getattr(names, name).default, args)
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck looks at copies, torch 2.14
@pytest.mark.parametrize(
    "carrier",
    [
        *("deepep reference", "deepep v2.1", "hybridep 11"),
        *(pytest.param(name, marks=pytest.mark.matrix) for name in ("deepep v1", "hybridep reference")),
    ],
)
def test_pytorch_finds_nothing_wrong(carrier: str) -> None:
    for found in run_ranks(checks, 2, carrier, timeout_s=300):
        assert len(found) == (4 if CARRIERS[carrier].namespace == "deepep" else 5)
        for name, results in found.items():
            assert set(results.values()) == {"SUCCESS"} and len(results) >= 4, f"{name}: {results}"


def fake_shapes() -> list[Any]:
    """What is known of the outputs where no number is."""
    group = dist.group.WORLD.group_name
    with FakeTensorMode(shape_env=ShapeEnv()):
        x, ids, weight = torch.empty(6, 5, dtype=torch.bfloat16), torch.zeros(6, 3).long(), torch.empty(6, 3)
        rows, row_weight, counts, overflow, handle = ops.HYBRIDEP_DISPATCH(x, ids, weight, E, 40, 4, group)
        home = ops.HYBRIDEP_COMBINE(rows, handle, 6, group)
        return [(tuple(t.shape), t.dtype) for t in (rows, row_weight, counts, overflow, home)]


def test_with_a_capacity_every_shape_is_known_before() -> None:
    assert run_ranks(fake_shapes, 1) == [
        [
            ((40, 5), torch.bfloat16),
            ((40,), torch.float32),
            ((E,), torch.int64),
            ((1,), torch.int32),
            ((6, 5), torch.bfloat16),
        ]
    ]


class Barrier(torch.autograd.Function):
    """Lets numbers through, and no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def calls_without_gradients() -> list[Counter[str]]:
    """Backward through rows alone, weights alone, and a gradient that stops on the way."""
    group, found = dist.group.WORLD, []
    for namespace, more, at in (("deepep", (), 2), ("hybridep", (None, 1), 1)):
        transport.bind(group, watched := Watched(reference(namespace, group)))
        dispatch = getattr(torch.ops, namespace).dispatch.default
        x, ids, weight = traffic("mixed", dist.get_rank())
        x.requires_grad_(), weight.requires_grad_()
        for take in (lambda out: out[0], lambda out, at=at: out[at], lambda out: Barrier.apply(out[0])):
            out = dispatch(x, ids, weight, E, *more, group.group_name)
            torch.autograd.grad(take(out).sum(), [x, weight], allow_unused=True)
        found.append(watched.calls)
    return found


def test_backward_is_a_collective_whatever_gradients_there_are() -> None:
    expected = Counter({"dispatch": 3, "combine_weights": 3})
    assert run_ranks(calls_without_gradients, 2) == [[expected, expected]] * 2


def bound_first() -> list[Any]:
    group = dist.group.WORLD
    name, device = group.group_name, torch.device("cpu")
    found = [type(ops.carrier(namespace, name, device)).__name__ for namespace in ("deepep", "hybridep")]
    watched = Watched(reference("deepep", group))
    transport.bind(group, watched)
    found += [ops.carrier("deepep", name, device) is watched, transport.bound("hybridep", name)]
    transport.release()
    return [*found, transport.bound("deepep", name)]


def test_what_is_bound_goes_before_the_reference() -> None:
    assert run_ranks(bound_first, 1) == [["Reference", "HybridReference", True, None, None]]


@pytest.mark.parametrize("namespace", ["deepep", "hybridep"])
def test_a_device_without_a_transport_is_an_error(namespace: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^{namespace} on cuda: nothing carries .* of process group 7\. .*backend"):
        ops.carrier(namespace, "7", torch.device("cuda"))
