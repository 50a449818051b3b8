"""Two ranks on a CPU: our FSDP and tensor parallelism beside FSDP2 put on the same blocks by hand, and one rank.

    pip install models/qwen3
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/ranks_cpu.py

The ranks of all contenders live in the same two processes and take turns step by step, so that a change of the
machine's speed hits all alike; the loss of the first step must agree. The hand-made loop is the minimal one: forward,
backward, clip, fused AdamW. Ratios are of step times to the hand-made FSDP, per round of turns: median (lowest to
highest); below 1 is faster. The one rank computes the rows of both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.comm.all_to_all import AllToAll
from core.data.packing import Batch
from core.nn.decoder import Decoder
from core.nn.init import init_weights, materialise
from core.nn.weights import weights
from core.optim.adam import AdamW
from core.parallel.apply import dtensor_slice
from core.parallel.layout import RankView, SingleRank, Wrapping
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.runtime.meta import meta_model
from core.step.assemble import assemble
from core.step.loss import CrossEntropy
from core.step.objective import Objective
from core.step.update import train_step
from core.testing.oracles import cross_entropy
from core.testing.ranks import run_ranks
from qwen3.model import Qwen3, size

CPU = torch.device("cpu")
Step = Callable[[], float]


def network() -> Qwen3.Config:
    config = size("debug")
    config.dim, config.n_layers, config.feed_forward.hidden_dim = 256, 6, 768
    config.attention.n_heads, config.attention.n_kv_heads = 8, 4
    return config


def rows(first: int, n: int, length: int) -> Batch:
    tokens_BL = torch.randint(2048, (8, length), generator=torch.Generator().manual_seed(0))[first : first + n]
    zeros_BL = torch.zeros_like(tokens_BL)
    return Batch(tokens_BL, tokens_BL.roll(-1, 1), zeros_BL + torch.arange(length), zeros_BL)


def ours(layout: RankView, length: int) -> Step:
    nothing = ActivationCheckpoint.Config(mode="none").build(folder=Path())
    wrapping = Wrapping(
        compute_dtype=torch.float32,
        checkpoint=nothing.apply,
        dispatcher=AllToAll,
    )
    parts = assemble(
        network(),
        layout,
        wrapping,
        dtype=torch.float32,
        seed=0,
        n_microbatches=1,
    )
    objective = Objective(
        parts.models,
        CrossEntropy.Config().build(),
        layout=layout,
        dtype=torch.float32,
        mask="causal",
    )
    optimizer = AdamW.Config(lr=1e-3).build(weights=parts.weights(), layout=layout)
    n = 8 // layout.degrees.data
    batches = [rows(layout.data_rank * n, n, length)]
    settings = {"lr_factor": 1.0, "max_norm": 1.0}
    return lambda: train_step(objective, optimizer, batches, step=1, on_nonfinite="stop", **settings).loss


def by_hand(length: int) -> Step:
    model: Decoder = meta_model(network())
    mesh = init_device_mesh("cpu", (2,))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    materialise(model, CPU, torch.float32)
    init_weights(((w.name, w.value, w.start) for w in weights(model)), 0, dtensor_slice)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = rows(dist.get_rank() * 4, 4, length)

    def step() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model(batch.tokens_BL), batch.labels_BL) / batch.labels_BL.numel()
        loss.backward()  # averaged over the two ranks
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / 2

    return step


def times(rounds: int, length: int) -> dict[str, list[float]]:
    """Seconds of every contender's steps after the first, taken in turns."""
    contenders = {
        "FSDP by hand": by_hand(length),
        "armature, FSDP 2": ours(ManyRanks(Parallelism(), CPU), length),
        "armature, tensor 2": ours(ManyRanks(Parallelism(tensor_parallel_degree=2), CPU), length),
        "armature, one rank": ours(SingleRank(CPU), length),
    }
    first = {name: step() for name, step in contenders.items()}
    assert max(first.values()) - min(first.values()) < 1e-4, f"not the same step: {first}"
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            if name == "armature, one rank" and dist.get_rank() > 0:
                dist.barrier()
                continue
            begin = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - begin)
            if name == "armature, one rank":
                dist.barrier()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    args = parser.parse_args()
    taken = run_ranks(times, 2, args.rounds, args.length, timeout_s=1800)[0]
    print(f"{'':22}{'tokens/s':>10}  time against FSDP by hand")
    for name, own in taken.items():
        row = sorted(a / b for a, b in zip(own, taken["FSDP by hand"], strict=True))
        speed = 8 * args.length / statistics.median(own)
        print(f"{name:22}{speed:>10,.0f}  {statistics.median(row):.3f} ({row[0]:.2f} to {row[-1]:.2f})")


if __name__ == "__main__":
    main()
