"""What every part of a model is: a torch module whose weights know the names of their axes and how they start."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

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


CPU_FORMS = "core.nn.cpu_forms"


def cpu_forms(x: Tensor) -> Any:
    """`core.nn.cpu_forms` for x, of any shape, on a CPU; None elsewhere, and for a compiler, which fuses by itself."""
    return _loaded_forms() if x.is_cpu and not torch.compiler.is_compiling() else None


def inference_forms(x: Tensor) -> Any:
    """`cpu_forms` for x, of any shape, under `torch.inference_mode`, where what only inference has may be used; not
    under autocast, which does not know it."""
    usable = not torch.compiler.is_compiling() and x.is_cpu and torch.is_inference_mode_enabled()
    return _loaded_forms() if usable and not torch.is_autocast_enabled("cpu") else None


@cache
def _loaded_forms() -> Any:
    return import_module(CPU_FORMS)


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
    counts_tokens: ClassVar[bool] = False
    """Whether forward is also told which tokens are padding, (B, L), where there is some."""
    start: dict[str, Start]
    """How each weight that this module itself owns is drawn."""

    def flops_per_token(self, seq_len: int) -> Flops:
        """Forward operations per token of this module itself, without its children, in rows of `seq_len` tokens."""
        del seq_len
        return Flops()
