"""All weights of a model, each with its axes and its start, and what they amount to."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from core.nn.module import Flops, Module
from core.nn.start import Start

NF4_BLOCK, NF4_BLOCK_BYTES = 64, 36
"""Numbers that share a scale in a weight of bytes, and their bytes: 32 with two numbers in each, and 4 of the scale."""


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
    own: Any = getattr(model.get_submodule(path), "AXES", {})
    if leaf in own:
        return own[leaf]
    parent, _, child = path.rpartition(".")
    around: Any = getattr(model.get_submodule(parent), "AXES", {})
    axes = own.get("weight") or around.get(child)
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
    """Number of scalars in the weights, a tied weight counted once, and one in bytes (`core.nn.nf4`) as its numbers."""
    return sum(map(n_numbers, model.parameters()))


def n_numbers(weight: Tensor) -> int:
    """How many numbers a weight, of any shape, stands for."""
    return weight.numel() if weight.is_floating_point() else weight.numel() // NF4_BLOCK_BYTES * NF4_BLOCK


def training_flops_per_token(model: nn.Module, seq_len: int) -> Flops:
    """Operations that training spends on one token: three times the forward ones (PaLM, arXiv:2204.02311, appendix B).
    A product with a frozen weight is computed twice, and below the lowest part with a trained weight once.

    Counted from the modules as built: every matrix product including the head, a tied one too, and no product for an
    embedding lookup. The attention term compares each query with `seq_len` keys: neither the causal half nor a window
    is subtracted, and recomputation is not added, so that utilisation can be compared between runs.
    """
    through, matmul, attention = _parts_of_backward(model), 0, 0
    for name, module in model.named_modules():
        if isinstance(module, Module):
            once, goes_back = module.flops_per_token(seq_len), _part_of(name) in through
            trained, all_ = _numbers_multiplied(module, seq_len)
            matmul += once.matmul * (1 + goes_back) + (once.matmul * trained // all_ if all_ else once.matmul)
            attention += once.attention * (1 + 2 * goes_back)
    return Flops(matmul, attention)


def _part_of(name: str) -> str:
    """The part of a model that a module or weight of this name is in: a block, or what stands beside the blocks."""
    first, _, rest = name.partition(".")
    return f"layers.{rest.partition('.')[0]}" if first == "layers" and rest else first


def _parts_of_backward(model: nn.Module) -> set[str]:
    """The parts that backward goes through: from the lowest with a trained weight on, and the model itself."""
    parts = [_part_of(name) for name, _ in model.named_modules() if name not in ("", "layers")]
    trained = [_part_of(name) for name, weight in model.named_parameters() if weight.requires_grad]
    ordered = list(dict.fromkeys(parts))
    first = min((ordered.index(part) for part in trained if part in ordered), default=len(ordered))
    return {"", "layers", *ordered[first:]} if trained else set()


def _numbers_multiplied(module: Module, seq_len: int) -> tuple[int, int]:
    """Numbers in the matrices that a module multiplies with, those that are trained and all: in its own, or else in
    those below it that count no products themselves, as a mixture's experts."""
    own = list(module.parameters(recurse=False))
    for child in module.modules() if not own else ():
        if isinstance(child, Module) and child.flops_per_token(seq_len) == Flops():
            own += child.parameters(recurse=False)
    n_dims = max((weight.dim() for weight in own), default=0)  # in a stack of matrices, biases have two
    matrices = [weight for weight in own if weight.dim() == n_dims > 1]
    return sum(n_numbers(each) for each in matrices if each.requires_grad), sum(map(n_numbers, matrices))
