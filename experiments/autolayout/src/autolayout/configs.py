"""The recipes: models of other packages, whose layout is searched for."""

from autolayout.trainer import AutolayoutTrainer
from core.config.derive import derive
from llama3.configs import llama3_70b
from qwen3.configs import qwen3_8b, qwen3_debug


def autolayout_debug() -> AutolayoutTrainer.Config:
    """Qwen3's debug run in the layout that is found for the ranks at hand."""
    return derive(qwen3_debug(), AutolayoutTrainer.Config)


def autolayout_qwen3_8b() -> AutolayoutTrainer.Config:
    """Qwen3 8B in the layout that is found for the ranks at hand."""
    return derive(qwen3_8b(), AutolayoutTrainer.Config)


def autolayout_llama3_70b() -> AutolayoutTrainer.Config:
    """Llama 3.1 70B in the layout that is found for the ranks at hand."""
    return derive(llama3_70b(), AutolayoutTrainer.Config)
