"""The recipes: Qwen3's, in replica groups."""

from core.config.derive import derive
from fault_tolerance.replicas import Replicas
from fault_tolerance.trainer import FaultTolerantTrainer
from qwen3.configs import qwen3_0_6b, qwen3_debug


def fault_tolerance_debug() -> FaultTolerantTrainer.Config:
    """Qwen3's debug run in one replica group, which needs no lighthouse; with n_groups 2 it is one of two."""
    return derive(qwen3_debug(), FaultTolerantTrainer.Config)


def diloco_debug() -> FaultTolerantTrainer.Config:
    """The same where groups train by themselves for 20 steps, and then take an outer step together."""
    replicas = Replicas.Config(method="diloco", sync_steps=20)
    return derive(qwen3_debug(), FaultTolerantTrainer.Config, fault_tolerance=replicas)


def fault_tolerance_qwen3_0_6b() -> FaultTolerantTrainer.Config:
    """Qwen3 0.6B in replica groups."""
    return derive(qwen3_0_6b(), FaultTolerantTrainer.Config)
