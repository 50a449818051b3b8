"""Bytes that a computation leaves alive, counted on real and on fake tensors alike."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Meter(TorchDispatchMode):
    """While the block runs, notes every storage that an operation makes; `alive` is what of it still lives.

    Hooks on saved tensors do not see what a checkpointed block keeps; storages do not hide. A storage that stood
    before the block, a weight for instance, is not counted.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._made: WeakKeyDictionary[UntypedStorage, int] = WeakKeyDictionary()
        self._old: WeakKeyDictionary[UntypedStorage, int] = WeakKeyDictionary()

    @property
    def alive(self) -> int:
        """Bytes of the storages made inside the block that something still holds."""
        return sum(self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for storage in storages((args, kwargs)):
            if storage not in self._made:
                self._old[storage] = 0
        out = func(*args, **kwargs)
        for storage in storages(out):
            if storage not in self._old:
                self._made[storage] = storage.nbytes()
        return out


def storages(tree: Any) -> list[UntypedStorage]:
    """The storages of all tensors in a tree."""
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
