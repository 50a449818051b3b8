"""What is there of all that a run may use and does without: `python -m core.doctor`."""

import textwrap
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.distributed as dist

from core.comm import probe
from core.config.exit import exit_plainly
from core.config.help import show
from core.runtime.device import accelerator, device_name, n_gpus

PACKAGES = {
    "tokenizers": ("pip install tokenizers, or armature-core[hf]", "tokenizer.json files as tokenizer.path"),
    "pyarrow": (
        "pip install pyarrow, or armature-core[data]",
        "text in .parquet, .arrow and .zst",
    ),
    "datasets": ("pip install datasets, or armature-core[hf]", "Hugging Face data sets as dataloader.dataset"),
    "lm_eval": ("pip install lm_eval, or armature-core[eval]", "the tasks of python -m <model>.evaluate"),
    "tensorboard": ("pip install tensorboard, or armature-core[tensorboard]", "metrics.enable_tensorboard"),
    "mlflow": ("pip install mlflow", "metrics.enable_mlflow"),
    "trackio": ("pip install trackio", "metrics.enable_trackio"),
    "wandb": ("pip install wandb, or armature-core[wandb]", "metrics.enable_wandb"),
    "torchao": ("pip install torchao", "products in 8 bits; no setting asks for them yet"),
}
BUILDS: dict[probe.Build, str] = {
    "deepep_v1": "expert_parallel_comm_backend deepep_v1: tokens to experts over NVLink and RDMA",
    "deepep_v2": "expert_parallel_comm_backend deepep_v2: the same over NCCL's device-side communication",
    "hybridep": "expert_parallel_comm_backend hybridep: the same, sorted and padded on the way",
}


class Part(NamedTuple):
    """Something optional: what there is of it, or else why not and what to do; and what it is for."""

    name: str
    here: str | None
    missing: str
    purpose: str


def optional_parts() -> Iterator[Part]:
    """Every optional part."""
    found = accelerator()
    here = f"{found.count} x {device_name(torch.device(str(found.type)))}, {found.platform}" if found.count else None
    yield Part("GPU", here, f"{found.obstacle}; runs are on the CPU", "runs on an accelerator")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if n_gpus() and dist.is_nccl_available() else None
    yield Part("NCCL", nccl, "comes with a torch for CUDA or ROCm and needs a GPU; ranks use gloo", "several GPUs")
    flex = "compiled, forward and backward" if found.count else None
    yield Part("flex attention", flex, "has no backward on a CPU: use attention.backend sdpa", "attention.backend flex")
    yield bfloat16_part(bfloat16_speed())
    for build, purpose in BUILDS.items():
        reason = probe.missing(build)
        here = None if reason else f"{probe.CLASSES[build]} of deep_ep {probe.version()}"
        yield Part(f"deep_ep {build}", here, reason or "", purpose)
    for package, (fix, purpose) in PACKAGES.items():
        try:
            yield Part(package, version(package), "", purpose)
        except PackageNotFoundError:
            yield Part(package, None, f"not installed: {fix}", purpose)


def bfloat16_part(speed: float) -> Part:
    """Whether computing in bfloat16 pays on this CPU, where a product has `speed` times the speed of fp32's."""
    told = f"products have {speed:.1f} times the speed of float32's"
    here = told if speed > 1.2 else None
    return Part("bfloat16", here, f"{told}: compute in float32", "training.mixed_precision_param bfloat16 on the CPU")


def bfloat16_speed(n: int = 768, rounds: int = 5) -> float:
    """How many times as fast this CPU multiplies two matrices (n, n) in bfloat16 as in float32: the best of each."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for dtype in [*best] * rounds:
        matrix = torch.ones(n, n, dtype=dtype)
        began = time.perf_counter()
        matrix @ matrix
        best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def parts_table(found: list[Part], width: int = 118) -> str:
    """The parts as lines: name, yes or no, what there is or is missing, what for."""
    name_width = max(len(part.name) for part in found)
    indent = " " * (name_width + 7)
    lines = []
    for name, here, missing, purpose in found:
        head = f"{name:<{name_width}}  {'no' if here is None else 'yes':<3}  "
        told = textwrap.fill(missing if here is None else here, width, initial_indent=head, subsequent_indent=indent)
        lines += [told, textwrap.fill(f"for {purpose}", width, initial_indent=indent, subsequent_indent=indent)]
    return "\n".join(lines)


def main() -> None:
    """Print the table; nothing that is missing is an error until a setting asks for it."""
    with exit_plainly():
        show(parts_table(list(optional_parts())))


if __name__ == "__main__":
    main()
