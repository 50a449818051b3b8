"""The operations `deepep::dispatch`, `deepep::combine`, `hybridep::dispatch` and `hybridep::combine`.

They are there as soon as this file is imported, whatever is installed: what runs is the transport bound to the group,
and on the CPU without one the reference. The contracts, and the meaning of every argument, are in `transport.py`.

The backward of dispatch is combine, that of combine is dispatch again by the same handle. Both are operations too, so
that a tracer sees none of what is inside.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import get_ctx, impl, register_autograd, register_fake

from core.activation_checkpoint.save_output import save_output
from core.comm.reference import HybridReference, Reference
from core.comm.transport import DeepEPTransport, Handle, HybridEPTransport, Transport, bound, find_group, unbound

DEEPEP = torch.library.Library("deepep", "FRAGMENT")
DEEPEP.define(
    "dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, str group)"
    " -> (Tensor rows, Tensor local_idx, Tensor row_weights, Tensor counts, Tensor[] handle)"
)
DEEPEP.define(
    "_combine_weights(Tensor rows, Tensor row_weights, Tensor[] handle, SymInt num_tokens, str group)"
    " -> (Tensor, Tensor)"
)
HYBRIDEP = torch.library.Library("hybridep", "FRAGMENT")
HYBRIDEP.define(
    "dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, SymInt? capacity, int pad_multiple,"
    " str group) -> (Tensor rows, Tensor row_weights, Tensor counts, Tensor overflow, Tensor[] handle)"
)
HYBRIDEP.define(
    "_combine_weights(Tensor rows, Tensor row_weights, Tensor topk_idx, Tensor[] handle, str group) -> (Tensor, Tensor)"
)
for library in (DEEPEP, HYBRIDEP):
    library.define("combine(Tensor rows, Tensor[] handle, SymInt num_tokens, str group) -> Tensor")
    library.define("_dispatch_cached(Tensor x, Tensor[] handle, SymInt num_rows, str group) -> Tensor")

DEEPEP_DISPATCH = save_output(torch.ops.deepep.dispatch.default)
DEEPEP_COMBINE = save_output(torch.ops.deepep.combine.default)
HYBRIDEP_DISPATCH = save_output(torch.ops.hybridep.dispatch.default)
HYBRIDEP_COMBINE = save_output(torch.ops.hybridep.combine.default)
DEEPEP_COMBINE_WEIGHTS = torch.ops.deepep._combine_weights.default
HYBRIDEP_COMBINE_WEIGHTS = torch.ops.hybridep._combine_weights.default


def carrier(namespace: str, group: str, device: torch.device) -> Transport:
    """What runs the operations of a group: the transport bound to it, or on the CPU the reference.

    Raises RuntimeError when there is neither.
    """
    if (transport := bound(namespace, group)) is not None:
        return transport
    if device.type != "cpu":
        raise unbound(namespace, group, device)
    return (Reference if namespace == "deepep" else HybridReference)(find_group(group))


def deepep(group: str, device: torch.device) -> DeepEPTransport:
    return cast(DeepEPTransport, carrier("deepep", group, device))


def hybridep(group: str, device: torch.device) -> HybridEPTransport:
    return cast(HybridEPTransport, carrier("hybridep", group, device))


@impl(DEEPEP, "dispatch", "CompositeExplicitAutograd")
def _deepep_dispatch(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, group: str) -> Any:
    x, topk_idx, topk_weights = x.contiguous(), topk_idx.contiguous(), topk_weights.contiguous()
    return deepep(group, x.device).dispatch(x, topk_idx, topk_weights, num_experts)


@impl(HYBRIDEP, "dispatch", "CompositeExplicitAutograd")
def _hybridep_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int | None,
    pad_multiple: int,
    group: str,
) -> Any:
    x, topk_idx, topk_weights = x.contiguous(), topk_idx.contiguous(), topk_weights.contiguous()
    return hybridep(group, x.device).dispatch(x, topk_idx, topk_weights, num_experts, capacity, pad_multiple)


@impl(DEEPEP, "_combine_weights", "CompositeExplicitAutograd")
def _deepep_combine_weights(rows: Tensor, row_weights: Tensor, handle: Handle, num_tokens: int, group: str) -> Any:
    transport = deepep(group, rows.device)
    return transport.combine_weights(rows.contiguous(), row_weights.contiguous(), handle, num_tokens)


@impl(HYBRIDEP, "_combine_weights", "CompositeExplicitAutograd")
def _hybridep_combine_weights(rows: Tensor, row_weights: Tensor, topk_idx: Tensor, handle: Handle, group: str) -> Any:
    transport = hybridep(group, rows.device)
    return transport.combine_weights(rows.contiguous(), row_weights.contiguous(), topk_idx, handle)


@register_fake(DEEPEP_DISPATCH, lib=DEEPEP)
def _fake_deepep(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, group: str) -> Any:
    n_rows = cast(int, get_ctx().new_dynamic_size())
    return (
        x.new_empty(n_rows, x.shape[1]),
        topk_idx.new_empty(n_rows, topk_idx.shape[1]),
        topk_weights.new_empty(n_rows, topk_idx.shape[1]),
        topk_idx.new_empty(num_experts // find_group(group).size()),
        deepep(group, x.device).fake_handle(x, topk_idx, num_experts, n_rows),
    )


@register_fake(HYBRIDEP_DISPATCH, lib=HYBRIDEP)
def _fake_hybridep(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int | None,
    pad_multiple: int,
    group: str,
) -> Any:
    n_rows = cast(int, get_ctx().new_dynamic_size()) if capacity is None else capacity
    return (
        x.new_empty(n_rows, x.shape[1]),
        topk_weights.new_empty(n_rows),
        topk_idx.new_empty(num_experts // find_group(group).size()),
        topk_idx.new_empty(1, dtype=torch.int32),
        hybridep(group, x.device).fake_handle(x, topk_idx, num_experts, n_rows),
    )


@register_fake(DEEPEP_COMBINE_WEIGHTS, lib=DEEPEP)
def _fake_deepep_weights(rows: Tensor, row_weights: Tensor, handle: Handle, num_tokens: int, group: str) -> Any:
    return rows.new_empty(num_tokens, rows.shape[1]), row_weights.new_empty(num_tokens, row_weights.shape[1])


@register_fake(HYBRIDEP_COMBINE_WEIGHTS, lib=HYBRIDEP)
def _fake_hybridep_weights(
    rows: Tensor, row_weights: Tensor, topk_idx: Tensor, handle: Handle, group: str
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(topk_idx.shape[0], rows.shape[1]), row_weights.new_empty(topk_idx.shape)


def _keep_deepep_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, _, ctx.group = inputs
    ctx.n_tokens = x.shape[0]
    ctx.save_for_backward(*output[-1])


def _deepep_dispatch_backward(ctx: Any, rows: Tensor, _: Any, row_weights: Tensor, *others: Any) -> Any:
    x, weights = DEEPEP_COMBINE_WEIGHTS(rows, row_weights, list(ctx.saved_tensors), ctx.n_tokens, ctx.group)
    return x, None, weights, None, None


def _keep_hybridep_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    _, topk_idx, _, _, _, _, ctx.group = inputs
    ctx.save_for_backward(topk_idx, *output[-1])


def _hybridep_dispatch_backward(ctx: Any, rows: Tensor, row_weights: Tensor, *others: Any) -> Any:
    topk_idx, *handle = ctx.saved_tensors
    x, weights = HYBRIDEP_COMBINE_WEIGHTS(rows, row_weights, topk_idx, handle, ctx.group)
    return x, None, weights, None, None, None, None


register_autograd(DEEPEP_DISPATCH, _deepep_dispatch_backward, setup_context=_keep_deepep_dispatch, lib=DEEPEP)
register_autograd(HYBRIDEP_DISPATCH, _hybridep_dispatch_backward, setup_context=_keep_hybridep_dispatch, lib=HYBRIDEP)


def _register_way_back(library: torch.library.Library, namespace: str) -> None:
    """Kernels, fakes and autograd of what both namespaces have alike: combine, and dispatch by a handle."""
    ops = getattr(torch.ops, namespace)
    combine, dispatch_cached = ops.combine.default, ops._dispatch_cached.default

    @impl(library, "combine", "CompositeExplicitAutograd")
    def _combine(rows: Tensor, handle: Handle, num_tokens: int, group: str) -> Tensor:
        return carrier(namespace, group, rows.device).combine(rows.contiguous(), handle, num_tokens)

    @impl(library, "_dispatch_cached", "CompositeExplicitAutograd")
    def _dispatch_cached(x: Tensor, handle: Handle, num_rows: int, group: str) -> Tensor:
        return carrier(namespace, group, x.device).dispatch_cached(x.contiguous(), handle, num_rows)

    @register_fake(combine, lib=library)
    def _fake_combine(rows: Tensor, handle: Handle, num_tokens: int, group: str) -> Tensor:
        return rows.new_empty(num_tokens, rows.shape[1])

    @register_fake(dispatch_cached, lib=library)
    def _fake_dispatch_cached(x: Tensor, handle: Handle, num_rows: int, group: str) -> Tensor:
        return x.new_empty(num_rows, x.shape[1])

    def _keep(ctx: Any, inputs: Any, output: Any) -> None:
        rows, handle, _, ctx.group = inputs
        ctx.n_rows = rows.shape[0]
        ctx.save_for_backward(*handle)

    def _backward(ctx: Any, grad: Tensor) -> Any:
        handle = list(ctx.saved_tensors)
        return dispatch_cached(grad, handle, ctx.n_rows, ctx.group), [None] * len(handle), None, None

    register_autograd(combine, _backward, setup_context=_keep, lib=library)


_register_way_back(DEEPEP, "deepep")
_register_way_back(HYBRIDEP, "hybridep")
