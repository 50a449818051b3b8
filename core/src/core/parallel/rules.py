"""Logical axis -> mesh axis: the layout of all weights, one table."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from core.nn.module import Module
from core.nn.weights import axes_beside, weights

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "embed": None,
    "merge": None,
    "head": None,
    "lora": None,
    "choices": None,
    "expert_ffn": None,
}

EVENLY = frozenset({"heads", "experts"})
"""Axes whose heads or experts ranks share evenly; of any other, each rank needs a part, however small."""


class Named(NamedTuple):
    """A weight as a module names it: `owner.leaf`, its axes, and whether it is added to a sum that is cut."""

    owner: nn.Module
    leaf: str
    axes: tuple[str, ...]
    summand: bool


def named_weights(module: nn.Module) -> Iterator[Named]:
    """The weights whose axes `module` itself states.

    A bias is a summand when the last axis of its weight is cut: each rank then holds a part of the sum that it joins.
    """
    for name, axes in getattr(type(module), "AXES", {}).items():
        part = getattr(module, name, None)
        if isinstance(part, nn.Parameter):
            yield Named(module, name, axes, summand=False)
        elif part is not None:
            yield Named(part, "weight", axes, summand=False)
            if getattr(part, "bias", None) is not None:
                yield Named(part, "bias", axes[:-1], summand=RULES[axes[-1]] is not None)
            for leaf, beside in axes_beside(part, axes).items():
                if getattr(part, leaf, None) is not None:
                    yield Named(part, leaf, beside, summand=False)


def cut_dim(axes: tuple[str, ...], mesh_axis: str) -> int | None:
    """The dimension that `mesh_axis` cuts; None if it cuts none."""
    dims = [i for i, axis in enumerate(axes) if RULES[axis] == mesh_axis]
    assert len(dims) < 2, f"two of {axes} lie on {mesh_axis}"
    return dims[0] if dims else None


def check_axes(model: Module) -> None:
    """Raise `TypeError` for a weight with an axis that the table does not have."""
    for weight in weights(model):
        for axis in weight.axes:
            if axis not in RULES:
                raise TypeError(
                    f"{weight.name}: nothing says how to lay out the axis {axis!r} of {weight.axes}; use one of "
                    f"{', '.join(RULES)}, or add it to RULES in core.parallel.rules"
                )
