"""Weights are drawn by (seed, name of the weight), so that a start does not depend on order, layout or model size."""

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.nn.start import Start


class LocalSlice(NamedTuple):
    """A part of a weight that is kept here, and the index of its first number in the whole."""

    value: Tensor
    start: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The same part of a whole tensor, of any shape, which is that of the weight: a view."""
        return whole[tuple(slice(first, first + n) for first, n in zip(self.start, self.value.shape, strict=True))]


def full_slice(weight: Tensor) -> LocalSlice:
    """A weight of any shape of which all is kept here."""
    return LocalSlice(weight, (0,) * weight.dim())


def materialise(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *, weights_on: torch.device | None = None
) -> None:
    """Give every meta weight of `model` memory on `weights_on` or else `device`, and move the buffers to `device`.

    Tied weights stay one tensor, those in bytes stay bytes; buffers keep their values.
    """
    ties = _ties(model)
    for name, value in model.named_parameters():
        assert value.is_meta, f"{name} has a value, which would be lost"
    for name, value in model.named_buffers():
        assert not value.is_meta, f"{name} must be built on a real device"

    def give(value: Tensor) -> Tensor:
        if not value.is_meta:
            return value.to(device)
        kept = dtype if value.is_floating_point() else value.dtype
        if hasattr(value, "to_local"):
            return torch.empty_like(value, device=weights_on or device, dtype=kept)
        return torch.empty(value.shape, device=weights_on or device, dtype=kept)  # the other would load sympy: 0.4 s

    model._apply(give)
    for owner, name, first_owner, first_name in ties:
        owner._parameters[name] = first_owner._parameters[first_name]


def _ties(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Every further place of a weight that stands in several, beside its first one."""
    first: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    ties = []
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            if value in first:
                ties.append((module, name, *first[value]))
            first.setdefault(value, (module, name))
    return ties


@torch.no_grad()
def init_weights(
    starts: Iterable[tuple[str, Tensor, Start]], seed: int, local_slice: Callable[[Tensor], LocalSlice] = full_slice
) -> None:
    """Draw each (name, weight of any shape, start) from its own random stream, in fp32 or in bytes, on its device.

    Of a weight that is kept here in part, `local_slice` tells which: it gets the numbers that the whole has there. A
    stack of matrices is drawn matrix by matrix, so that no more than one whole matrix is ever there.
    """
    for name, weight, start in starts:
        piece = local_slice(weight)
        if weight.dim() < 3:
            _fill(piece, weight.shape, start, name, seed)
            continue
        for i, matrix in enumerate(piece.value, start=piece.start[0]):
            _fill(LocalSlice(matrix, piece.start[1:]), weight.shape[1:], start, f"{name}.{i}", seed)


def _fill(piece: LocalSlice, shape: torch.Size, start: Start, name: str, seed: int) -> None:
    value = piece.value
    if value.numel() == 0:
        return
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(value.device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    exact = value.dtype == dtype and value.shape == shape
    out = value if exact else torch.empty(shape, dtype=dtype, device=value.device)
    start.draw(out, generator)
    if not exact:
        value.copy_(piece.of(out))
