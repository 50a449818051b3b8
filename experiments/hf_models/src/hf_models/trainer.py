"""The run of this experiment: any causal language model of transformers, trained by core."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.parallel.layout import RankView
from core.train.outcome import RunResult
from core.train.trainer import Trainer
from hf_models.folder import folder_problem, keeps_documents_apart, start_values, tokenizer_in
from hf_models.model import HFModel

log = logging.getLogger("armature")

REFUSED = {
    "tensor_parallel_degree": "it cuts weights by the names of their axes, which modules of transformers do not state",
    "context_parallel_degree": "attention in transformers sees the tokens of one rank alone",
    "expert_parallel_degree": "experts in transformers are computed where their tokens are",
    "pipeline_parallel_degree": "models of transformers run from the embedding to the head",
}
"""Degrees that must be 1, and why."""


class HFTrainer(Trainer):
    """A training run of a model of transformers: data, loss, optimizer, checkpointing of activations, FSDP, compilation
    and checkpoints are core's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        # pyrefly: ignore[bad-override] - what core asks of a decoder is there
        model: HFModel.Config = field(default_factory=HFModel.Config)
        """The folder of the model, and what it starts with."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if folder_problem(self.model.path):
                return  # the model says so
            yield from super().problems()
            for name, reason in REFUSED.items():
                if (degree := getattr(self.parallelism, name)) > 1:
                    yield f"parallelism.{name}", f"{name} {degree} with a model of transformers: {reason}; set it to 1"
            if self.converters:
                yield (
                    "converters",
                    "converters change layers of core, and a model of transformers has none: leave it out",
                )
            if self.checkpoint.last_save_in_hf:
                message = "last_save_in_hf is for models of core: leave it out, and use python -m hf_models.convert"
                yield "checkpoint.last_save_in_hf", message
            if self.training.mask_of(self.dataloader) == "document" and not keeps_documents_apart(
                self.model.path, self.model.attention
            ):
                message = (
                    "this model of transformers does not keep documents of a row apart: use --training.mask causal"
                )
                yield "training.mask", message
            if self.tokenizer.path is None and tokenizer_in(self.model.path):
                message = f"the model has a tokenizer of its own: add --tokenizer.path {self.model.path}"
                yield "tokenizer.path", message

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Trainer

    @staticmethod
    def plan(config: Any, *, world_size: int | None, rank: int) -> Any:
        """What a step takes: planned with the model of transformers, block by block."""
        from core.plan.plan import plan  # loads much that a run does without

        return plan(config, world_size=world_size, rank=rank)

    def _start_model(self) -> None:
        super()._start_model()
        if self.checkpoints.found is None or "model" in self.config.checkpoint.exclude_from_loading:
            model, seed = self.config.model, self.config.debug.seed
            values = start_values(model.path, model.attention, model.start, seed)
            for part in self.built.models:
                fill(part, values, self.layout)

    def run(self) -> RunResult:
        result = super().run()
        if self.layout.is_first and (saved := self.checkpoints.last_saved()) is not None:
            place = f"{result.folder}/hf-{saved.manifest.progress.step}"
            log.info(f"# export to a folder of transformers\npython -m hf_models.convert to-hf {result.folder} {place}")
        return result


@torch.no_grad()
def fill(model: torch.nn.Module, values: Mapping[str, Tensor], layout: RankView) -> None:
    """Give weights and kept buffers of a model, as far as they lie on this rank, these values of any shape."""
    for name, weight in model.named_parameters():
        piece = layout.local_slice(weight)
        piece.value.copy_(piece.of(values[name]))
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])
