"""What a graph holds and sends, read off its nodes: no kernel runs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from core.activation_checkpoint.survey import flops
from core.plan.traffic import Message, message
from graph_trainer.trace import is_backward, is_op, storages_of, values_of

ON_HOST = "graph_trainer_on_host"


@dataclass(frozen=True, kw_only=True)
class GraphSize:
    """A graph in numbers; bytes are those beside its inputs."""

    nodes: int
    peak: int
    """The most bytes at once, in the order of the nodes, each storage freed after its last use."""
    kept: int
    """Bytes that the forward leaves to the backward."""
    on_host: int
    """Bytes of them that lie in the host's memory, and are counted neither in `peak` nor in `kept`."""
    flops: int
    """Of products and attention, those that are computed again included."""
    calls: Counter[str] = field(default_factory=Counter)
    """Messages that this rank sends, by collective."""
    sent: Counter[str] = field(default_factory=Counter)
    """Their bytes, as `core.plan.traffic` counts them."""


def size_of(graph: Graph) -> GraphSize:
    """A graph in numbers."""
    nodes = list(graph.nodes)
    last, sizes, host = last_uses(nodes), {}, set()
    inputs = {storage for node in nodes if node.op == "placeholder" for storage in storages_of(node)}
    alive = peak = 0
    ends: dict[int, list[int]] = {}
    boundary = next((place for place, node in enumerate(nodes) if is_backward(node)), len(nodes))
    kept = on_host = work = 0
    calls, sent = Counter(), Counter()
    for place, node in enumerate(nodes):
        if place == boundary:
            kept, on_host = alive, sum(sizes[storage] for storage in host if last[storage] >= place)
        for storage, n_bytes in storages_of(node).items() if is_op(node) else ():
            if storage in inputs or storage in sizes:
                continue
            sizes[storage] = n_bytes
            if node.meta.get(ON_HOST):
                host.add(storage)
                continue
            alive += n_bytes
            ends.setdefault(last[storage], []).append(n_bytes)
        peak = max(peak, alive)
        alive -= sum(ends.pop(place, ()))
        if is_op(node):
            work += node_flops(node)
    for found in messages(graph):
        calls[found.collective] += 1
        sent[found.collective] += found.n_bytes
    return GraphSize(nodes=len(nodes), peak=peak, kept=kept, on_host=on_host, flops=work, calls=calls, sent=sent)


def last_uses(nodes: list[Node]) -> dict[int, int]:
    """The place of the last node that reads or makes each storage."""
    last: dict[int, int] = {}
    for place, node in enumerate(nodes):
        for each in (node, *node.all_input_nodes):
            last.update(dict.fromkeys(storages_of(each), place))
    return last


def node_flops(node: Node) -> int:
    """Operations of a product or of attention; 0 for all else."""
    if not hasattr(node.target, "overloadpacket"):
        return 0
    args, kwargs = values_of(node)
    return flops(node.target, args, kwargs, node.meta.get("val"))


def messages(graph: Graph) -> Iterator[Message]:
    """What the collectives of a graph make this rank send, in their order."""
    for node in filter(is_op, graph.nodes):
        if getattr(node.target, "namespace", None) == "_c10d_functional":
            args, _ = values_of(node)
            if (found := message(node.target, args, node.meta["val"])) is not None:
                yield found
