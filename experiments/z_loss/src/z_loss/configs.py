"""The recipes: Qwen3's, with a z-loss."""

from core.config.derive import derive
from qwen3.configs import qwen3_0_6b, qwen3_debug
from z_loss.loss import ZLoss
from z_loss.trainer import ZLossTrainer


def z_loss_debug() -> ZLossTrainer.Config:
    """Qwen3's debug run with a z-loss, on a laptop's CPU in about two minutes."""
    return derive(qwen3_debug(), ZLossTrainer.Config, loss=ZLoss.Config(weight=1e-3))


def z_loss_qwen3_0_6b() -> ZLossTrainer.Config:
    """Qwen3 0.6B with the z-loss of PaLM."""
    return derive(qwen3_0_6b(), ZLossTrainer.Config, loss=ZLoss.Config())
