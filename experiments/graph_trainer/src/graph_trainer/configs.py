"""The recipes: the debug runs of the four families, with one graph per step."""

from core.config.derive import derive
from core.train.trainer import Trainer
from deepseek_v3.configs import deepseek_v3_debug
from gpt_oss.configs import gpt_oss_debug
from graph_trainer.settings import GraphCompile
from graph_trainer.trainer import GraphTrainer
from llama3.configs import llama3_debug
from qwen3.configs import qwen3_debug, qwen3_moe_debug


def with_graph(recipe: Trainer.Config) -> GraphTrainer.Config:
    """A recipe of any model with one graph per step."""
    return derive(recipe, GraphTrainer.Config, compile=GraphCompile())


def graph_trainer_debug() -> GraphTrainer.Config:
    """Qwen3's debug run with one graph per step, interpreted, on a laptop's CPU."""
    return with_graph(qwen3_debug())


def graph_trainer_qwen3_moe_debug() -> GraphTrainer.Config:
    """Qwen3's debug run of a mixture of experts with one graph per step."""
    return with_graph(qwen3_moe_debug())


def graph_trainer_llama3_debug() -> GraphTrainer.Config:
    """Llama 3's debug run with one graph per step."""
    return with_graph(llama3_debug())


def graph_trainer_deepseek_v3_debug() -> GraphTrainer.Config:
    """DeepSeek-V3's debug run with one graph per step."""
    return with_graph(deepseek_v3_debug())


def graph_trainer_gpt_oss_debug() -> GraphTrainer.Config:
    """GPT-OSS's debug run with one graph per step."""
    return with_graph(gpt_oss_debug())
