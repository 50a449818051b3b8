"""The recipes: Qwen3's decoders with a tower of SigLIP's."""

from typing import Any

from core.config.derive import derive
from core.optim.groups import Group
from core.train.trainer import Trainer
from qwen3.configs import qwen3_0_6b, qwen3_debug
from vlm.image_text import ImageText
from vlm.model import VLM
from vlm.trainer import VLMTrainer
from vlm.vision import Vision


def seeing(run: Trainer.Config, vision: Vision.Config, **changes: Any) -> VLMTrainer.Config:
    """The configuration of a run whose decoder gets a tower, and data with images of the tower's size."""
    data = ImageText.Config(image_size=vision.image_size, n_patches=vision.n_patches)
    model: Any = VLM.Config(decoder=run.model, vision=vision)
    return derive(run, VLMTrainer.Config, **{"model": model, "dataloader": data} | changes)


def vlm_debug() -> VLMTrainer.Config:
    """A small Qwen3 that learns to say which shape is drawn where, in a few minutes on a laptop's CPU."""
    tower = Vision.Config(dim=64, n_layers=2, n_heads=4, hidden_dim=256, image_size=32, patch_size=8, init_std=0.05)
    config = seeing(qwen3_debug(), tower)
    config.model.decoder.dim, config.model.decoder.n_layers = 96, 2
    config.training.steps, config.training.seq_len, config.training.local_batch_size = 1200, 40, 32
    config.model.projector.init_std = 0.05
    config.optimizer.lr = 3e-3
    config.validator.steps = 4
    return config


def vlm_qwen3_0_6b() -> VLMTrainer.Config:
    """Qwen3 0.6B with a tower of the size of SigLIP base (patch 16, 224 pixels), which stays as it is."""
    tower = Vision.Config(dim=768, n_layers=12, n_heads=12, hidden_dim=3072, image_size=224, patch_size=16)
    config = seeing(qwen3_0_6b(), tower)
    config.training.seq_len = 512
    config.optimizer.groups = [Group(pattern="vision.*", frozen=True)]
    return config
