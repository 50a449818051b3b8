"""All weights of a model, each with its axes and its start, and what they amount to."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from core.nn.module import Flops, Module
from core.nn.start import Start


class Weight(NamedTuple):
    """One stored weight: its name in the state dict, the value, its axes, and how it starts."""

    name: str
    value: nn.Parameter
    axes: tuple[str, ...]
    start: Start


def weights(model: Module) -> Iterator[Weight]:
    """Every weight of a model once, in the order of `named_parameters` (a tied weight under its first name).

    Raises `TypeError` for a weight whose axes or start nobody states, or whose axes are not one per dimension.
    """
    for name, value in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        axes = _axes(model, path, leaf)
        if axes is None:
            raise TypeError(f"{name}: no AXES name this weight; add it to {type(owner).__name__} or to its parent")
        if len(axes) != value.dim():
            raise TypeError(f"{name}: AXES {axes} name {len(axes)} axes, the weight has shape {tuple(value.shape)}")
        start = vars(owner).get("start", {}).get(leaf)
        if start is None:
            raise TypeError(f"{name}: {type(owner).__name__}.start does not say how this weight is drawn")
        yield Weight(name, value, axes, start)


def _axes(model: Module, path: str, leaf: str) -> tuple[str, ...] | None:
    own = getattr(type(model.get_submodule(path)), "AXES", {})
    if leaf in own:
        return own[leaf]
    parent, _, child = path.rpartition(".")
    axes = own.get("weight") or getattr(type(model.get_submodule(parent)), "AXES", {}).get(child)
    if axes and leaf in (beside := axes_beside(model.get_submodule(path), axes)):
        return beside[leaf]
    if leaf == "bias" and axes:
        return axes[:-1]
    return axes if leaf == "weight" else None


def axes_beside(layer: nn.Module, axes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The axes of weights that were added to a layer beside its weight, which has these: its class's `beside` says."""
    beside: Any = getattr(layer, "beside", None)
    return beside(axes) if beside else {}


def parameter_count(model: nn.Module) -> int:
    """Number of scalars in the weights, a tied weight counted once."""
    return sum(value.numel() for value in model.parameters())


def training_flops_per_token(model: nn.Module, seq_len: int) -> Flops:
    """Operations that training spends on one token: three times the forward ones (PaLM, arXiv:2204.02311, appendix B).

    Counted from the modules as built: every matrix product including the head, a tied one too, and no product for an
    embedding lookup. The attention term compares each query with `seq_len` keys: neither the causal half nor a window
    is subtracted, and recomputation is not added, so that utilisation can be compared between runs.
    """
    parts = [module.flops_per_token(seq_len) for module in model.modules() if isinstance(module, Module)]
    return Flops(3 * sum(part.matmul for part in parts), 3 * sum(part.attention for part in parts))
