"""`qwen3_debug_muon` on two ranks, in every layout: the loss on held-out text is that of one rank.

Experts are those that one rank chose: a rounding turns a choice sooner or later, as it does from one rank to itself
with other microbatches (docs/optimizers.md). What ranks choose themselves is compared in fp64, in `test_muon_experts`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from core.nn.moe import Router
from core.parallel.settings import Parallelism
from core.testing.ranks import run_ranks
from core.train.trainer import Trainer
from qwen3 import configs

LAYOUTS = {
    "fsdp2": ("tied", Parallelism()),
    "tp2": ("tied", Parallelism(tensor_parallel_degree=2)),
    "pp2": ("untied", Parallelism(pipeline_parallel_degree=2)),
    "ep2": ("experts", Parallelism(expert_parallel_degree=2)),
}
"""Two ranks, and what of the recipe they train: a pipeline wants embedding and head apart."""


def run_of(kind: str, folder: Path, *, steps: int, seq_len: int) -> Trainer.Config:
    """The first steps of the recipe, also with experts in it, on the documentation of Python's words."""
    run = configs.qwen3_debug_muon()
    run.lr_scheduler.total_steps = run.training.steps
    if kind == "experts":
        run.model = configs.qwen3_moe_debug().model
    run.model.tie_embeddings = kind == "tied"
    run.training = replace(run.training, steps=steps, seq_len=seq_len, global_batch_size=8, local_batch_size=4)
    run.validator.steps, run.checkpoint.enable = 4, False
    run.activation_checkpoint.mode = "none"  # a router chooses once
    run.dataloader.dataset, run.dataloader.cache_folder = str(folder / "text/*.txt"), str(folder / "cache")
    run.dataloader.validation_fraction = 0.2
    return run


def validation_losses(
    kinds: dict[str, tuple[str, Parallelism]], folder: Path, sizes: dict[str, int], made: list[Tensor]
) -> list[float]:
    """The loss on held-out text after training each of these, on this rank as on all; `made` as of `chooser`."""
    found = []
    for name, (kind, parallelism) in kinds.items():
        run = run_of(kind, folder, **sizes)
        run.parallelism, run.dump_folder = parallelism, str(folder / name)
        with mock.patch.object(Router, "choose", chooser(made, run.model.n_layers)):
            record, _ = run.build().run()
        found.append(record.validation_loss)
    return found


def chooser(made: list[Tensor], n_layers: int) -> Callable[[Router, Tensor], Tensor]:
    """In place of `Router.choose`: on one rank `made` gets what all layers choose, microbatch by microbatch; two ranks
    choose the same, each that of its microbatches, every other one."""
    plain = Router.choose
    if dist.is_initialized():
        own = iter([ids_BLK for i, ids_BLK in enumerate(made) if i // n_layers % 2 == dist.get_rank()])
        return lambda router, score_BLE: next(own)

    def noting(router: Router, score_BLE: Tensor) -> Tensor:
        made.append(plain(router, score_BLE))
        return made[-1].clone()

    return noting


@pytest.mark.layout
@pytest.mark.parametrize(
    ("steps", "seq_len"), [pytest.param(6, 64), pytest.param(40, 256, marks=pytest.mark.matrix)], ids=["short", "long"]
)
def test_learns_the_same_in_every_layout(tmp_path: Path, steps: int, seq_len: int) -> None:
    (tmp_path / "text").mkdir()
    for name, text in topics.items():
        (tmp_path / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    sizes = {"steps": steps, "seq_len": seq_len}
    alone = {kind: (kind, Parallelism()) for kind in ("tied", "untied", "experts")}
    made: list[Tensor] = []
    expected = dict(zip(alone, validation_losses(alone, tmp_path, sizes, made), strict=True))
    assert max(expected.values()) < 7.3, "too little was learned, from 7.6, to tell layouts apart"
    found = run_ranks(validation_losses, 2, LAYOUTS, tmp_path, sizes, made, timeout_s=60.0 * steps)[0]
    differences = {
        name: abs(loss - expected[kind]) for (name, (kind, _)), loss in zip(LAYOUTS.items(), found, strict=True)
    }
    assert max(differences.values()) < 1e-4, differences
