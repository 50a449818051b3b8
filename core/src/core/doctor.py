"""What is there of all that a run may use and does without: `python -m core.doctor`."""

import textwrap
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
    for build, purpose in BUILDS.items():
        reason = probe.missing(build)
        here = None if reason else f"{probe.CLASSES[build]} of deep_ep {probe.version()}"
        yield Part(f"deep_ep {build}", here, reason or "", purpose)
    for package, (fix, purpose) in PACKAGES.items():
        try:
            yield Part(package, version(package), "", purpose)
        except PackageNotFoundError:
            yield Part(package, None, f"not installed: {fix}", purpose)


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
