"""The adapters over the real libraries, on two GPUs: the parts of the conformance table that need no CPU.

Where they cannot run they skip with the reason that a run would give.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from carriers import EQUAL
from token_traffic import E, numbers_like, reference, traffic

from core.comm import ops, probe
from core.comm.backend import Backend, dispatchers
from core.comm.transport import Sizes, bind, bound, release
from core.runtime.device import n_gpus
from core.testing.ranks import run_ranks

WIDTH, RANKS = 512, 2


def why_not(build: probe.Build) -> str | None:
    """What keeps the tests of a build from running here."""
    gpus = n_gpus()
    if gpus < RANKS:
        said = probe.missing(build) or "deep_ep is there"
        return f"needs {RANKS} NVIDIA GPUs joined by NVLink, and there are {gpus}; {said}"
    return probe.missing(build)


def journeys(build: Backend) -> dict[str, Any]:
    """Of each case what the library and the reference made of the same tokens, on the CPU."""
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl", device_id=device)
    sizes = Sizes(EQUAL, WIDTH, E, E, RANKS, torch.bfloat16)
    dispatcher = dispatchers(build, device, sizes)(group)
    namespace, found = "hybridep" if build == "hybridep" else "deepep", {}
    transport = bound(namespace, group.group_name)
    for case in ("mixed", "masked", "all to one rank", "one choice", "all experts", "mixed"):
        _, ids, weight = traffic(case, dist.get_rank(), EQUAL)
        x = numbers_like(torch.empty(EQUAL, WIDTH), dist.get_rank()).bfloat16()
        results = []
        for carrier in (transport, reference(namespace, group)):
            bind(group, carrier)
            leaves = [x.to(device).requires_grad_(), weight.to(device).requires_grad_()]
            rows = dispatcher.dispatch(leaves[0], ids.to(device), leaves[1], E)
            y = dispatcher.combine((rows.x_RD * rows.weight_R.unsqueeze(-1)).bfloat16(), rows.back)
            y.float().square().sum().backward()
            results.append(
                [part.detach().float().cpu() for part in (y, *(leaf.grad for leaf in leaves), rows.counts_G)]
            )
        found[case] = results
    bind(group, transport)
    more = () if namespace == "deepep" else (None, 1)
    out = getattr(torch.ops, namespace).dispatch(
        x.to(device), ids.to(device), weight.to(device), E, *more, group.group_name
    )
    combine = ops.DEEPEP_COMBINE if namespace == "deepep" else ops.HYBRIDEP_COMBINE
    home = combine(out[0], out[-1], EQUAL, group.group_name).float().cpu()
    found["there and back"] = (home, x.float(), ids)
    release()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("build", ["deepep_v1", "deepep_v2", "hybridep"])
def test_the_library_does_what_the_reference_does(build: Any) -> None:
    if reason := why_not(build):
        pytest.skip(reason)
    for found in run_ranks(journeys, RANKS, build, timeout_s=600):
        home, x, ids = found.pop("there and back")
        ranks = [{i * RANKS // E for i in row if i >= 0} for row in ids.tolist()]
        times = (ids >= 0).sum(1) if build == "hybridep" else torch.tensor([len(row) for row in ranks])
        torch.testing.assert_close(home, x * times.view(-1, 1), rtol=1e-2, atol=1e-2)
        for case, (ours, theirs) in found.items():
            for mine, right in zip(ours, theirs, strict=True):
                limit = 0.02 * max(right.abs().max().item(), 1.0)
                torch.testing.assert_close(mine, right, rtol=0.02, atol=limit, msg=f"{case}: {mine} is not {right}")
