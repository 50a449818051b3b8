"""The collectives of simple FSDP in a graph: those of a block merged into one message, and moved to where they overlap.

Letters: n ranks, p numbers of one piece, P numbers of all pieces of a message.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graph_trainer.save_set import is_effect, written_by
from graph_trainer.trace import BLOCK, PHASE, is_op, note_value, storages_of, tensors_of

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
GATHER_OP = c10d.all_gather_into_tensor.default
SCATTER_OP = c10d.reduce_scatter_tensor.default
WAIT_OP = c10d.wait_tensor.default

Bucket = list[Node]


def merge(module: GraphModule) -> str:
    """Merge the gathers of a block's weights, and the scatters of their gradients, each phase by itself."""
    graph = module.graph
    counts = []
    for op, rewrite in ((GATHER_OP, merge_gathers), (SCATTER_OP, merge_scatters)):
        found = [node for node in graph.nodes if node.target is op and is_of_weight(node)]
        buckets = buckets_of(graph, found)
        for bucket in buckets:
            if len(bucket) > 1:
                rewrite(graph, bucket)
        counts.append(f"{len(found)} -> {len(buckets)} {'gathers' if op is GATHER_OP else 'scatters'} of weights")
        sort(graph)
    graph.eliminate_dead_code(is_effect)
    return ", ".join(counts)


def is_of_weight(node: Node) -> bool:
    """Whether a gather reads a weight, or a scatter makes a gradient: tokens of tensor parallelism travel by others."""
    if node.target is GATHER_OP:
        source = source_of(node)
        pieces = source.all_input_nodes if source.target is aten.cat.default else [source]  # of a merged one
        return all(source_of(piece).op == "placeholder" for piece in pieces)
    return all(is_output(user) for wait in node.users for user in wait.users)


def source_of(node: Node) -> Node:
    """The node behind casts, padding and views that have one tensor each."""
    while node.op != "placeholder" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def is_output(node: Node) -> bool:
    """Whether a node is an output, or only ever becomes one by slices, casts and sums."""
    return node.op == "output" or (
        node.target in GRADIENT_OPS and bool(node.users) and all(is_output(user) for user in node.users)
    )


GRADIENT_OPS = {
    aten.slice.Tensor, aten.permute.default, aten.view.default, aten._to_copy.default, aten.add.Tensor,
    aten.transpose.int, aten.alias.default, aten.clone.default, WAIT_OP,
}  # fmt: skip
"""What may stand between the scatter of a gradient and the output: a piece of it, its order, a sum for tied weights."""


def buckets_of(graph: Graph, collectives: list[Node]) -> list[Bucket]:
    """Collectives that may be one: of a block, or of what is between two, of a phase, a group of ranks and a type."""
    found: dict[Any, Bucket] = defaultdict(list)
    behind, wanted = None, set(collectives)
    for node in graph.nodes:
        block = node.meta.get(BLOCK)
        behind = behind if block is None else block
        if node in wanted:
            (tensor,) = tensors_of(node)
            found[block, behind, node.meta[PHASE], tensor.dtype, node.args[-1]].append(node)
    return list(found.values())


def adder(graph: Graph, like: Node) -> Callable[..., Node]:
    """What adds an operation to a graph, with the block and the phase of the node `like`."""

    def add(op: Any, *args: Any) -> Node:
        node = graph.call_function(op, args)
        node.meta = {BLOCK: like.meta.get(BLOCK), PHASE: like.meta[PHASE]}
        note_value(node)
        return node

    return add


def merge_gathers(graph: Graph, bucket: Bucket) -> None:
    """One gather (n P,) of flat pieces in the place of the first; each weight is cut out of it."""
    n, group = bucket[0].args[1:]
    with graph.inserting_before(bucket[0]):
        for node in bucket:
            bring_forward(graph, node, bucket[0])
        add = adder(graph, bucket[0])
        flat = [add(aten.reshape.default, node.args[0], [-1]) for node in bucket]
        whole = add(WAIT_OP, add(GATHER_OP, add(aten.cat.default, flat), n, group))
        rows = add(aten.view.default, whole, [n, -1])
        first = 0
        for node, piece in zip(bucket, flat, strict=True):
            size = tensors_of(piece)[0].numel()
            own = add(aten.slice.Tensor, rows, 1, first, first + size)
            replace_waited(node, add(aten.reshape.default, own, list(tensors_of(node)[0].shape)))
            first += size


def merge_scatters(graph: Graph, bucket: Bucket) -> None:
    """One scatter of (n, P) numbers in the place of the last; each gradient is cut out of its result (P,)."""
    kind, n, group = bucket[-1].args[1:]
    with graph.inserting_before(bucket[-1]):
        add = adder(graph, bucket[-1])
        rows = [add(aten.reshape.default, node.args[0], [n, -1]) for node in bucket]
        flat = add(aten.reshape.default, add(aten.cat.default, rows, 1), [-1])
        own = add(WAIT_OP, add(SCATTER_OP, flat, kind, n, group))
        first = 0
        for node in bucket:
            shape = list(tensors_of(node)[0].shape)
            size = tensors_of(node)[0].numel()
            replace_waited(node, add(aten.view.default, add(aten.slice.Tensor, own, 0, first, first + size), shape))
            first += size


def bring_forward(graph: Graph, node: Node, place: Node) -> None:
    """Move what a gather reads, up to the stored weight, in front of `place`."""
    chain = []
    each = node.args[0]
    while isinstance(each, Node) and each.op != "placeholder":
        chain.append(each)
        (each,) = each.all_input_nodes
    order = {each: i for i, each in enumerate(graph.nodes)}
    for each in reversed(chain):
        if order[each] > order[place]:
            place.prepend(each)


def replace_waited(node: Node, value: Node) -> None:
    """Have `value` be read instead of what waiting for a collective returns."""
    for wait in list(node.users):
        assert wait.target is WAIT_OP, f"{wait} reads {node} without waiting"
        wait.replace_all_uses_with(value)


def sort(graph: Graph, priority: dict[Node, float] | None = None) -> None:
    """Put nodes behind what they read, and behind writes that they stood behind; else in the order of `priority`, by
    default that in which they stand."""
    nodes = list(graph.nodes)
    place = {node: float(i) for i, node in enumerate(nodes)} | (priority or {})
    number = {node: i for i, node in enumerate(nodes)}
    before: dict[Node, set[Node]] = {node: set(node.all_input_nodes) for node in nodes}
    for node, earlier in write_order(nodes):
        before[node].add(earlier)
    after: dict[Node, list[Node]] = defaultdict(list)
    for node, needs in before.items():
        for need in needs:
            after[need].append(node)
    missing = {node: len(needs) for node, needs in before.items()}
    ready = [(place[node], number[node], node) for node in nodes if not missing[node]]
    heapify(ready)
    done = 0
    while ready:
        _, _, node = heappop(ready)
        graph._root.prepend(node)  # the end of the list
        done += 1
        for user in after[node]:
            missing[user] -= 1
            if not missing[user]:
                heappush(ready, (place[user], number[user], user))
    assert done == len(nodes), "a circle among the nodes of a graph"


def write_order(nodes: list[Node]) -> Iterator[tuple[Node, Node]]:
    """Pairs (node, earlier one) that must keep their order, because one of them writes where the other reads."""
    written: dict[int, Node] = {}
    readers: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        if not is_op(node):
            continue
        touched = {storage for each in (node, *node.all_input_nodes) for storage in storages_of(each)}
        writes = {storage for each in written_by(node) for storage in storages_of(each)}
        for storage in touched:
            if storage in written and written[storage] is not node:
                yield node, written[storage]
        for storage in writes:
            yield from ((node, reader) for reader in readers.pop(storage, ()) if reader is not node)
            written[storage] = node
        for storage in touched:
            readers[storage].append(node)


def prefetch(module: GraphModule) -> str:
    """Start the gathers of weights one message ahead of their use, each phase by itself, and wait for sums of gradients
    as the next ones begin."""
    graph = module.graph
    nodes = list(graph.nodes)
    place = {node: float(i) for i, node in enumerate(nodes)}
    gathers = [node for node in nodes if node.target is GATHER_OP and is_of_weight(node)]
    priority: dict[Node, float] = {}
    early = late = 0
    for earlier, node in pairwise(gathers):
        if earlier.meta[PHASE] != node.meta[PHASE]:
            continue
        start = place[next(iter(earlier.users))] - 0.5  # as the host begins to wait for the one before
        for each in (*inputs_up_to_weight(node), node):
            priority[each] = min(place[each], start)
        early += 1
    for node, later in pairwise(node for node in nodes if node.target is SCATTER_OP and is_of_weight(node)):
        for wait in node.users:
            for each in (wait, *behind(wait)):
                priority[each] = max(place[each], place[later] + 0.5)
        late += 1
    sort(graph, priority)
    return f"{early} gathers start a message ahead, {late} sums of gradients end as the next begin"


def inputs_up_to_weight(node: Node) -> Iterator[Node]:
    """What a gather reads, nearest to the stored weight first."""
    chain, waiting = [], list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each.op != "placeholder":
            chain.append(each)
            waiting += each.all_input_nodes
    yield from reversed(chain)


def behind(node: Node) -> Iterator[Node]:
    """The operations that read a node, and those that read these."""
    for user in node.users:
        if user.op != "output":
            yield user
            yield from behind(user)
