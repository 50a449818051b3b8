"""What an update costs on a CPU: our optimizers beside PyTorch's of the same names, and Muon on one rank and on two.

    pip install models/qwen3
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/optimizers_cpu.py

All contenders live in the same two processes and take turns update by update. Costs are in CPU time of the first rank,
so that other programs hardly matter; ratios are per round of turns: median (lowest to highest), and below 1 is cheaper.
Muon orthogonalises in bfloat16 beside PyTorch's, which knows nothing else, and in fp32, as is the default, on two
ranks. "On every rank" gathers all matrices and orthogonalises all of them on both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from core.comm.all_to_all import AllToAll
from core.nn.init import init_weights
from core.nn.weights import Weight
from core.optim.adam import AdamW
from core.optim.few_bits import StateDtype
from core.optim.lion import Lion
from core.optim.muon import Muon, orthogonal
from core.optim.optimizer import Optimizer
from core.optim.sgd import SGD
from core.parallel.apply import dtensor_slice
from core.parallel.layout import RankView, SingleRank, Wrapping
from core.parallel.many_ranks import ManyRanks
from core.parallel.settings import Parallelism
from core.step.assemble import assemble
from core.testing.ranks import run_ranks
from qwen3.model import Qwen3, size

CPU = torch.device("cpu")
Update = Callable[[], None]


def network() -> Qwen3.Config:
    config = size("debug")
    config.dim, config.n_layers, config.feed_forward.hidden_dim = 512, 4, 1536
    config.attention.n_heads, config.attention.n_kv_heads = 8, 4
    return config


def drawn(layout: RankView, *, matrices: bool) -> list[Weight]:
    """The weights of a model, or those that Muon orthogonalises, with gradients."""
    wrapping = Wrapping(compute_dtype=torch.float32, checkpoint=lambda model: None, dispatcher=AllToAll)
    built = assemble(network(), layout, wrapping, dtype=torch.float32, seed=0, n_microbatches=1)
    found = [each for each in built.weights() if not matrices or Muon.Config().orthogonalises(each)]
    for each in found:
        each.value.grad = torch.zeros_like(each.value)
    starts = [(each.name, each.value.grad, each.start) for each in found]
    init_weights(starts, seed=1, local_slice=layout.local_slice)  # pyrefly: ignore[bad-argument-type]
    return found


def ours(config: Optimizer.Config, layout: RankView, *, matrices: bool) -> Update:
    optimizer: Optimizer = config.build(weights=drawn(layout, matrices=matrices), layout=layout)
    return lambda: optimizer.step(1.0)


def pytorch(kind: type[torch.optim.Optimizer], *, matrices: bool, **settings: object) -> Update:
    named = drawn(SingleRank(CPU), matrices=matrices)
    optimizer = kind([each.value for each in named], lr=1e-3, **settings)
    return lambda: optimizer.step() and None


def on_every_rank(layout: RankView) -> Update:
    """Muon's update with every matrix gathered and orthogonalised by each rank."""
    named = drawn(layout, matrices=True)
    moments = [torch.zeros_like(each.value) for each in named]

    @torch.no_grad()
    def update() -> None:
        for each, moment in zip(named, moments, strict=True):
            moment.lerp_(each.value.grad, 0.05)
            whole = orthogonal(moment.full_tensor().unsqueeze(0), steps=5, dtype=torch.float32).squeeze(0)
            piece, start = dtensor_slice(each.value)
            piece.sub_(whole[tuple(slice(a, a + n) for a, n in zip(start, piece.shape, strict=True))], alpha=1e-3)

    return update


def cost(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contender's updates after the first, in turns."""
    alone, two = SingleRank(CPU), ManyRanks(Parallelism(), CPU)
    bf16 = Muon.Config(lr=1e-3, ns_dtype="bfloat16", scale="original")
    contenders = {
        "torch.optim.AdamW, fused": pytorch(torch.optim.AdamW, matrices=False, fused=True),
        "AdamW": ours(AdamW.Config(lr=1e-3), alone, matrices=False),
        "AdamW, bfloat16 states": ours(AdamW.Config(lr=1e-3, state_dtype="bfloat16"), alone, matrices=False),
        "AdamW, 8-bit states": ours(AdamW.Config(lr=1e-3, state_dtype="8-bit"), alone, matrices=False),
        "torch.optim.Muon": pytorch(torch.optim.Muon, matrices=True),
        "Muon in bfloat16": ours(bf16, alone, matrices=True),
        "Muon": ours(Muon.Config(lr=1e-3), alone, matrices=True),
        "Muon, two ranks": ours(Muon.Config(lr=1e-3), two, matrices=True),
        "Muon on every rank of two": on_every_rank(two),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, update in contenders.items():
            dist.barrier()
            if "two" not in name and dist.get_rank() > 0:
                continue
            begin = time.process_time()
            update()
            taken[name].append(time.process_time() - begin)
    return {name: seconds[1:] for name, seconds in taken.items()}


def state_bytes() -> dict[str, float]:
    """Bytes of state for each number of a model's weights."""
    found, n = {}, sum(each.value.numel() for each in drawn(SingleRank(CPU), matrices=False))
    types: list[StateDtype] = ["weights", "bfloat16", "8-bit"]
    for kind in (AdamW, Muon, Lion, SGD):
        for dtype in types:
            named = drawn(SingleRank(CPU), matrices=False)
            optimizer: Optimizer = kind.Config(state_dtype=dtype).build(weights=named, layout=SingleRank(CPU))
            kept = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
            found[f"{kind.__name__}, {dtype}"] = kept / n
    named = drawn(SingleRank(CPU), matrices=False)
    reference = torch.optim.AdamW([each.value for each in named], fused=True)
    reference.step()
    kept = sum(tensor.nbytes for state in reference.state.values() for tensor in state.values())
    return found | {"torch.optim.AdamW, fused": kept / n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    args = parser.parse_args()
    taken = run_ranks(cost, 2, args.rounds, timeout_s=1800)[0]
    pairs = [
        ("AdamW", "torch.optim.AdamW, fused"),
        ("AdamW, bfloat16 states", "torch.optim.AdamW, fused"),
        ("AdamW, 8-bit states", "torch.optim.AdamW, fused"),
        ("Muon in bfloat16", "torch.optim.Muon"),
        ("Muon", "torch.optim.Muon"),
        ("Muon, two ranks", "Muon on every rank of two"),
    ]
    print(f"{'':26}{'CPU ms':>8}  against")
    for name, other in pairs:
        row = sorted(a / b for a, b in zip(taken[name], taken[other], strict=True))
        spread = f"{statistics.median(row):.3f} ({row[0]:.2f} to {row[-1]:.2f})"
        print(f"{name:26}{1000 * statistics.median(taken[name]):>8.1f}  {other:26} {spread}")
    print("\nbytes of state for each number")
    for name, each in state_bytes().items():
        print(f"{name:26}{each:>8.2f}")


if __name__ == "__main__":
    main()
