"""The one list of operations whose outputs are expensive: selective checkpointing saves them for backward.

A first-party operation is added by `save_output`, a product by `save_product`, on the line where it is defined; no
model has a list.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from core.activation_checkpoint.save_output import OURS, Op, OpT, check_op, save_output
from core.config.errors import UserError

ATTENTION = (
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_attention_math.default",
    "aten._scaled_dot_product_fused_attention_overrideable.default",
)
"""Attention kernels that PyTorch's own list lacks, so that a CPU behaves like a GPU."""

MATRIX_PRODUCTS = ("aten.linear.default", "aten._grouped_mm.default")
"""Products beside PyTorch's own list. A grouped product is the dearest operation of a mixture of experts."""

SELECTION = ("aten.topk.default", "aten.max.default")
"""Choices that must not fall differently the second time, and the absolute maximum that low-precision scaling needs."""

COMMUNICATION = ("_c10d_functional.reduce_scatter_tensor.default", "_c10d_functional.all_to_all_single.default")
"""Collectives whose output is not larger than their input. all_gather is left out: its output is large."""

PRODUCT_WEIGHTS: dict[Op, int] = {}
"""First-party matrix products, and which argument is the weight (out, in)."""

OPTIONAL = (
    "higher_order.flex_attention",
    "higher_order.inductor_compiled_code",
    "torch_attn._varlen_attn.default",
)
"""Operations that exist only where a feature is loaded; `--activation_checkpoint.debug` reports the absent ones."""


def save_product(op: OpT, *, weight: int) -> OpT:
    """Add a first-party matrix product, whose argument of this number is the weight (out, in), to the list: it is
    counted among PyTorch's. Returns it, as `save_output` does."""
    PRODUCT_WEIGHTS[op] = weight
    return save_output(op)


def find_op(name: str) -> Op | None:
    """The operation `namespace.name.overload`; None where torch has none of that name."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    check_op(found)
    return found


def saved_ops(extra: Iterable[str] = ()) -> frozenset[Op]:
    """Everything that is saved: the list, what is there of the optional, what we defined, and a user's `extra` names.

    Raises `UserError` for an extra name that torch does not know.
    """
    return _resolved(frozenset(OPTIONAL) - set(absent_ops()), frozenset(OURS), tuple(extra))


@cache
def _resolved(optional: frozenset[str], ours: frozenset[Op], extra: tuple[str, ...]) -> frozenset[Op]:
    return _pytorch_ops() | {op for name in optional if (op := find_op(name))} | ours | set(map(user_op, extra))


def user_op(name: str) -> Op:
    """An operation that a user named. Raises `UserError` when there is none, or when the overload is missing."""
    try:
        op = find_op(name)
    except TypeError as error:
        raise UserError(f"activation_checkpoint.save_ops: {error}") from error
    if op is None:
        raise UserError(f"activation_checkpoint.save_ops: torch {torch.__version__} has no operation {name}")
    return op


def absent_ops() -> list[str]:
    """The optional operations that this process does not have."""
    return [name for name in OPTIONAL if find_op(name) is None]


@cache
def _pytorch_ops() -> frozenset[Op]:
    """PyTorch's compute-intensive operations and ours beside them; a name that torch lacks is an error."""
    import torch._higher_order_ops.flex_attention  # registers higher_order.flex_attention
    import torch._higher_order_ops.wrap  # noqa: F401 - registers higher_order.inductor_compiled_code
    from torch._functorch.partitioners import get_default_op_list  # a second to import: only when a block runs

    packets: Any = get_default_op_list().compute_intensive_ops
    ops = {packet.default for packet in packets}
    for name in ATTENTION + MATRIX_PRODUCTS + SELECTION + COMMUNICATION:
        op = find_op(name)
        assert op is not None, f"torch {torch.__version__} has no {name}: fix the list in {__name__}"
        ops.add(op)
    for op in ops:
        check_op(op)
    return frozenset(ops)
