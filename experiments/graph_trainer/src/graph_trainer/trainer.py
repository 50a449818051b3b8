"""The run of this experiment: a training step is one graph."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from core.parallel.layout import Wrapping
from core.parallel.settings import Parallelism
from core.step.loss import Loss
from core.train.trainer import Trainer
from graph_trainer.fsdp import share_weights
from graph_trainer.objective import GraphObjective
from graph_trainer.settings import GraphCompile
from graph_trainer.wrapping import GraphWrapping, lets_go


class GraphTrainer(Trainer):
    """A training run whose forward, loss and backward are one graph; the update and all else are as in any run."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        # pyrefly: ignore[bad-override-mutable-attribute] - this run has no other
        compile: GraphCompile = field(default_factory=GraphCompile)
        """How the step's graph is made and run."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from Trainer.Config.problems(self)
            yield from layout_problems(self.parallelism)
            mode, passes = self.activation_checkpoint.mode, self.compile.passes
            if mode == "memory_budget":
                yield "activation_checkpoint.mode", "memory_budget is torch.compile's: use none, selective or full"
            elif mode != "none" and "save_set" not in passes:
                yield "compile.passes", f"activation_checkpoint.mode {mode} is the work of the pass save_set: add it"
            if self.activation_checkpoint.debug:
                yield "activation_checkpoint.debug", "the log says what the pass save_set saves: leave debug out"
            if self.optimizer.in_backward:
                yield "optimizer.in_backward", "a graph returns all gradients at once: unset in_backward"
            if self.converters:
                yield "converters", "no layer of a graph was compared with a converted one: leave converters out"
            if self.profiling.enable_memory_snapshot:
                path = "profiling.enable_memory_snapshot"
                yield path, "a graph does not say for which part a tensor is: unset it, its log has peaks"
            if self.debug.detect_anomaly:
                yield "debug.detect_anomaly", "a graph's operations have no traceback: train without graph_trainer"

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once, by Trainer

    @staticmethod
    def plan(config: Any, *, world_size: int | None, rank: int) -> Any:
        from graph_trainer.plan import plan  # loads much that a run does without

        return plan(config, config.compile, world_size=world_size, rank=rank)

    def wrapping(self) -> Wrapping:
        self.around = GraphWrapping(self.config.activation_checkpoint, self.folder)
        return replace(super().wrapping(), checkpoint=self.around.read, share_weights=share_weights)

    def make_objective(self, loss: Loss, **settings: Any) -> GraphObjective:
        return GraphObjective(
            self.built.models,
            loss,
            graphs=self.config.compile,
            policies=self.around.policies,
            let_go=lets_go(self.config.parallelism),
            **settings,
        )


def layout_problems(parallelism: Parallelism) -> Iterator[tuple[str, str]]:
    """Layouts that no graph was compared in."""
    for axis in ("pipeline", "expert", "context"):
        if (degree := parallelism[f"{axis}_parallel_degree"]) > 1:
            path = f"parallelism.{axis}_parallel_degree"
            yield (
                path,
                f"{axis}_parallel_degree {degree}: a step's graph is of one stage, whole rows and all experts: use 1",
            )
    if parallelism.data_parallel_replicate_degree > 1:
        path, n = "parallelism.data_parallel_replicate_degree", parallelism.data_parallel_replicate_degree
        yield path, f"data_parallel_replicate_degree {n}: simple FSDP shares weights among all data ranks: use 1"
    if parallelism.cpu_offload:
        yield "parallelism.cpu_offload", "a graph's inputs lie on its device: unset cpu_offload"
    if parallelism.enable_async_tensor_parallel:
        yield "parallelism.enable_async_tensor_parallel", "it is the work of torch.compile's blocks: unset it"
