"""Bytes that a computation leaves alive, counted on real and on fake tensors alike."""

import weakref
from typing import Any, Self
from unittest import mock

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_iter


class Meter(TorchDispatchMode):
    """While the block runs, notes every storage that an operation makes; `alive` is what of it still lives, in bytes,
    and `peak` the most that did since the block began, or since `peak` was set.

    Hooks on saved tensors do not see what a checkpointed block keeps; storages do not hide. Of a storage that stood
    before the block, a weight for instance, only what it gains or loses is counted: FSDP resizes without an operation.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._base: dict[int, int] = {}
        self._counted: dict[int, int] = {}
        self._watched: dict[int, weakref.ref] = {}

    def __enter__(self) -> Self:
        resize = UntypedStorage.resize_

        def resized(storage: UntypedStorage, size: int) -> UntypedStorage:
            self._meet(storage, made=False)
            out = resize(storage, size)
            self._count(storage)
            return out

        self._patch = mock.patch.object(UntypedStorage, "resize_", resized)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # the tensors inside will come by
        kwargs = kwargs or {}
        for storage in storages((args, kwargs)):
            self._meet(storage, made=False)
        out = func(*args, **kwargs)
        for storage in storages(out):
            self._meet(storage, made=True)
            self._count(storage)
        return out

    def _meet(self, storage: UntypedStorage, *, made: bool) -> None:
        """Remember a storage that was not seen before; `made` if its bytes are to be counted."""
        key = id(storage)
        if key not in self._base:
            self._base[key] = 0 if made else storage.nbytes()
            self._counted[key] = 0
            self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _count(self, storage: UntypedStorage) -> None:
        key = id(storage)
        bytes_now = storage.nbytes() - self._base[key]
        self.alive += bytes_now - self._counted[key]
        self._counted[key] = bytes_now
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int) -> None:
        del self._base[key], self._watched[key]
        self.alive -= self._counted.pop(key)


def storages(tree: Any) -> list[UntypedStorage]:
    """The storages of all tensors in a tree."""
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
