"""The save set in a graph: core's policy decides for each node, and what it does not save is computed again.

The policy is asked what it is asked in eager training: the operations of a block in their order, with the marks that
modules set. A node that it recomputes is copied in front of the first node of the backward that reads it, with all that
it needs; the forward's result is freed where the forward has done with it. Five kinds of nodes are saved whatever the
policy says:

* what a block returns, which is the next one's input;
* what shares storage with a tensor that some operation writes to: a copy would lack the write, and gradients would be
  wrong without an error (PyTorch 2.13's own pass loses such writes);
* what reads such a storage before a later write: a copy would read it after;
* what draws random numbers: a copy would draw others;
* what is no computation of a block: embedding, masks, head and loss.

Gathered weights are the other way round: a block's are gathered again in its backward in every mode if they are let go.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from operator import getitem
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.traceback import annotate
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from core.activation_checkpoint.policy import Policy, weight_shape
from graph_trainer.trace import BLOCK, GATHER, PHASE, is_backward, is_op, note_value, storages_of, values_of

RECOMPUTE, RECOMPUTED = "graph_trainer_recompute", "graph_trainer_recomputed"


class Decision(NamedTuple):
    """What the policy said of one operation of a block."""

    op: str
    shape: tuple[int, int] | None
    """(in, out) of the weight of a matrix product; None for any other operation."""
    saved: bool


def tag(graph: Graph, policies: Mapping[str, Policy], *, let_go: bool) -> dict[str, list[Decision]]:
    """Note in each node of the forward whether backward computes it again; returns what the policy said, by block.

    `policies` are those of the blocks that are checkpointed. `let_go` is whether gathered weights are.
    """
    decided = {number: list(decide(graph, number, policy)) for number, policy in policies.items()}
    if let_go:
        tag_gathers(graph)
    tag_views(graph)
    for node in list(must_save(graph)):
        for each in (node, *node.all_input_nodes[: node.target is getitem]):
            each.meta[RECOMPUTE] = False
    tag_results(graph)
    return decided


def decide(graph: Graph, number: str, policy: Policy) -> Iterator[Decision]:
    """Tag the nodes of a block as the policy says."""
    forward, _ = policy()
    for node in graph.nodes:
        if is_backward(node) or not is_op(node) or node.meta[BLOCK] != number:
            continue
        if not isinstance(
            node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator
        ):  # one of several results
            node.meta[RECOMPUTE] = node.all_input_nodes[0].meta.get(RECOMPUTE, False)
            continue
        args, kwargs = values_of(node)
        context = SelectiveCheckpointContext(is_recompute=False)
        context.op_output = node.meta.get("val")
        with annotate(node.meta["custom"]) if "custom" in node.meta else nullcontext():
            saved = forward.policy_fn(context, node.target, *args, **kwargs) is CheckpointPolicy.MUST_SAVE
        node.meta[RECOMPUTE] = not saved
        yield Decision(str(node.target), weight_shape(node.target, args), saved)


def tag_gathers(graph: Graph) -> None:
    """Have blocks gather their weights again: the gathers, and the views of what they return."""
    gathered: set[int] = set()
    for node in graph.nodes:
        if is_backward(node) or not is_op(node) or node.meta[BLOCK] is None:
            continue
        if node.meta[GATHER]:
            gathered.update(storages_of(node))
        if node.meta[GATHER] or gathered & storages_of(node).keys():
            node.meta[RECOMPUTE] = True


def tag_views(graph: Graph) -> None:
    """Have backward make views of what blocks save by itself: they are no memory, and what is saved has one name."""
    seen: set[int] = set()
    for node in graph.nodes:
        if is_op(node) and not is_backward(node) and node.target is not getitem:
            storages = storages_of(node).keys()
            if storages and storages <= seen and node.meta.get(BLOCK) is not None:
                node.meta[RECOMPUTE] = True
            seen.update(storages)
    tag_results(graph)


def tag_results(graph: Graph) -> None:
    """Have each of several results share the fate of the operation: no tuple crosses from forward to backward."""
    for node in graph.nodes:
        if node.target is getitem and not is_backward(node):
            node.meta[RECOMPUTE] = node.all_input_nodes[0].meta.get(RECOMPUTE, False)


def must_save(graph: Graph) -> Iterator[Node]:
    """Nodes that no copy may stand for."""
    written = last_writes(graph.nodes)
    for place, node in enumerate(graph.nodes):
        if not node.meta.get(RECOMPUTE):
            continue
        own = storages_of(node).keys()
        read = {storage for each in node.all_input_nodes for storage in storages_of(each)}
        later = any(written.get(storage, -1) >= place for storage in read)
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        leaves = any(not is_backward(user) and user.meta.get(BLOCK) != node.meta[BLOCK] for user in node.users)
        if own & written.keys() or later or drawn or leaves:
            yield node


def last_writes(nodes: Iterable[Node]) -> dict[int, int]:
    """The storages that an operation writes to, and the place of the last one that does."""
    places = enumerate(nodes)
    return {storage: place for place, node in places for each in written_by(node) for storage in storages_of(each)}


def written_by(node: Node) -> Iterator[Node]:
    """The arguments that an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[place] if place < len(node.args) else None)
            yield from (
                each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Node)
            )


def recompute(module: GraphModule) -> int:
    """Have the backward compute again what is tagged; returns the number of nodes that it does."""
    graph = module.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    copies: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if not is_backward(node):
            continue
        for needed in sorted(needed_again(node, copies), key=order.__getitem__):
            with graph.inserting_before(node):
                copy = graph.node_copy(needed, lambda each: copies.get(each, each))
            copy.meta = {**needed.meta, PHASE: True, RECOMPUTED: True, RECOMPUTE: False}
            note_value(copy)
            copies[needed] = copy
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda each: copies.get(each, each))
    graph.eliminate_dead_code(is_effect)
    module.recompile()
    return sum(RECOMPUTED in node.meta for node in graph.nodes)


def needed_again(node: Node, copies: Mapping[Node, Node]) -> set[Node]:
    """What must be computed again for a node of the backward and has no copy yet."""
    found: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each.meta.get(RECOMPUTE) and each not in copies and each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


def is_effect(node: Node) -> bool:
    """Whether a node does something besides its result; a collective does not: all ranks leave it out alike."""
    return getattr(node.target, "namespace", None) != "_c10d_functional" and node.is_impure()


def products_of(decided: Mapping[str, list[Decision]]) -> dict[str, list[Decision]]:
    """The matrix products among decisions, by block."""
    return {number: [each for each in found if each.shape is not None] for number, found in decided.items()}
