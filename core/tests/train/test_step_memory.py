"""The memory of a step by part, against sizes that can be counted by hand."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from toy_run import toy_run

from core.activation_checkpoint.meter import Meter
from core.runtime.device import MIB
from core.train.step_memory import MemoryPart, PeakParts, measured_memory

N = 1000  # numbers in a tensor
BYTES = 4 * N


class Square(nn.Module):
    """A block with a weight, whose output is new, and that needs ten times the room for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.w
        torch.zeros(10 * N).sum()
        return out


class Squares(nn.Module):
    """Three such blocks in a row, and a copy of the input before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Square() for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.layers.values():
            x = block(x)
        return x


def test_parts_are_what_a_hand_counts():
    """The peak is in the third block: the copy, three outputs, the room for a moment and its sum of four bytes."""
    model, x = Squares(), torch.ones(N)
    kept: dict[str, dict[str, Tensor]] = {"w": {"moment": torch.zeros(N), "step": torch.zeros(1, dtype=torch.int64)}}
    optimizer = cast(Any, SimpleNamespace(state=kept))

    def step() -> str:
        out = model(x)
        out.backward(torch.ones_like(out))
        return "done"

    found, peak = measured_memory(step, [cast(Any, model)], optimizer)
    assert found == "done" and peak.doing == "the forward of layers.2" and tuple(peak.parts) == tuple(MemoryPart)
    assert list(peak.parts.values()) == [3 * BYTES, BYTES + 8, 0, 13 * BYTES + 4, BYTES, 0, 0]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_run_writes_the_table_of_a_step_and_its_parts_add_up(tmp_path, monkeypatch, mode):
    """The peak is that of a plain count of the same step; the table is of the second step, and of none between."""
    found: list[tuple[PeakParts, int]] = []

    def watch(take, models, optimizer):
        plain = Meter()

        def inside():
            with plain:
                return take()

        info, peak = measured_memory(inside, models, optimizer)
        found.append((peak, plain.peak))
        return info, peak

    monkeypatch.setattr("core.train.profile.measured_memory", watch)
    run = toy_run(tmp_path, steps=4)
    run.activation_checkpoint.mode = mode
    run.profiling.enable_memory_snapshot, run.profiling.profile_freq = True, 5
    trainer = run.build()
    trainer.run()
    ((peak, plain),) = found
    assert sum(peak.parts.values()) - peak.parts["weights"] - peak.parts["optimizer"] == plain
    weights = sum(weight.numel() for model in trainer.built.models for weight in model.parameters())
    assert peak.parts["weights"] == 4 * weights and 8 * weights <= peak.parts["optimizer"] < 9 * weights
    rows = run.training.local_batch_size * run.training.seq_len * 4
    blocks, n_layers, dim = peak.parts["activations of blocks"], run.model.n_layers, run.model.dim
    assert blocks == n_layers * rows * dim if mode == "full" else blocks > 3 * n_layers * rows * dim
    (file,) = (tmp_path / "run" / "memory_snapshot").iterdir()
    lines = file.read_text().splitlines()
    assert file.name == "step-2-rank-0.txt" and lines[0].startswith("where the memory of step 2 goes, rank 0; ")
    assert f"{peak.parts['optimizer'] / MIB:12,.2f}" in lines[4] and lines[-1] == f"the most is there in {peak.doing}"
