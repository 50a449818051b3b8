"""What would help where memory is short, in a run of several ranks."""

import pytest
import torch

from core.config.errors import UserError
from core.parallel.settings import Parallelism
from core.runtime.launcher import World
from core.runtime.meta import meta_model
from core.step.checks import check_layout
from core.step.settings import Training
from core.testing.toy import Toy
from core.train import memory
from core.train.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORLD = World(rank=0, size=8, local_rank=0, local_size=8)


@pytest.mark.parametrize(("global_batch_size", "rows"), [(-1, 12), (24, 24)])
def test_advice_keeps_the_rows_of_all_ranks(monkeypatch: pytest.MonkeyPatch, global_batch_size: int, rows: int):
    training = Training(local_batch_size=3, seq_len=32, global_batch_size=global_batch_size)
    parallelism = Parallelism(data_parallel_replicate_degree=2, tensor_parallel_degree=2)  # four data ranks of two each
    run = Trainer.Config(model=Toy.Config(), training=training, parallelism=parallelism)
    degrees, model = parallelism.degrees(8), meta_model(run.model)
    need = memory.estimate(model, run.optimizer, run.loss, training, degrees).total
    advice = f"--training.local_batch_size 1 --training.global_batch_size {rows} "
    monkeypatch.setattr(memory, "free_memory", lambda device: need)
    memory.check_memory(model, run, GPU, WORLD)  # each has its own
    with pytest.raises(UserError, match="iB free for each rank") as caught:
        memory.check_memory(model, run, CPU, WORLD)
    assert advice in str(caught.value)
    with pytest.raises(UserError) as caught, memory.memory_advice(CPU, run, degrees):
        raise torch.OutOfMemoryError("no more")
    assert advice in str(caught.value) and "--optimizer.state_dtype 8-bit" in str(caught.value)
    assert ("--optimizer.in_backward --training.max_norm inf" in str(caught.value)) == (rows == 12)
    training.local_batch_size, training.global_batch_size = 1, rows
    check_layout(run, world_size=8)
