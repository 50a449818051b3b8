"""How a step's graph is made and run, as settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from core.step.settings import Compile

PassName = Literal["dead_code", "save_set", "offload", "merge_collectives", "prefetch"]


@dataclass(kw_only=True, slots=True)
class GraphCompile(Compile):
    """The step as one graph; `enable` compiles it, and without that it is interpreted, operation by operation."""

    passes: list[PassName] = field(default_factory=lambda: ["dead_code", "save_set"])
    """What changes the graph, in the order of this list of all: dead_code drops what nobody reads; save_set computes
    again in backward what activation_checkpoint does not save, and gathers blocks' weights again; offload keeps what
    blocks save in the host's memory; merge_collectives gathers and sums the weights of a block at once; prefetch starts
    gathers a block ahead and ends sums of gradients late."""
    fsdp: Literal["simple"] = "simple"
    """How ranks share weights: simple reads a weight through a gather, whose backward scatters its gradient."""
    regions: Literal["whole", "blocks"] = "whole"
    """With `enable`: Inductor gets the whole graph, or each block's forward and backward by itself."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from Compile.problems(self)
        if self.enable and self.backend != "inductor":
            yield (
                "backend",
                f"backend {self.backend} takes no graph that has its backward: use inductor, or unset enable",
            )
        if self.enable and self.components != ["model", "loss"]:
            yield "components", "a step's graph has the model and the loss: leave components at model loss"
        if doubled := {name for name in self.passes if self.passes.count(name) > 1}:
            yield "passes", f"{', '.join(sorted(doubled))} is named twice: a pass runs once"

    def takes(self, component: Literal["model", "loss"]) -> bool:
        """Neither part is compiled by itself."""
        return False

    def shows_blocks(self) -> bool:
        """Blocks run once, as they are traced."""
        return False
