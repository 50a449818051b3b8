"""Qwen3's recipes: each is a function that returns the whole configuration of a run."""

from core.optim.adam import AdamW
from core.optim.muon import Muon
from core.optim.schedule import Schedule
from core.quantization.float8 import Float8LinearConverter
from core.quantization.microscaling import FP4LinearConverter
from core.step.settings import Training
from core.train.debug_run import debug_run
from core.train.metrics import Metrics
from core.train.trainer import Trainer
from qwen3.model import size


def qwen3_debug() -> Trainer.Config:
    """A small Qwen3 that learns the standard library's text on a laptop's CPU in about two minutes."""
    return debug_run(size("debug"))


def qwen3_debug_float8() -> Trainer.Config:
    """`qwen3_debug` with products of 8 bits, which plain arithmetic emulates: on a CPU slower, and as good."""
    config = qwen3_debug()
    config.converters = [Float8LinearConverter.Config(emulate=True)]
    return config


def qwen3_debug_muon() -> Trainer.Config:
    """`qwen3_debug` with Muon: in 300 steps further than AdamW in 400 (validation loss 4.03 and 4.63)."""
    config = qwen3_debug()
    config.optimizer = Muon.Config(lr=8e-3, companion=AdamW.Config(lr=4e-3))
    config.training.steps = 300
    return config


def qwen3_debug_nvfp4() -> Trainer.Config:
    """`qwen3_debug` with products of 4 bits by the published recipe for NVFP4 (arXiv:2509.25149), emulated."""
    config = qwen3_debug()
    settings = {"random_hadamard": True, "square_weight_blocks": True}
    config.converters = [FP4LinearConverter.Config(emulate=True, filter_fqns=["layers.3."], **settings)]
    return config


def qwen3_0_6b() -> Trainer.Config:
    """Qwen3 0.6B."""
    return Trainer.Config(
        model=size("0.6B"),
        training=Training(steps=10, seq_len=4096, local_batch_size=4),
        optimizer=AdamW.Config(lr=3e-4),
        lr_scheduler=Schedule.Config(warmup_steps=2),
        metrics=Metrics.Config(log_freq=1),
    )


def qwen3_1_7b() -> Trainer.Config:
    """Qwen3 1.7B."""
    config = qwen3_0_6b()
    config.model = size("1.7B")
    config.training.steps = 100
    config.optimizer.lr = 8e-4
    config.lr_scheduler.warmup_steps = 20
    config.metrics.log_freq = 10
    config.checkpoint.interval = 50
    return config


def qwen3_4b() -> Trainer.Config:
    """Qwen3 4B."""
    config = qwen3_1_7b()
    config.model = size("4B")
    config.training.steps = 3000
    config.lr_scheduler.warmup_steps = 600
    config.checkpoint.interval = 500
    return config


def qwen3_8b() -> Trainer.Config:
    """Qwen3 8B."""
    config = qwen3_4b()
    config.model = size("8B")
    return config


def qwen3_14b() -> Trainer.Config:
    """Qwen3 14B."""
    config = qwen3_8b()
    config.model = size("14B")
    config.activation_checkpoint.mode = "full"
    return config


def qwen3_32b() -> Trainer.Config:
    """Qwen3 32B."""
    config = qwen3_14b()
    config.model = size("32B")
    config.training.local_batch_size = 2
    return config


def qwen3_moe_debug() -> Trainer.Config:
    """A small Qwen3 with experts that learns the standard library's text on a laptop's CPU in about two minutes."""
    return debug_run(size("moe_debug"))


def qwen3_30b_a3b() -> Trainer.Config:
    """Qwen3 30B, of which a token uses 3B."""
    config = qwen3_32b()
    config.model = size("30B-A3B")
    return config


def qwen3_235b_a22b() -> Trainer.Config:
    """Qwen3 235B, of which a token uses 22B."""
    config = qwen3_30b_a3b()
    config.model = size("235B-A22B")
    return config
