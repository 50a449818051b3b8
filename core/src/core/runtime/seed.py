"""Everything that draws at random, started from one number."""

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and PyTorch; with `deterministic` PyTorch refuses operations whose result may vary.

    cuBLAS is one of these unless its workspace is fixed before its first use, so the environment says so here.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports torch._inductor: a second
        torch.use_deterministic_algorithms(deterministic)
