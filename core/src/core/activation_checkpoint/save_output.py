"""How an operation of ours says, on the line where it is defined, that its output is expensive."""

from typing import TypeVar

from torch._ops import HigherOrderOperator, OpOverload

Op = OpOverload | HigherOrderOperator
OpT = TypeVar("OpT", bound=Op)
OURS: set[Op] = set()
"""What `save_output` added."""


def save_output(op: OpT) -> OpT:
    """Add a first-party operation to the list; returns it, so that it stands on the line of the definition."""
    check_op(op)
    OURS.add(op)
    return op


def check_op(op: object) -> None:
    """Raise `TypeError` for what never matches a dispatched operation, such as an overload packet (`aten.mm`)."""
    if not isinstance(op, OpOverload | HigherOrderOperator):
        hint = f"; name one of its overloads: {', '.join(op.overloads())}" if hasattr(op, "overloads") else ""
        raise TypeError(f"{op} is a {type(op).__name__} and would never match an operation{hint}")
