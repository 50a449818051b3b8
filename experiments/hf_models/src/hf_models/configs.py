"""The recipes: a tiny model that needs no download, and any folder."""

from pathlib import Path

from core.config.derive import derive
from core.optim.adam import AdamW
from core.optim.schedule import Schedule
from core.step.settings import Training
from core.train.debug_run import debug_run
from hf_models.model import HFModel
from hf_models.trainer import HFTrainer

TINY = Path(__file__).parent / "debug"
"""A config.json of OLMo 2, which core has no model of."""


def hf_models_debug() -> HFTrainer.Config:
    """A small OLMo 2 of transformers that learns the standard library's text on a laptop's CPU in a few minutes."""
    model = HFModel.Config(path=str(TINY), start="random")
    return derive(debug_run(model), HFTrainer.Config)  # pyrefly: ignore[bad-argument-type] - it asks for no decoder


def hf_models() -> HFTrainer.Config:
    """Any causal language model of transformers: --model.path FOLDER --tokenizer.path FOLDER --dataloader.dataset."""
    return HFTrainer.Config(
        training=Training(steps=1000, seq_len=2048, local_batch_size=1),
        optimizer=AdamW.Config(lr=2e-5),
        lr_scheduler=Schedule.Config(warmup_steps=50),
    )
