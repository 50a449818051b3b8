"""Traces a step's forward, loss and backward together: one graph of PyTorch's operations, with flat inputs and outputs.

Nothing is taken from a closure: weights, buffers, the batch and its number of tokens are inputs. So a graph is right
for every batch of the same shapes, and an operation that writes to a buffer, as a router's counter does, writes to the
real one when the graph runs. Each node knows the block that it belongs to, the marks of
`core.activation_checkpoint.region`, and whether it is part of the backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg
from torch.fx.traceback import annotate, preserve_node_meta

BLOCK, PHASE, GATHER = "graph_trainer_block", "graph_trainer_phase", "graph_trainer_gather"

Step = Callable[[list[Tensor]], list[Tensor | None]]
"""From flat inputs to flat outputs; `backward_phase` is around what computes gradients."""


class Slots:
    """The places of a model that hold a weight or a buffer; one that is shared, as a tied weight is, is there once."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {weight: name for name, weight in model.named_parameters()}
        """Of the weights, in the order in which they are inputs of a graph, before the buffers."""
        self._places: dict[Tensor, list[tuple[dict[str, Any], str]]] = {weight: [] for weight in self.names}
        for kind in ("_parameters", "_buffers"):
            for module in model.modules():
                table = getattr(module, kind)
                for leaf, tensor in table.items():
                    if tensor is not None:
                        self._places.setdefault(tensor, []).append((table, leaf))

    def stored(self) -> list[Tensor]:
        """Weights, then buffers, as the model holds them; a buffer may be another tensor than at the last call."""
        return [places[0][0][places[0][1]] for places in self._places.values()]

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """While this runs, the model holds `tensors`, of any shape, in the places of the stored ones."""
        before = self.stored()
        self._put(tensors)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for places, tensor in zip(self._places.values(), tensors, strict=True):
            for table, leaf in places:
                table[leaf] = tensor


class Numbered(NamedTuple):
    """The gradient functions that autograd numbered from `first` up to `end` while a block ran forward."""

    first: int
    end: int
    block: str


@contextmanager
def blocks_named(blocks: nn.ModuleDict) -> Iterator[list[Numbered]]:
    """While this runs, what the blocks compute is traced with their numbers; what looks at their results is not.

    The list that the context has grows by an entry as a block has run; `backward_phase` needs it.
    """
    ran: list[Numbered] = []

    def named(number: str, forward: Callable) -> Callable:
        def inside(*args: Any, **kwargs: Any) -> Any:
            first = torch.autograd._get_sequence_nr()
            with annotate({BLOCK: number}):
                results = forward(*args, **kwargs)
            ran.append(Numbered(first, torch.autograd._get_sequence_nr(), number))
            return results

        return inside

    own = {number: (vars(block).get("forward"), dict(block._forward_hooks)) for number, block in blocks.items()}
    for number, block in blocks.items():
        block.forward = named(number, block.forward)
        block._forward_hooks.clear()
    try:
        yield ran
    finally:
        for number, block in blocks.items():
            block._forward_hooks.update(own[number][1])
            if (forward := own[number][0]) is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def backward_phase(loss: Tensor, ran: Sequence[Numbered] = ()) -> Iterator[None]:
    """While this runs, what computes gradients of `loss`, of any shape, is traced as backward, with the number of the
    block that the gradient is of; sums of gradients have that of the last one that they add. All that follows is
    backward."""
    with ExitStack() as now, annotate({PHASE: "backward"}):

        def begin(block: str | None) -> None:
            now.close()
            now.enter_context(annotate({BLOCK: block}))

        for function in gradient_functions(loss):
            number = function._sequence_nr()  # pyrefly: ignore[missing-attribute] - each has one
            block = next((each.block for each in ran if each.first <= number < each.end), None)
            function.register_prehook(lambda _, block=block: begin(block))
        try:
            yield
        finally:
            now.close()


def gradient_functions(loss: Tensor) -> list[Any]:
    """What autograd runs for the gradient of `loss`, of any shape."""
    found: dict[Any, None] = {}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in found:
            found[function] = None
            waiting += [each for each, _ in function.next_functions]
    return list(found)


def trace(step: Step, inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of `step` on tensors like `inputs`, each of any shape, which it is right for alone; they may be fake.

    Nothing is computed.
    """
    mode = detect_fake_mode(inputs)
    if mode is None:
        mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [each if isinstance(each, FakeTensor) else mode.from_tensor(each, static_shapes=True) for each in inputs]
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with mode, tracing(TracingContext(mode)), preserve_node_meta(), one_thread:
        module = make_fx(lambda *args: step(list(args)), record_stack_traces=False)(*fakes)
    module.graph.set_codegen(CodeGen())
    mark_phases(module.graph)
    module.recompile()
    return module


def mark_phases(graph: Graph) -> None:
    """Note in each node of a fresh trace its block, None outside of all, and whether it is backward."""
    backward = False
    for node in graph.nodes:
        custom = node.meta.get("custom", {})
        backward = backward or PHASE in custom
        node.meta[PHASE], node.meta[BLOCK] = backward, custom.get(BLOCK)
        node.meta[GATHER] = GATHER in custom and not backward


def is_backward(node: Node) -> bool:
    """Whether a node is part of the backward, the loss's own backward within the forward left out."""
    return node.meta.get(PHASE, False)


def is_op(node: Node) -> bool:
    """Whether a node is an operation, and no input, output or constant."""
    return node.op == "call_function"


def tensors_of(node: Node) -> list[Tensor]:
    """The fake tensors that a node returns."""
    value = node.meta.get("val")
    return [each for each in (value if isinstance(value, tuple | list) else [value]) if isinstance(each, Tensor)]


def storages_of(node: Node) -> dict[int, int]:
    """The storages that a node's tensors lie in, and their bytes."""
    found = (each.untyped_storage() for each in tensors_of(node))
    return {storage._cdata: storage.nbytes() for storage in found}


def values_of(node: Node) -> tuple[tuple, dict]:
    """The arguments of a node as fake tensors."""
    return map_arg((node.args, node.kwargs), lambda each: each.meta.get("val"))


def note_value(node: Node) -> None:
    """Note in a node that was added what it returns, as a fake tensor in a storage of its own or that it views."""
    args, kwargs = values_of(node)
    mode = detect_fake_mode((args, kwargs))
    assert mode is not None, f"{node} has no tensor among its arguments"
    assert callable(node.target), f"{node} is no operation"
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)
