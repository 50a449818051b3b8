"""What the commands do with a model of transformers: of a run, of a checkpoint, or of any folder of transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.evaluate.command import Evaluation
from core.generate.command import Generation
from core.generate.folder import allocate
from core.parallel.layout import SingleRank
from core.runtime.meta import meta_model
from core.weights.folder import is_published, load_weights
from core.weights.saved import newest
from hf_models.cached import CachedHFModel
from hf_models.folder import start_values
from hf_models.model import HFModel
from hf_models.trainer import fill


def loaded(config: HFModel.Config, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with the weights of a folder, in evaluation mode: what core asks of a decoder is there."""
    model: Any = meta_model(config)
    allocate(model, device, dtype)
    place = newest(folder)
    if is_published(place):
        fill(model, start_values(str(place), config.attention, "weights", 0), SingleRank(device))
    else:
        load_weights(model, folder)
    return model.eval()


class HFFolder:
    """What both commands do with a folder in another way than core."""

    models = HFModel.Config
    cached = CachedHFModel
    config: Any
    folder: Path
    device: torch.device
    dtype: torch.dtype

    def load(self, *, ragged: bool) -> Any:
        return loaded(self.config.model, self.folder, self.device, self.dtype)


class HFGeneration(HFFolder, Generation):
    """Text that a model of transformers writes after prompts."""

    @dataclass(kw_only=True, slots=True)
    class Config(Generation.Config):
        # pyrefly: ignore[bad-override] - what core asks of a decoder is there
        model: HFModel.Config = field(default_factory=HFModel.Config)
        """The folder that describes the model."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once


class HFEvaluation(HFFolder, Evaluation):
    """How good a model of transformers is."""

    @dataclass(kw_only=True, slots=True)
    class Config(Evaluation.Config):
        # pyrefly: ignore[bad-override] - what core asks of a decoder is there
        model: HFModel.Config = field(default_factory=HFModel.Config)
        """The folder that describes the model."""

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute] - assigned once
