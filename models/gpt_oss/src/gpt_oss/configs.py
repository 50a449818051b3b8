"""GPT-OSS's recipes: each is a function that returns the whole configuration of a run."""

from core.optim.adam import AdamW
from core.optim.schedule import Schedule
from core.quantization.float8 import Float8LinearConverter
from core.step.settings import Training
from core.train.debug_run import debug_run
from core.train.trainer import Trainer
from gpt_oss.model import size


def gpt_oss_debug() -> Trainer.Config:
    """A small GPT-OSS that learns the standard library's text on a laptop's CPU in about three minutes."""
    return debug_run(size("debug"))


def gpt_oss_debug_float8() -> Trainer.Config:
    """`gpt_oss_debug` with products of 8 bits, which plain arithmetic emulates: on a CPU slower, and as good."""
    config = gpt_oss_debug()
    config.converters = [Float8LinearConverter.Config(emulate=True)]
    return config


def gpt_oss_20b() -> Trainer.Config:
    """GPT-OSS 20b."""
    config = Trainer.Config(
        model=size("20b"),
        training=Training(steps=10_000, seq_len=8192, local_batch_size=1),
        optimizer=AdamW.Config(lr=8e-4),
        lr_scheduler=Schedule.Config(warmup_steps=2000, decay_ratio=0.8, decay_type="cosine", min_lr_factor=0.1),
    )
    config.activation_checkpoint.mode = "full"
    return config


def gpt_oss_120b() -> Trainer.Config:
    """GPT-OSS 120b."""
    config = gpt_oss_20b()
    config.model = size("120b")
    return config
