"""DeepSeek-V3's recipes: each is a function that returns the whole configuration of a run."""

from core.checkpoint.settings import Checkpoint
from core.optim.adam import AdamW
from core.optim.schedule import Schedule
from core.parallel.settings import Parallelism
from core.quantization.float8 import Float8LinearConverter
from core.step.settings import Compile, Training
from core.train.debug_run import debug_run
from core.train.trainer import Trainer
from deepseek_v3.model import size


def deepseek_v3_debug() -> Trainer.Config:
    """A small DeepSeek-V3 that learns the standard library's text on a laptop's CPU in about three minutes."""
    return debug_run(size("debug"))


def deepseek_v3_debug_float8() -> Trainer.Config:
    """`deepseek_v3_debug` with products of 8 bits, which plain arithmetic emulates: on a CPU slower, and as good."""
    config = deepseek_v3_debug()
    config.converters = [Float8LinearConverter.Config(emulate=True)]
    return config


def deepseek_v3_16b() -> Trainer.Config:
    """DeepSeek-V2-Lite 16B."""
    return Trainer.Config(
        model=size("16B"),
        training=Training(steps=1000, seq_len=4096, local_batch_size=4),
        optimizer=AdamW.Config(lr=2.2e-4),
        lr_scheduler=Schedule.Config(warmup_steps=200, decay_ratio=0.8, decay_type="cosine", min_lr_factor=0.1),
        parallelism=Parallelism(pipeline_parallel_schedule="Interleaved1F1B"),
        compile=Compile(enable=True, components=["loss"]),
        checkpoint=Checkpoint(interval=10),
    )


def deepseek_v3_236b() -> Trainer.Config:
    """DeepSeek-V2 236B."""
    config = deepseek_v3_671b()
    config.model = size("236B")
    return config


def deepseek_v3_671b() -> Trainer.Config:
    """DeepSeek-V3 671B."""
    config = deepseek_v3_16b()
    config.model = size("671B")
    config.training.steps = 10_000
    config.lr_scheduler.warmup_steps = 2000
    config.checkpoint.interval = 500
    return config


def deepseek_v3_671b_mtp() -> Trainer.Config:
    """DeepSeek-V3 671B that also learns to predict the token after the next one."""
    config = deepseek_v3_671b()
    config.model.n_mtp_layers = 1
    return config


def deepseek_v3_671b_float8() -> Trainer.Config:
    """DeepSeek-V3 671B with products of 8 bits, whose weights are gathered as bytes."""
    config = deepseek_v3_671b()
    config.converters = [Float8LinearConverter.Config(enable_fsdp_float8_all_gather=True)]
    return config
