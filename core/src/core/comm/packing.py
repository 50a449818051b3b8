"""A library's handle as tensors, so that autograd, checkpointing and torch.compile may keep it.

Packed are three tensors, whatever the handle has: all that lies on the device in bytes, all that lies on the host in
bytes, and a list of numbers that says what is where.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from core.comm.transport import Handle

ALIGNMENT = 256  # of PyTorch's own blocks of memory: kernels rely on less
NONE, BOOL, INT, LIST, TENSOR = range(5)
HANDLE_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
HANDLE_DTYPES += [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def pack_handle(members: Iterable[Any], device: torch.device) -> Handle:
    """The members of a handle as three tensors: None, bool, int, lists of ints, and tensors here or on `device`.

    Host memory that was pinned stays pinned. Raises TypeError for anything else.
    """
    pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
    offsets, layout, pinned = [0, 0], [], False
    for member in members:
        match member:
            case None:
                layout.append(NONE)
            case bool() | int():
                layout += [BOOL if isinstance(member, bool) else INT, int(member)]
            case list():
                layout += [LIST, len(member), *member]
            case Tensor():
                on_host = member.device != device
                assert not on_host or member.is_cpu, f"a handle on {device} has a tensor on {member.device}"
                pinned |= on_host and member.is_pinned()
                data = member.contiguous().flatten().view(torch.uint8)
                gap = -len(data) % ALIGNMENT
                layout += [TENSOR, int(on_host), offsets[on_host], HANDLE_DTYPES.index(member.dtype)]
                layout += [member.dim(), *member.shape]
                pieces[on_host].extend((data, data.new_zeros(gap)))
                offsets[on_host] += len(data) + gap
            case _:
                raise TypeError(f"a handle has a {type(member).__name__}, which this adapter cannot keep as a tensor")
    here, there = (torch.cat(part) if part else None for part in pieces)
    here = torch.empty(0, dtype=torch.uint8, device=device) if here is None else here
    there = torch.empty(0, dtype=torch.uint8) if there is None else there
    return [here, there.pin_memory() if pinned else there, torch.tensor(layout, dtype=torch.int64)]


def unpack_handle(handle: Handle) -> list[Any]:
    """The members again. What a library writes into them leaves the packed handle as it is."""
    here, there, packed = handle
    blobs, layout, members = (here.clone(), there), iter(packed.tolist()), []
    for kind in layout:
        if kind == NONE:
            members.append(None)
        elif kind == TENSOR:
            members.append(_piece(blobs, layout))
        elif kind == LIST:
            members.append([next(layout) for _ in range(next(layout))])
        else:
            members.append(bool(next(layout)) if kind == BOOL else next(layout))
    return members


def _piece(blobs: tuple[Tensor, Tensor], layout: Any) -> Tensor:
    on_host, start, dtype, dim = (next(layout) for _ in range(4))
    shape = [next(layout) for _ in range(dim)]
    n_bytes = torch.Size(shape).numel() * HANDLE_DTYPES[dtype].itemsize
    return blobs[on_host][start : start + n_bytes].view(HANDLE_DTYPES[dtype]).view(shape)


def fake_pack(like: Tensor) -> Handle:
    """Tensors of any shape like those of `pack_handle`, without their numbers; for `fake_handle`."""
    size = torch.library.get_ctx().new_dynamic_size
    host: dict[str, Any] = {"device": "cpu"}
    return [
        like.new_empty(size(), dtype=torch.uint8),
        like.new_empty(size(), dtype=torch.uint8, **host),
        like.new_empty(size(), dtype=torch.int64, **host),
    ]
