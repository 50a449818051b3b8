"""Numbers of single layers: what a step does to each part of a model."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.nn.balance import routers
from core.nn.decoder import Decoder
from core.parallel.layout import RankView
from core.step.update import StepInfo
from core.train.attention_logits import watched_logits

NO_LAYERS = ("tok_embeddings", "norm", "output")
"""The parts of a decoder that are no layers."""


class LayerNumbers:
    """Measures steps of the models, or stages, of this rank; every rank must measure the same steps.

    Numbers are named by what they are and the part: `weight_norm/layers.3`. Norms are of a part's weights after the
    step, of their gradients after clipping, and of what the update changed; `activation_rms` is that of the residual
    stream behind a block, over the tokens of the step; `attention_max_logit` is the largest of a step, sinks left out;
    `router_entropy` is that of the experts' shares of a step's tokens, 1 where all are alike.
    """

    def __init__(self, models: Sequence[Decoder], layout: RankView, *, activations: bool) -> None:
        """`activations`, and with them logits, need a look into a forward, which torch.compile does not allow."""
        self.models, self.layout, self.activations = list(models), layout, activations
        config = self.models[0].config
        layers = [f"layers.{i}" for i in range(config.n_layers + config.n_mtp_layers)]
        self.parts = list(dict.fromkeys([*NO_LAYERS, *layers, *(part for part, _ in self._weights())]))

    def measured(self, take: Callable[[], StepInfo]) -> tuple[StepInfo, dict[str, float]]:
        """What a step returns, and its numbers; its weights are there a second time meanwhile."""
        weights = [(part, weight) for part, weight in self._weights() if weight.is_floating_point()]
        before = [weight.detach().clone() for _, weight in weights]
        squares: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
        logits: dict[str, list[Tensor]] = {}
        with ExitStack() as watching:
            if self.activations:
                watching.enter_context(self._watching(squares))
                logits = watching.enter_context(watched_logits(self.models))
            info = take()
        with torch.no_grad():
            kinds = {
                "weight_norm": [(part, weight.detach()) for part, weight in weights],
                "gradient_norm": [(part, weight.grad) for part, weight in weights if weight.grad is not None],
                "update_norm": [
                    (part, weight.detach() - old) for (part, weight), old in zip(weights, before, strict=True)
                ],
            }
            numbers = {name: norm for kind, tensors in kinds.items() for name, norm in self._norms(kind, tensors)}
        return info, numbers | dict(self._rms(squares)) | dict(self._logits(logits)) | self._entropies()

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of this rank, each with its part: its block, whatever names its model has, or else its name's."""
        for model in self.models:
            of_blocks = {weight: f"layers.{i}" for i, block in model.layers.items() for weight in block.parameters()}
            yield from ((of_blocks.get(each, part_of(name)), each) for name, each in model.named_parameters())

    def _norms(self, kind: str, tensors: list[tuple[str, Any]]) -> Iterator[tuple[str, float]]:
        found = dict.fromkeys(self.parts, 0.0)
        squares = self.layout.squared_norms([tensor for _, tensor in tensors]).tolist() if tensors else []
        for (part, _), square in zip(tensors, squares, strict=True):
            found[part] += square
        for part, square in zip(found, self.layout.sums(*found.values()), strict=True):
            if square:
                yield f"{kind}/{part}", math.sqrt(square)

    @contextmanager
    def _watching(self, squares: dict[str, list[tuple[Tensor, int]]]) -> Iterator[None]:
        """While this runs, blocks add the squares and the count of what they return, of any shape."""
        with ExitStack() as hooks:
            for model in self.models:
                for number, block in model.layers.items():

                    def watch(block: nn.Module, args: Any, x_BLD: Tensor, part: str = f"layers.{number}") -> None:
                        norm = torch.linalg.vector_norm(x_BLD.detach(), dtype=torch.float32)
                        squares[part].append((norm.square(), x_BLD.numel()))

                    hooks.callback(block.register_forward_hook(watch).remove)
            yield

    def _rms(self, squares: dict[str, list[tuple[Tensor, int]]]) -> Iterator[tuple[str, float]]:
        if not self.activations:
            return
        sums = [float(sum(square for square, _ in squares[part])) for part in self.parts]
        counts = [float(sum(n for _, n in squares[part])) for part in self.parts]
        totals = self.layout.sums(*sums, *counts)
        for part, total, count in zip(self.parts, totals, totals[len(sums) :], strict=False):
            if count:
                yield f"activation_rms/{part}", math.sqrt(total / count)

    def _logits(self, found: dict[str, list[Tensor]]) -> Iterator[tuple[str, float]]:
        if not self.activations:
            return
        own = [float(torch.stack(found[part]).amax()) if found.get(part) else -math.inf for part in self.parts]
        for part, largest in zip(self.parts, self.layout.maxima(*own), strict=True):
            if largest > -math.inf:
                yield f"attention_max_logit/{part}", largest

    def _entropies(self) -> dict[str, float]:
        own = {
            f"router_entropy/{name.removesuffix('.moe.router')}": load_entropy(router.tokens_E)
            for model in self.models
            for name, router in routers(model).items()
        }
        return self.layout.join(own)


def part_of(name: str) -> str:
    """The part of a decoder that the weight of this name is in; what joins a further prediction is its layer's."""
    first, _, rest = name.partition(".")
    return f"layers.{rest.partition('.')[0]}" if first in ("layers", "ahead") else first


def load_entropy(tokens_E: Tensor) -> float:
    """The entropy of the shares of tokens (E,) that experts got, as a share of the largest; 1 for a single expert."""
    share_E = tokens_E.double() / tokens_E.sum()
    entropy = -torch.special.xlogy(share_E, share_E).sum()
    return float(entropy) / math.log(len(tokens_E)) if len(tokens_E) > 1 else 1.0
