"""What tests of activation checkpointing look at: gradients, and the operations of a model's blocks."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from core.activation_checkpoint.apply import ActivationCheckpoint, Layered
from core.activation_checkpoint.save_output import Op

HEAVY_NAME = re.compile(r"mm$|conv|attention|linear$")
"""Names of operations that have FLOPs; PyTorch's own registry knows only some of them."""

CHEAP = {"wait_tensor", "all_gather_into_tensor", "cpu_rms_norm", "cpu_rotate", "cpu_clamped_swiglu"}
"""What is repeated on purpose: waiting is free, a gathered tensor is large, norms, rotations and gates are small."""


class Dispatched(TorchDispatchMode):
    """Records every operation that runs inside, with its arguments."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Op, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls.append((func, (args, kwargs)))
        return func(*args, **(kwargs or {}))


def checkpoint_blocks(model: Layered, mode: str, **settings: Any) -> None:
    """Apply activation checkpointing to the blocks of a model, as a run does."""
    config = ActivationCheckpoint.Config(mode=mode, **settings)  # pyrefly: ignore[bad-argument-type] - of the modes
    config.build(folder=Path()).apply(model)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of every weight that `loss()` gives, and nothing from before."""
    model.zero_grad()
    loss().backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), f"no gradient: {found}"
    return found  # pyrefly: ignore[bad-return] - none is None


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient the same bit for bit, and different from zero."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), f"{name}: the gradient is zero everywhere"
        assert torch.equal(found[name], gradient), f"{name}: off by {(found[name] - gradient).abs().max():.1e}"


def autograd_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward of `run()`, each storage once; what eager checkpointing keeps of a
    block it does not see, of a compiled block all."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def heavy_ops(run: Callable[[], Any]) -> set[Op]:
    """The expensive operations that `run()` dispatches: products, attention, communication, and what is not PyTorch's.

    Decided by name and namespace, so that a new one is found that the list of `core.activation_checkpoint.ops` lacks.
    """
    with Dispatched() as dispatched:
        run()
    return {op for op, _ in dispatched.calls if is_heavy(op)}


def is_heavy(op: Op) -> bool:
    """Whether an operation is one that `heavy_ops` looks for."""
    if isinstance(op, HigherOrderOperator):
        return True
    name = op.overloadpacket.__name__
    foreign = op.namespace not in ("aten", "prim", "prims", "profiler") and name not in CHEAP
    return foreign or op.overloadpacket in flop_registry or HEAVY_NAME.search(name) is not None


def products(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, bool]:
    """The linear layers of a model in the order of forward, and for each whether backward does its product again.

    A weight takes part in one product of a backward that repeats nothing, that for the gradient of its input.
    """
    with Dispatched() as forward:
        value = loss()
    with Dispatched() as backward:
        value.backward()
    uses = weights_used(model, backward)
    assert set(uses.values()) <= {1, 2}, f"uses in backward: {uses}"
    return {name: uses[name] == 2 for name in weights_used(model, forward)}


def weights_used(model: nn.Module, dispatched: Dispatched) -> Counter[str]:
    """How many products each linear layer's weight was part of."""
    matrices = [(name, weight) for name, weight in model.named_parameters() if weight.dim() > 1]
    owners = {weight.untyped_storage().data_ptr(): name for name, weight in matrices}
    uses: Counter[str] = Counter()
    for op, arguments in dispatched.calls:
        if not isinstance(op, HigherOrderOperator) and op.overloadpacket in flop_registry:
            for leaf in tree_leaves(arguments):
                owner = owners.get(leaf.untyped_storage().data_ptr()) if isinstance(leaf, Tensor) else None
                if owner is not None:
                    uses[owner.removesuffix(".weight")] += 1
    return uses
