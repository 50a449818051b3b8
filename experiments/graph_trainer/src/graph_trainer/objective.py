"""The loss of batches and its gradient, by a graph for each shape of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from core.activation_checkpoint.policy import Policy
from core.data.packing import Batch
from core.nn.decoder import Decoder
from core.nn.kernel import Positions
from core.optim.weight import local_tensor
from core.parallel.pipeline import Microbatch
from core.step.loss import Loss
from core.step.objective import Objective
from core.step.source_losses import Tally
from graph_trainer.fsdp import spread_like
from graph_trainer.passes import Prepared, prepare
from graph_trainer.settings import GraphCompile
from graph_trainer.trace import Slots, backward_phase, blocks_named, trace


class TokenCount:
    """A number of tokens that a weight is divided by, as an input of a graph: a tensor () in fp64.

    The quotient is what Python's division would be, in fp32: a number beside fp32 tensors is rounded to that.
    """

    def __init__(self, count: Tensor) -> None:
        self.count = count

    def __rtruediv__(self, weight: float) -> Tensor:
        return (weight / self.count).float()


class GraphObjective(Objective):
    """An `Objective` whose steps are graphs; validation runs the model as it is.

    All tokens of a batch are inputs of the loss, those without a label as well: how many have one is no shape.
    """

    def __init__(
        self,
        stages: list[Decoder],
        loss: Loss,
        *,
        graphs: GraphCompile,
        policies: Mapping[str, Policy],
        let_go: bool,
        **settings: Any,
    ) -> None:
        """`policies` are those of the blocks that are checkpointed, `let_go` is whether gathered weights are."""
        super().__init__(stages, loss, **settings)
        self.graphs, self.policies, self.let_go = graphs, policies, let_go
        (model,) = stages
        self.slots = Slots(model)
        self.prepared: dict[Any, Prepared] = {}
        """The graphs of this run, by what their inputs are like."""

    def accumulate(
        self, batches: Sequence[Batch], n_valid: float, tallies: Sequence[Tally] = ()
    ) -> tuple[float, float]:
        sums = torch.zeros(2, device=self.layout.device)
        for number, batch in enumerate(batches):
            microbatch = self.layout.to_rank_tokens(batch, documents=self.mask == "document")
            microbatch = microbatch._replace(n_labels=microbatch.labels_BL.numel())
            tally = tallies[number] if tallies else None
            main, total, *gradients = self.run(microbatch, n_valid, tally)
            self._add(gradients)
            sums += torch.stack((main, total))
        main, total = sums.tolist()
        return main, total

    def run(self, batch: Microbatch, n_valid: float, tally: Tally | None = None) -> list[Tensor]:
        """The main and the total loss of a microbatch, divided by `n_valid`, and this rank's gradients of all weights,
        by a graph that is made for batches like this one."""
        inputs = self.inputs(batch, n_valid, tally)
        key = tuple((each.shape, each.stride(), each.dtype, each.requires_grad) for each in inputs)
        key = (key, tuple(part is None for part in batch.positions.tensors), tuple(batch.inputs), tally is None)
        if key not in self.prepared:
            self.prepared[key] = self._prepare(batch, tally, inputs)
        with torch.no_grad():
            return self.prepared[key].call(*(each.detach() for each in inputs))

    def inputs(self, batch: Microbatch, n_valid: float, tally: Tally | None) -> list[Tensor]:
        """What a graph is called with: the pieces of weights, buffers, the number of tokens, and the batch."""
        stored = [local_tensor(each).detach().requires_grad_(each.requires_grad) for each in self.slots.stored()]
        count = torch.tensor(n_valid, dtype=torch.float64, device=self.layout.device)
        positions = [part for part in batch.positions.tensors if part is not None]
        return [*stored, count, batch.tokens_BL, batch.labels_BL, *positions, *batch.inputs.values(), *(tally or ())]

    def trace(self, batch: Microbatch, tally: Tally | None, inputs: list[Tensor]) -> torch.fx.GraphModule:
        """The graph of the loss and its gradient, as it is traced, for `inputs` like these, each of any shape."""
        (model,) = self.stages
        n_stored, n_weights = len(self.slots.stored()), len(self.slots.names)

        def step(tensors: list[Tensor]) -> list[Tensor | None]:
            stored, (count, tokens_BL, labels_BL, *rest) = tensors[:n_stored], tensors[n_stored:]
            given = iter(rest)
            positions: Any = (None if part is None else next(given) for part in batch.positions.tensors)
            microbatch = Microbatch(tokens_BL, labels_BL, Positions(*positions), batch.n_labels)
            microbatch = microbatch._replace(inputs={name: next(given) for name in batch.inputs})
            own = None if tally is None else Tally(*given)
            with self.slots.holding(stored):
                main, total = self._loss(microbatch, cast(float, TokenCount(count)), own)
                weights = stored[:n_weights]
                asked = [weight for weight in weights if weight.requires_grad]
                with backward_phase(total, ran):
                    found = iter(torch.autograd.grad(total, asked, allow_unused=True))
                    gradients = [next(found) if weight.requires_grad else None for weight in weights]
                    return [main.detach(), total.detach(), *gradients]

        with blocks_named(model.layers) as ran:
            return trace(step, inputs)

    def _loss(self, batch: Microbatch, n_valid: float, tally: Tally | None) -> tuple[Tensor, Tensor]:
        (model,) = self.stages
        with self.precision():
            losses = model(batch.tokens_BL, batch.positions, self.reader(batch, n_valid, tally), **batch.inputs)
            if isinstance(losses, Tensor):
                return losses, losses
            total = losses.main
            for loss in losses.further:
                total = total + loss
            return losses.main, total

    def _prepare(self, batch: Microbatch, tally: Tally | None, inputs: list[Tensor]) -> Prepared:
        module = self.trace(batch, tally, inputs)
        return prepare(module, self.graphs, self.policies, list(self.slots.names.values()), let_go=self.let_go)

    @torch.no_grad()
    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add what a graph returns to the gradients of the weights."""
        seen: set[int] = set()
        for weight, gradient in zip(self.slots.names, gradients, strict=True):
            if gradient is None:
                continue
            if weight.grad is not None:
                local_tensor(weight.grad).add_(gradient)
                continue
            place = gradient.data_ptr()  # slices of a merged message are no copies of each other
            if place in seen or not gradient.is_contiguous():  # it is scaled in place afterwards
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            seen.add(place)
            weight.grad = spread_like(gradient, weight)
