#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining.
#
# Behaviour: before the first step of a schedule each PipelineStage runs its module once more, in training mode, to learn
# the shapes that it exchanges; a later stage gets memory that nobody has written. What modules remember of it stays:
# after one step of four microbatches BatchNorm has counted five, and its averages hold a fifth of what was never data.
# The good guess: shapes are found on meta or fake tensors, or what is remembered is put back, as gradients are.
# Who meets it: whoever pipelines modules that count or average what they see: BatchNorm, histories of largest values
# for delayed scaling, loads of experts.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/stages.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
seen = []


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        seen.append(x.detach().clone())
        return self.norm(self.linear(x))


module = Stage()
stage = PipelineStage(module, rank, 2, torch.device("cpu"))
schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
torch.manual_seed(7)
x, target = torch.randn(16, 8), torch.randn(16, 8)
schedule.step(x) if rank == 0 else schedule.step(target=target)
if rank == 1:
    print(f"microbatches 4, forwards of the second stage {len(seen)}, counted by BatchNorm {module.norm.num_batches_tracked}")
    print(f"largest number in what came first {seen[0].abs().max():.3g}, in each microbatch", end="")
    print("".join(f" {each.abs().max():.3g}" for each in seen[1:]))
    assert len(seen) == 5 and module.norm.num_batches_tracked == 5
    assert not any(torch.equal(seen[0], each) for each in seen[1:])
dist.destroy_process_group()
PYTHON
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/torchrun" --nproc-per-node 2 --standalone stages.py
