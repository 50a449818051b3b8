"""The attention kernels by their names, which `attention.backend` takes: sdpa, flex, varlen, and those of others."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, TypeVar

from core.config.errors import did_you_mean
from core.nn.kernel import Kernel

KernelClass = TypeVar("KernelClass", bound=type[Kernel])
KERNELS: dict[str, Any] = {
    "sdpa": "core.nn.sdpa:SDPA",
    "tiles": "core.nn.tiles:Tiles",
    "flex": "core.nn.flex:Flex",
    "varlen": "core.nn.varlen:Varlen",
}
"""Every kernel that this process has, by its name: its class, or where that stands, to be loaded when it is chosen."""


def register_kernel(name: str) -> Callable[[KernelClass], KernelClass]:
    """A decorator that lets `attention.backend` take the name of a kernel. Raises `ValueError` for a name that another
    kernel has."""

    def register(kernel: KernelClass) -> KernelClass:
        if name in KERNELS:
            other = kernel_class(name)
            if (other.__module__, other.__qualname__) != (kernel.__module__, kernel.__qualname__):
                raise ValueError(f"two attention kernels are called {name}: {other.__module__} has one")
        KERNELS[name] = kernel
        return kernel

    return register


def kernel_class(name: str) -> type[Kernel]:
    """The kernel of this name."""
    if isinstance(KERNELS[name], str):
        module, _, attribute = KERNELS[name].partition(":")
        KERNELS[name] = getattr(import_module(module), attribute)
    return KERNELS[name]


def backend_problems(name: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the setting `backend` of an attention."""
    if name not in KERNELS:
        hint = did_you_mean(name, KERNELS)
        yield (
            "backend",
            f"no attention kernel is called {name!r}{f'; {hint}' if hint else '.'} There is {', '.join(KERNELS)}; one "
            "of your own is known once its file is imported, as by the module of the recipe",
        )
