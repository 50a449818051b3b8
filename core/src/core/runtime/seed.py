"""Everything that draws at random, started from one number."""

import random

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and PyTorch; with `deterministic` PyTorch refuses operations whose result may vary."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports torch._inductor: a second
        torch.use_deterministic_algorithms(deterministic)
