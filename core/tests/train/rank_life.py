"""What a launcher gives a rank, and the life of a process that is one."""

import gc
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from core.config.cli import main


def torchrun_environ(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank whose launcher keeps a store at `port`."""
    size = str(n_ranks)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**place, **store, "TORCHELASTIC_RUN_ID": "a launch of this test"}


def live(program: ModuleType, words: list[str], environ: dict[str, str], output: Path) -> None:
    """Run `program`, told `words` on its command line, and leave in `output` all that is printed."""
    gc.freeze()  # what the server imported is no garbage
    os.environ.update(environ)
    with output.open("w", encoding="utf-8", buffering=1) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        sys.stdout = sys.stderr = stream
        torch.set_num_threads(1)
        try:
            main(program, words)
        except Exception:
            sys.excepthook(*sys.exc_info())
            stream.flush()
            sys.exit(1)
