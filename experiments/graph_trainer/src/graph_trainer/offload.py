"""What blocks save for backward, kept in the host's memory in between.

A tensor that the forward leaves to the backward is copied to the host behind its last reader of the forward, and back
in front of the block that reads it first in backward. Those of the last block stay: they are read at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from core.runtime.device import MIB
from graph_trainer.memory import ON_HOST
from graph_trainer.save_set import last_writes
from graph_trainer.trace import BLOCK, PHASE, is_backward, is_op, note_value, storages_of, tensors_of

LIBRARY = torch.library.Library("graph_trainer", "FRAGMENT")
LIBRARY.define("offload(Tensor x) -> Tensor")
LIBRARY.define("reload(Tensor x, Device device) -> Tensor")
OFFLOAD, RELOAD = torch.ops.graph_trainer.offload.default, torch.ops.graph_trainer.reload.default
LEAST_BYTES = 2**12
"""A smaller tensor stays."""


@torch.library.impl(LIBRARY, "offload", "CompositeExplicitAutograd")
def _offload(x: Tensor) -> Tensor:
    """A copy in the host's memory, pinned beside an accelerator."""
    host = torch.empty_like(x, device="cpu", pin_memory=x.device.type != "cpu")
    return host.copy_(x, non_blocking=True)


@torch.library.impl(LIBRARY, "reload", "CompositeExplicitAutograd")
def _reload(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device."""
    return torch.empty_like(x, device=device).copy_(x, non_blocking=True)


@torch.library.register_fake(OFFLOAD, lib=LIBRARY)
def _fake_offload(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


@torch.library.register_fake(RELOAD, lib=LIBRARY)
def _fake_reload(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(x, device=device)


def offload(module: GraphModule) -> str:
    """Keep in the host's memory what blocks but the last save."""
    graph = module.graph
    nodes = list(graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}
    n_tensors = n_bytes = 0
    for node, last in list(candidates(nodes)):
        readers = sorted(filter(is_backward, node.users), key=order.__getitem__)
        (tensor,) = tensors_of(node)
        with graph.inserting_after(last):
            away = graph.call_function(OFFLOAD, (node,))
        with graph.inserting_before(start_of_block(readers[0], nodes)):
            back = graph.call_function(RELOAD, (away, tensor.device))
        away.meta = {BLOCK: node.meta[BLOCK], PHASE: False, ON_HOST: True}
        back.meta = {BLOCK: readers[0].meta.get(BLOCK), PHASE: True}
        note_value(away)
        note_value(back)
        for reader in readers:
            reader.replace_input_with(node, back)
        n_tensors, n_bytes = n_tensors + 1, n_bytes + tensor.numel() * tensor.element_size()
    return f"{n_tensors} tensors of {n_bytes / MIB:,.1f} MiB moved to the host and back"


def candidates(nodes: list[Node]) -> Iterator[tuple[Node, Node]]:
    """Tensors of blocks but the last that the forward leaves to the backward, each with its last reader in forward.

    Each is alone in its storage with what backward reads; nobody writes there.
    """
    own = [node for node in nodes if is_op(node) and not is_backward(node) and isinstance(node.meta.get("val"), Tensor)]
    last_block = max((int(node.meta[BLOCK]) for node in own if node.meta.get(BLOCK) is not None), default=0)
    shares: dict[int, list[Node]] = {}
    order = {node: place for place, node in enumerate(nodes)}
    for node in own:
        for storage in storages_of(node):
            shares.setdefault(storage, []).append(node)
    barred = last_writes(nodes).keys() | {s for node in nodes if node.op == "placeholder" for s in storages_of(node)}
    for storage, family in shares.items():
        node, read = family[0], [each for each in family if any(map(is_backward, each.users))]
        in_block = node.meta.get(BLOCK) not in (None, str(last_block))
        if storage in barred or read != [node] or not in_block or storages_of(node)[storage] < LEAST_BYTES:
            continue
        forward = {user for each in family for user in each.users if not is_backward(user) and user.op != "output"}
        yield node, max({*family, *forward}, key=order.__getitem__)


def start_of_block(node: Node, nodes: list[Node]) -> Node:
    """The first node of the backward of the block that a node is part of; the node itself outside of all."""
    block = node.meta.get(BLOCK)
    if block is None:
        return node
    return next(each for each in nodes if is_backward(each) and each.meta.get(BLOCK) == block)
