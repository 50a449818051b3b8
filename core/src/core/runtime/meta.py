"""A model before it has memory."""

from typing import Any

import torch

from core.config.configurable import Configurable


def meta_model(config: Configurable.Config) -> Any:
    """The whole model of a configuration on the meta device: names and shapes, without memory."""
    with torch.device("meta"):
        return config.build()
