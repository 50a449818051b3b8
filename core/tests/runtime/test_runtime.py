"""Devices, seeds, signals and the log."""

import logging
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from core.config.errors import UserError
from core.runtime import device as devices
from core.runtime.device import accelerator, free_memory, peak_flops, peak_memory, select_device
from core.runtime.log import start_logging
from core.runtime.seed import seed_everything
from core.runtime.signals import SIGNALS, StopRequest
from core.testing.ranks import run_ranks

CPU = torch.device("cpu")


def test_auto_is_the_accelerator_or_the_cpu():
    assert select_device("auto").type == (accelerator().type if accelerator().count else "cpu")
    assert select_device("cpu") == CPU


def test_nonsense_device_is_refused():
    with pytest.raises(UserError, match='^"gpu" is not a device: use auto, cpu or cuda$'):
        select_device("gpu")


def memory_before_and_with_a_gibibyte() -> list[tuple[int, int | None]]:
    """Peak and free memory of a process that never held more."""
    before = peak_memory(CPU), free_memory(CPU)
    held = torch.ones(2**28)
    seen = [before, (peak_memory(CPU), free_memory(CPU))]
    del held
    return seen


def test_memory_grows_with_what_is_held():
    (((peak, free), (peak_with, free_with)),) = run_ranks(memory_before_and_with_a_gibibyte, 1)
    assert peak_with - peak == pytest.approx(2**30, rel=0.1)
    assert free is not None and free_with < free - 2**29


def test_container_limit_counts(tmp_path, monkeypatch):
    real = devices.Path

    def path(*parts):
        return tmp_path / parts[-1] if parts[0] == "/sys/fs/cgroup" else real(*parts)

    monkeypatch.setattr(devices, "Path", path)
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 2**20
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    assert free_memory(CPU) == 300 + 150


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Something new", None),
    ],
)
def test_peaks_by_name(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops


def test_a_cpu_has_no_stated_peak():
    assert peak_flops(CPU) is None


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_one_seed_starts_every_generator():
    seed_everything(3, deterministic=False)
    first = draws()
    assert draws() != first
    seed_everything(3, deterministic=False)
    assert draws() == first
    seed_everything(4, deterministic=False)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_determinism_is_set_and_taken_back(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    seed_everything(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_a_request_and_handlers_return(number, capsys):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop and stop.told() is None
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number
        assert stop.told() == f"{number.name}: stopping after this step (once more to stop at once)"
        assert stop.told() is None
    assert signal.getsignal(number) == before
    assert capsys.readouterr() == ("", "")  # a handler may run in the middle of a print


def test_a_signal_may_ask_for_a_checkpoint_as_often_as_it_likes():
    with StopRequest(saving=signal.SIGUSR1) as stop:
        for _ in range(2):
            assert not stop.take_save()
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.take_save() and not stop and stop.told() is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.signal == signal.SIGUSR2 and not stop.take_save()


def test_what_ignores_or_uses_a_signal_keeps_it():
    heard: list[int] = []
    mine = {signal.SIGHUP: signal.SIG_IGN, signal.SIGUSR2: lambda number, frame: heard.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    try:
        with StopRequest() as stop:
            for number in mine:
                os.kill(os.getpid(), number)
            assert not stop and heard == [signal.SIGUSR2]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TWICE = """
import os, signal, sys
from core.runtime.signals import StopRequest
with StopRequest() as stop:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), signal.Signals[name])
    assert stop
print("still here")
"""


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["SIGTERM", "SIGTERM"], -signal.SIGTERM),
        (["SIGUSR1", "SIGINT"], -signal.SIGINT),
        (["SIGINT", "SIGUSR2"], -signal.SIGUSR2),
        (["SIGHUP", "SIGHUP"], 0),  # as a terminal sends it that closes
        (["SIGTERM", "SIGHUP"], 0),
        (["SIGHUP", "SIGTERM"], -signal.SIGTERM),
    ],
)
def test_second_signal_ends_the_process_at_once(names, code):
    done = subprocess.run([sys.executable, "-c", TWICE, *names], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and ("still here" in done.stdout) == (code == 0)


def test_log_is_plain_and_marks_warnings(capsys):
    start_logging()
    start_logging()
    log = logging.getLogger("armature")
    log.info("read 3 files")
    log.warning("one was empty")
    assert capsys.readouterr().out == "read 3 files\nwarning: one was empty\n"
