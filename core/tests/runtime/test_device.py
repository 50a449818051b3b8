"""The device of a run on builds of PyTorch and machines that are not these: each is imitated at what it answers."""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from core import doctor
from core.checkpoint.settings import Checkpoint
from core.config.errors import UserError
from core.runtime import device as devices
from core.runtime.device import accelerator, describe, free_memory, n_gpus, peak_memory, select_device
from core.runtime.distributed import backends
from core.step.checks import check_pinned
from core.train.state import random_tensors, set_random

CPU = torch.device("cpu")
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by"
FORWARD = (
    "Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW"
)
OLD = "the NVIDIA driver of this machine is too old for it, it serves CUDA 12.4 at most; update the driver, or install"


class Builds:
    """Makes PyTorch answer as some build on some machine does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        for name in devices.VISIBLE:
            monkeypatch.delenv(name, raising=False)

    def __call__(
        self, kind: str | None, count: int = 0, *, error: str = "", cuda: str | None = None, hip: str | None = None
    ) -> None:
        def is_available() -> bool:
            if error and "too old" in error:  # PyTorch warns, once in a process
                warnings.warn(f"CUDA initialization: {error}", stacklevel=1)
            return count > 0

        def init() -> None:
            if not count:
                raise RuntimeError(error)

        self.patch.setattr(torch.accelerator, "current_accelerator", lambda: kind and torch.device(kind))
        self.patch.setattr(torch.accelerator, "is_available", is_available)
        # NVML counts devices whatever the driver can do
        self.patch.setattr(torch.accelerator, "device_count", lambda: count or int("too old" in error))
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch.version, "hip", hip)
        if kind:
            module = SimpleNamespace(get_device_name=lambda device: "Big GPU", init=init)
            if kind == "mps":
                module = SimpleNamespace()
            self.patch.setattr(torch, "get_device_module", lambda device: module)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


CPU_ONLY = {  # build and machine -> how PyTorch answers, what is said of it, whether that is worth a warning
    "a build for CPUs": ({"kind": None}, "is built for CPUs only", False),
    "CUDA, no driver": (
        {"kind": "cuda", "error": NO_DRIVER, "cuda": "13.0"},
        "CUDA 13.0, and this machine has no",
        False,
    ),
    "CUDA, no GPU": (
        {"kind": "cuda", "error": "No CUDA GPUs are available", "cuda": "13.0"},
        "sees no such dev",
        False,
    ),
    "CUDA, old driver": ({"kind": "cuda", "error": OLD_DRIVER, "cuda": "13.0"}, OLD, True),
    "CUDA, driver of another GPU": ({"kind": "cuda", "error": FORWARD, "cuda": "13.0"}, "cannot use the GPU", True),
    "ROCm": ({"kind": "cuda", "error": "No HIP GPUs are available", "hip": "7.1"}, "ROCm 7.1, and sees no", False),
    "XPU": ({"kind": "xpu", "error": "No XPU devices are available."}, "built for XPU, and sees no such", False),
    "MPS": ({"kind": "mps"}, "built for MPS, and sees no such device here", False),
}


@pytest.mark.parametrize(("answers", "said", "warns"), CPU_ONLY.values(), ids=CPU_ONLY)
def test_without_a_device_auto_is_the_cpu(
    answers: dict, said: str, warns: bool, build: Builds, caplog: pytest.LogCaptureFixture
) -> None:
    build(**answers)
    with caplog.at_level(logging.WARNING, "armature"):
        assert select_device("auto", local_rank=1) == CPU
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert all("the CPU is used: torch" in text and said in text for text in caplog.messages)
    assert select_device("cpu") == CPU and n_gpus() == 0
    with pytest.raises(
        UserError, match=r'^device "cuda" asked for, but torch .* is built for .*: use auto or cpu$'
    ) as e:
        select_device("cuda")
    assert said in str(e.value)
    gpu, nccl, flex = list(doctor.optional_parts())[:3]
    assert (gpu.here, nccl.here, flex.here) == (None, None, None)
    assert said in gpu.missing and gpu.missing.endswith("runs are on the CPU")


def test_hidden_gpus_are_no_fault(build: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    build("cuda", error=OLD_DRIVER, cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert accelerator().obstacle.endswith('CUDA 13.0, and sees no such device here with CUDA_VISIBLE_DEVICES=""')
    assert not accelerator().is_fault
    build("cuda", error="No CUDA GPUs are available", cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert accelerator().obstacle.endswith('here with CUDA_VISIBLE_DEVICES="7"')


GPUS = {
    "CUDA": ({"kind": "cuda", "cuda": "13.0"}, "2 x Big GPU, CUDA 13.0", "cpu:gloo,cuda:nccl"),
    "ROCm": ({"kind": "cuda", "hip": "7.1"}, "2 x Big GPU, ROCm 7.1", "cpu:gloo,cuda:nccl"),
    "XPU": ({"kind": "xpu"}, "2 x Big GPU, XPU", "cpu:gloo,xpu:xccl"),
    "MPS": ({"kind": "mps"}, "2 x mps, MPS", "cpu:gloo,mps:gloo"),
}


@pytest.mark.parametrize(("answers", "here", "carried_by"), GPUS.values(), ids=GPUS)
def test_each_rank_has_a_device_of_its_own(
    answers: dict, here: str, carried_by: str, build: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(**answers, count=2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    kind = answers["kind"]
    assert select_device("auto") == select_device(kind) == torch.device(kind, 0)
    assert select_device("auto", 1) == select_device(f"{kind}:1", 0) == torch.device(kind, 1)
    assert select_device("cpu", 5) == CPU
    with pytest.raises(UserError, match=f"^rank 2 of this machine has no {kind} device of its own, there are 2: start"):
        select_device("auto", 2)
    with pytest.raises(UserError, match=f'"{kind}:2" asked for, the last of 2 here is {kind}:1$'):
        select_device(f"{kind}:2")
    with pytest.raises(UserError, match='^device "xla" asked for, but this machine has '):
        select_device("xla")
    assert next(iter(doctor.optional_parts())).here == here
    assert n_gpus() == (2 if kind == "cuda" else 0)
    assert backends(torch.device(kind, 1)) == carried_by and backends(CPU) == "gloo"


def test_what_an_accelerator_tells_of_itself(build: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the module that PyTorch has for it, where that can."""
    xpu, mps = torch.device("xpu", 0), torch.device("mps", 0)
    state = torch.arange(3, dtype=torch.uint8)
    told, module = (
        [],
        SimpleNamespace(
            get_device_name=lambda device: "Max 1550",
            mem_get_info=lambda device: (7, 9),
            max_memory_allocated=lambda device: 5,
            get_rng_state=lambda device: state,
            set_rng_state=lambda state, device: told.append((state, device)),
        ),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module if device == xpu else SimpleNamespace())
    assert (describe(xpu), free_memory(xpu), peak_memory(xpu)) == ("Max 1550 (xpu:0)", 7, 5)
    states = random_tensors(3, xpu)
    assert list(states) == ["random.3.cpu", "random.3.xpu"]
    set_random(states, xpu)
    assert len(told) == 1 and told[0][0] is state and told[0][1] == xpu
    assert (describe(mps), free_memory(mps)) == ("mps (mps:0)", None)
    assert peak_memory(mps) == pytest.approx(peak_memory(CPU), rel=0.1)


def test_the_cpu_counts_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for n, said in ((1, "cpu, 1 thread"), (2, "cpu, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        assert describe(CPU) == said


def test_pinned_memory_wants_an_accelerator() -> None:
    """In the run, not on the machine that plans or describes it."""
    pinned = Checkpoint(enable=True, async_mode="async_with_pinned_mem")
    assert not list(pinned.problems())
    check_pinned(pinned, torch.device("cuda"))
    check_pinned(Checkpoint(enable=True, async_mode="async"), CPU)
    with pytest.raises(UserError, match="async_with_pinned_mem needs an accelerator: use async on a cpu"):
        check_pinned(pinned, CPU)


DRIVER = r"""
#include <string.h>
static int zero(unsigned flags) { return 0; }
static int version(int *v) { *v = 11040; return 0; }
int cuGetProcAddress(const char *name, void **found, int v, unsigned long long flags) {
    *found = !strcmp(name, "cuInit") ? (void *)zero : !strcmp(name, "cuDriverGetVersion") ? (void *)version
           : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress : 0;
    return *found ? 0 : 500;
}
int cuGetProcAddress_v2(const char *name, void **found, int v, unsigned long long flags, int *status) {
    return cuGetProcAddress(name, found, v, flags);
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { return version(v); }
int cuGetExportTable(const void **table, const void *id) { return 500; }
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="asks a build for CUDA; nox -s cuda_build has one")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_pytorch_itself_answers_so_for_an_old_driver(tmp_path: Path) -> None:
    """A library in the driver's place that says it is of CUDA 11.4."""
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")], check=True)
    code = "import torch\nfrom core.runtime.device import select_device\nprint(select_device('auto'))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "cpu\n"
    assert "the CPU is used: torch" in done.stderr and "it serves CUDA 11.4 at most; update the driver" in done.stderr
