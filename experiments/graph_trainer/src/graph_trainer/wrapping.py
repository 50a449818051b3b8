"""What stands around the blocks of a model whose steps are graphs: nothing but a look at their policies."""

from pathlib import Path

import torch

from core.activation_checkpoint.apply import ActivationCheckpoint, Layered
from core.activation_checkpoint.policy import Policy
from core.comm.backend import dispatchers
from core.config.errors import UserError
from core.nn.decoder import Decoder
from core.parallel.layout import Wrapping
from core.parallel.settings import Parallelism
from graph_trainer.fsdp import share_weights


class GraphWrapping:
    """Reads the policies of a model's blocks while the model is spread over ranks; `policies` has them then."""

    def __init__(self, settings: ActivationCheckpoint.Config, folder: Path = Path()) -> None:
        self.checkpoint = settings.build(folder=folder)
        self.policies: dict[str, Policy] = {}

    def read(self, model: Layered) -> None:
        """Find the policies of the blocks of `model`, and mark modules that are recomputed by name.

        Raises `UserError` for another stack of blocks beside the decoder's, such as a tower's.
        """
        if not isinstance(model, Decoder):
            kind = type(model).__name__
            raise UserError(f"a graph knows a decoder's blocks, not those of a {kind}: train without graph_trainer")
        self.policies.update(self.checkpoint.policies(model))

    def wrapping(self, compute_dtype: torch.dtype) -> Wrapping:
        """For a model whose experts all lie on every rank."""
        dispatcher = dispatchers("standard", torch.device("cpu"))
        settings = {"checkpoint": self.read, "share_weights": share_weights}
        return Wrapping(compute_dtype=compute_dtype, dispatcher=dispatcher, **settings)


def lets_go(parallelism: Parallelism) -> bool:
    """Whether blocks let their gathered weights go after forward."""
    return parallelism.fsdp_reshard_after_forward != "never"
