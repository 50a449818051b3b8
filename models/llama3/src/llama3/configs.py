"""Llama 3's recipes: each is a function that returns the whole configuration of a run."""

from core.optim.adam import AdamW
from core.optim.schedule import Schedule
from core.quantization.float8 import Float8LinearConverter
from core.step.settings import Training
from core.train.debug_run import debug_run
from core.train.profile import Profiler
from core.train.trainer import Trainer
from core.train.validate import Validator
from llama3.model import size


def llama3_debug() -> Trainer.Config:
    """A small Llama 3 that learns the standard library's text on a laptop's CPU in about two minutes."""
    return debug_run(size("debug"))


def llama3_debug_float8() -> Trainer.Config:
    """`llama3_debug` with products of 8 bits, which plain arithmetic emulates: on a CPU slower, and as good."""
    config = llama3_debug()
    config.converters = [Float8LinearConverter.Config(emulate=True)]
    return config


def llama3_8b() -> Trainer.Config:
    """Llama 3.1 8B."""
    return Trainer.Config(
        model=size("8B"),
        training=Training(steps=1000, seq_len=8192, local_batch_size=1),
        optimizer=AdamW.Config(lr=3e-4),
        lr_scheduler=Schedule.Config(warmup_steps=200),
        validator=Validator.Config(freq=500, steps=1200),
        profiling=Profiler.Config(profile_freq=100),
    )


def llama3_1b() -> Trainer.Config:
    """Llama 3.2 1B."""
    config = llama3_8b()
    config.model = size("1B")
    return config


def llama3_3b() -> Trainer.Config:
    """Llama 3.2 3B."""
    config = llama3_8b()
    config.model = size("3B")
    return config


def llama3_70b() -> Trainer.Config:
    """Llama 3.1 70B."""
    config = llama3_8b()
    config.model = size("70B")
    config.training.local_batch_size = 8
    config.optimizer.lr = 1.5e-4
    config.activation_checkpoint.mode = "full"
    return config


def llama3_405b() -> Trainer.Config:
    """Llama 3.1 405B."""
    config = llama3_70b()
    config.model = size("405B")
    config.training.local_batch_size = 2
    config.training.steps = 3000
    config.optimizer.lr = 8e-5
    config.lr_scheduler.warmup_steps = 600
    config.compile.enable = True
    return config


def llama3_405b_float8() -> Trainer.Config:
    """Llama 3.1 405B with products of 8 bits, whose weights are gathered as bytes."""
    config = llama3_405b()
    config.converters = [Float8LinearConverter.Config(enable_fsdp_float8_all_gather=True)]
    return config
