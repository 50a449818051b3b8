"""A step's graph compiled by Inductor: whole, or each block's forward and backward by itself.

What is computed again stands in the graph as nodes of its own, so graphs of two save sets differ, and the caches of
Inductor keep them apart: it does not look at tags.
"""

import time
from collections.abc import Callable
from logging import getLogger
from operator import getitem
from typing import Any, Literal

from torch import Tensor, nn
from torch._inductor import standalone_compile
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from graph_trainer.trace import BLOCK, is_backward, is_op

log = getLogger("armature")


class CompiledPart(nn.Module):
    """A part of a graph that Inductor compiled: takes and returns what the part did."""

    def __init__(self, part: GraphModule) -> None:
        super().__init__()
        (output,) = part.graph.find_nodes(op="output")
        self.single = isinstance(output.args[0], Node)
        if self.single:
            output.args = ((output.args[0],),)
            part.recompile()
        self.code = by_inductor(part)

    def forward(self, *tensors: Tensor) -> Any:
        found = self.code(*tensors)
        return found[0] if self.single else found


def compiled(module: GraphModule, regions: Literal["whole", "blocks"]) -> Callable[..., list[Any]]:
    """What computes the graph; the time that compiling took is logged."""
    began = time.perf_counter()
    if regions == "whole":
        call, n_parts = by_inductor(module), 1
    else:
        call = split_by_block(module)
        parts = {name: part for name, part in call.named_children() if isinstance(part, GraphModule) and of_block(part)}
        for name, part in parts.items():
            setattr(call, name, CompiledPart(part))
        n_parts = len(parts)
    log.info(f"graph compiled in {n_parts} parts: {time.perf_counter() - began:.1f} s")
    return call


def by_inductor(module: GraphModule) -> Callable[..., Any]:
    """A graph compiled for inputs like those that it was traced with."""
    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    return standalone_compile(module, examples, dynamic_shapes="from_graph")


def of_block(part: GraphModule) -> bool:
    return any(is_op(node) and node.meta.get(BLOCK) is not None for node in part.graph.nodes)


def split_by_block(module: GraphModule) -> GraphModule:
    """The graph as parts in their order: nodes of one block and phase that follow each other, and what is between."""
    for node in reversed(module.graph.find_nodes(op="call_function", target=getitem)):
        node.all_input_nodes[0].append(node)  # a part returns tensors, and no tuple of them
    part_of: dict[Node, int] = {}
    number, before = 0, None
    for node in module.graph.nodes:
        kind = (node.meta.get(BLOCK), is_backward(node))
        number, before = number + (kind != before), kind
        part_of[node] = number
    return split_module(module, module, part_of.__getitem__, keep_original_order=True)
