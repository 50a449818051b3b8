"""What every part of a model is: a torch module whose weights know the names of their axes and how they start."""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from torch import nn

from core.config.configurable import Configurable, range_problems
from core.nn.start import Start

LARGEST = {
    "dim": 2**20,
    "hidden_dim": 2**24,
    "n_layers": 1000,
    "n_mtp_layers": 100,
    "n_heads": 2**16,
    "head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "qk_nope_head_dim": 2**16,
    "v_head_dim": 2**16,
    "q_lora_rank": 2**20,
    "kv_lora_rank": 2**20,
    "n_experts": 2**16,
    "vocab_size": 2**24,
    "max_seq_len": 2**30,
}
"""Sizes far above those of any model; a larger one is a mistake, and would take memory and minutes before it shows."""


def size_problems(config: Configurable.Config, *names: str, low: int = 1) -> Iterator[tuple[str, str]]:
    """Sizes of a part that are too small, or larger than any."""
    return range_problems(config, low, **{name: LARGEST[name] for name in names})


class Flops(NamedTuple):
    """Floating-point operations of one token, a multiplication and an addition counted as two.

    `matmul` grows with the weights, `attention` with the number of keys that a query is compared with.
    """

    matmul: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.attention


class Module(nn.Module):
    """A torch module that names the axes of its weights and says how they start.

    `AXES` gives the logical name of each dimension ("embed", "heads", "ffn", "vocab", ...) for every weight of this
    module, and for the `weight` of every direct child that does not name it itself. A `bias` has the axes of the weight
    beside it without the last one, and is never listed. `core.parallel` alone knows on which part of the mesh an axis
    lies.
    """

    AXES: ClassVar[dict[str, tuple[str, ...]]] = {}
    SIZED_BY: ClassVar[dict[str, tuple[str, ...]]] = {}
    """For an axis of this part, or of a part in it: the fields of its Config, or paths to them, that say how many there
    are to be shared by ranks. So a degree that does not fit is told with the setting; without it, with the weight."""
    start: dict[str, Start]
    """How each weight that this module itself owns is drawn."""

    def flops_per_token(self, seq_len: int) -> Flops:
        """Forward operations per token of this module itself, without its children, in rows of `seq_len` tokens."""
        del seq_len
        return Flops()


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
    if leaf == "bias" and axes:
        return axes[:-1]
    return axes if leaf == "weight" else None


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
