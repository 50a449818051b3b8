"""The attention kernels by their names, which `attention.backend` takes: sdpa, flex, and those of others.

Letters: B rows, L length of the queries, M length of the keys, N query heads, K key/value heads, H head width, V width
of a value.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.errors import did_you_mean
from core.nn.kernel import Kernel, KernelUse, Mask, Positions, visible


@dataclass(frozen=True)
class SDPA:
    """PyTorch's scaled_dot_product_attention, on every device; on a CPU its kernel, tile by tile where that is less
    work."""

    window: int | None = None

    def problem(self, use: KernelUse) -> str | None:
        """It can do everything."""
        return None

    def mask(self, positions: Positions) -> Mask:
        """None where the causal flag of the kernel says it all; that of `tiles`, where these take the tokens; else the
        rule on the grid of rows, queries and keys."""
        tiles: Any = kernel_class("tiles")(self.window)
        if positions.is_plain and (self.window is None or self.window >= positions.position_BL.shape[1]):
            return None
        if tiles.takes(positions):
            return tiles.mask(positions)
        row, query, key = (torch.arange(n, device=positions.position_BL.device) for n in positions.grid)
        return visible(positions, self.window)(row[:, None, None], None, query[None, :, None], key[None, None])[:, None]

    def __call__(
        self,
        q_BNLH: Tensor,
        k_BKMH: Tensor,
        v_BKMV: Tensor,
        mask: Mask,
        *,
        scale: float,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        assert mask is not None or q_BNLH.shape[2] == k_BKMH.shape[2], "no mask, and the keys are not the tokens"
        tiles: Any = kernel_class("tiles")(self.window)
        if tiles.pays(q_BNLH, mask, sinks_N):
            return tiles(q_BNLH, k_BKMH, v_BKMV, mask, scale=scale, sinks_N=sinks_N)
        v_dim = v_BKMV.shape[-1]
        if sinks_N is not None:
            q_BNLH, k_BKMH, v_BKMV, mask = with_sinks(q_BNLH, k_BKMH, v_BKMV, mask, sinks_N / scale)
        if q_BNLH.is_cpu and v_BKMV.shape[-1] < q_BNLH.shape[-1]:  # the fused kernel of a CPU wants one width
            v_BKMV = F.pad(v_BKMV, (0, q_BNLH.shape[-1] - v_BKMV.shape[-1]))
        grouped = q_BNLH.shape[1] != k_BKMH.shape[1]
        return F.scaled_dot_product_attention(
            q_BNLH, k_BKMH, v_BKMV, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scale
        )[..., :v_dim]


def with_sinks(
    q_BNLH: Tensor, k_BKMH: Tensor, v_BKMV: Tensor, mask: Mask, logit_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """Queries, keys, values and mask with one key more, whose product with a query of head n is `logit_N[n]`.

    Every query sees it and takes nothing from it, so that the softmax's denominator has one learned term more, and
    fused kernels compute it:

        q' = [q, logit, 0...]    k' = [k, 0, 0...], and last [0, 1, 0...]    v' = [v, 0...], and last 0

    The width grows by eight because kernels want rows of whole 16 bytes.
    """
    n_queries, n_keys = q_BNLH.shape[2], k_BKMH.shape[2]
    extra_BNL8 = F.pad(logit_N.to(q_BNLH.dtype).view(1, -1, 1, 1), (0, 7)).expand(*q_BNLH.shape[:3], 8)
    k_BKMH, v_BKMV = F.pad(k_BKMH, (0, 8, 0, 1)), F.pad(v_BKMV, (0, 8, 0, 1))
    k_BKMH = k_BKMH + F.pad(k_BKMH.new_ones(1, 1), (k_BKMH.shape[-1] - 8, 7, n_keys, 0))
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q_BNLH.device).tril()[None, None]
    return torch.cat((q_BNLH, extra_BNL8), -1), k_BKMH, v_BKMV, F.pad(mask, (0, 1), value=True)


KernelClass = TypeVar("KernelClass", bound=type[Kernel])
KERNELS: dict[str, Any] = {"sdpa": SDPA, "tiles": "core.nn.tiles:Tiles", "flex": "core.nn.flex:Flex"}
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
