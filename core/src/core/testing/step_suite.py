"""A step does not wait for its device but where its numbers are read. Part of `core.testing.model_suite`."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.data.packing import Batch
from core.nn.kernel import Positions
from core.nn.weights import weights
from core.optim.adam import AdamW
from core.parallel.layout import SingleRank
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.update import train_step
from core.testing.key_suite import KeySuite
from core.testing.toy import on_cpu, randomise

READERS = {getattr(Tensor, name) for name in ("tolist", "cpu", "numpy", "__array__")}
"""What reads a tensor without an operation that could be seen on a CPU."""
COUNTED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "bincount", "equal.")
"""Operations whose result, or its shape, the host must know, by how their names begin; with a GPU it waits for them."""
READS = {
    "packing.count_labels": "labels of rows that the host has just read",
    "packing.padding_BL": "the same",
    "tiling.spans": "documents of these rows",
    "objective.accumulate": "the loss, once behind the last backward: a step whose loss is not finite is no update",
    "layout.joint_norm": "the norm of all gradients, once, likewise; the update is scaled by it",
    "tiling.rows_of": "a CPU's kernel of attention",
    "grouped._multiply": "a CPU's product of groups; GPUs from Hopper on have a kernel",
    "grouped._multiply_weight": "the same",
}
"""Every place of core that reads a tensor in a step, and why that costs nothing, or must be."""


class HostReads(TorchFunctionMode):
    """While the block runs, counts by place what the host asks of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._operations = _Operations(self.places)

    def __enter__(self) -> "HostReads":
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._operations.__exit__(exc_type, exc_val, exc_tb)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in READERS:
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func).removeprefix("aten.")
        masks = name == "index.Tensor" and any(each is not None and each.dtype == torch.bool for each in args[1])
        repeats = name == "repeat_interleave.Tensor" and not (kwargs or {}).get("output_size")
        if name.startswith(COUNTED) or masks or repeats:
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The innermost function of core, or of a model, that is being called: its file's name and its own."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not name.startswith(("torch", "core.testing", "pytest", "_pytest")):
            return f"{name.rpartition('.')[2]}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "nowhere"


class StepSuite(KeySuite):
    """The tests of a model's step."""

    @pytest.mark.parametrize("mask", ["causal", "document"])
    def test_a_step_waits_for_its_device_where_its_numbers_are_read(self, tiny: str, mask: Any) -> None:
        """Two microbatches of two documents a row, after a step that makes what is made once."""
        model = on_cpu(self.tiny_config(tiny))
        randomise(model, seed=5)
        layout = SingleRank(torch.device("cpu"))
        optimizer = AdamW.Config().build(weights=weights(model), layout=layout)
        loss = CrossEntropy.Config().build()
        objective = Objective([model], loss, layout=layout, dtype=torch.float32, mask=mask)
        tokens_BL = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        document_BL = (torch.arange(16) >= 7).long().expand(2, -1).contiguous()
        batch = Batch(tokens_BL, tokens_BL, Positions.rows(tokens_BL).position_BL.expand(2, -1), document_BL)
        settings: dict[str, Any] = {"lr_factor": 1.0, "max_norm": 1.0, "on_nonfinite": "stop"}
        train_step(objective, optimizer, [batch, batch], step=1, **settings)
        with HostReads() as reads:
            train_step(objective, optimizer, [batch, batch], step=2, **settings)
        assert not reads.places.keys() - READS.keys(), reads.places
        assert reads.places["objective.accumulate"] == reads.places["layout.joint_norm"] == 1
