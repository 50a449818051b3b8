"""Whole steps, for `gpu.py`: of the debug recipes beside the same on the CPU, and of published sizes."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from random_rows import random_run

from core.plan.plan import plan
from core.quantization.float8 import Float8LinearConverter
from core.runtime.device import GIB, device_name, peak_flops, peak_memory
from core.step.update import StepInfo
from core.train.step_times import time_table
from core.train.trainer import Trainer
from qwen3.configs import qwen3_0_6b, qwen3_1_7b, qwen3_debug

RECIPES = {
    "qwen3_debug": "qwen3",
    "llama3_debug": "llama3",
    "qwen3_moe_debug": "qwen3",
    "deepseek_v3_debug": "deepseek_v3",
    "gpt_oss_debug": "gpt_oss",
}
"""The debug recipes, and the packages that they are in; those that are not installed are left out."""
CLOSE = 0.01
"""How far a loss in bf16 may lie from the CPU's in fp32, as a share of it."""
Row = dict[str, Any]
Cases = Iterator[tuple[Row, Callable[[], Row]]]
"""What a section measures: labels of a row, and what finds its figures."""


def seconds(run: Trainer, first: int, n: int) -> float:
    """Seconds of a step, of the `n` from `first` on."""
    synchronize(run.device)
    began = time.perf_counter()
    for number in range(first, first + n):
        run.step(number)
    synchronize(run.device)
    return (time.perf_counter() - began) / n


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)


def environment(device: torch.device, tiny: bool) -> Cases:
    """What is measured on."""
    del tiny

    def found() -> Row:
        row: Row = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads()}
        if device.type != "cpu":
            free, total = torch.get_device_module(device).mem_get_info(device)
            row |= {"name": device_name(device), "free GiB": free / GIB, "total GiB": total / GIB}
            row |= {"capability": ".".join(map(str, torch.cuda.get_device_capability(device)))}
            row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return row

    yield {}, found


def installed() -> dict[str, Callable[[], Trainer.Config]]:
    """The debug recipes whose packages are there."""
    return {
        name: getattr(import_module(f"{package}.configs"), name)
        for name, package in RECIPES.items()
        if find_spec(package) is not None
    }


def small(recipe: Callable[[], Trainer.Config], tiny: bool) -> Trainer.Config:
    config = recipe()
    if tiny:
        config.training.local_batch_size, config.training.seq_len, config.model.n_layers = 2, 16, 2
    return config


def recipes(device: torch.device, tiny: bool) -> Cases:
    """Three steps of every debug recipe, eager and then compiled, against the same weights on the CPU in fp32."""
    expected: dict[str, tuple[dict[str, torch.Tensor], list[StepInfo]]] = {}
    for compiled in (False, True):
        for name, recipe in list(installed().items())[: 1 if compiled and tiny else None]:
            compared = partial(compare, recipe, name, expected, device, compiled=compiled, tiny=tiny)
            yield {"recipe": name, "compiled": compiled}, compared


def compare(
    recipe: Callable[[], Trainer.Config],
    name: str,
    expected: dict[str, tuple[dict[str, torch.Tensor], list[StepInfo]]],
    device: torch.device,
    *,
    compiled: bool,
    tiny: bool,
) -> Row:
    """A recipe's first steps beside those on the CPU, which are `expected` or else computed."""
    if name not in expected:
        with random_run(small(recipe, tiny), torch.device("cpu")) as own:
            weights = {key: value.clone() for key, value in own.built.models[0].state_dict().items()}
            expected[name] = weights, [own.step(number) for number in (1, 2, 3)]
    weights, theirs = expected[name]
    config = small(recipe, tiny)
    config.compile.enable, config.compile.backend = compiled, "aot_eager" if tiny else "inductor"
    with random_run(config, device) as run:
        run.built.models[0].load_state_dict(weights)
        began = time.perf_counter()
        found = [run.step(1)]
        first_s = time.perf_counter() - began
        found += [run.step(2), run.step(3)]
        step_s = seconds(run, 4, 1 if tiny else 5)
    off = max(abs(a.loss - b.loss) / b.loss for a, b in zip(found, theirs, strict=True))
    return {
        "loss": found[0].loss,
        "loss off": off,
        "norm off": abs(found[0].grad_norm / theirs[0].grad_norm - 1),
        "equal": off < CLOSE,
        "first step s": first_s,
        "tokens/s": config.training.local_batch_size * config.training.seq_len / step_s,
    }


def speed(config: Trainer.Config, device: torch.device, n: int) -> Row:
    """Speed and peak of a recipe's steps, and the plan's prediction."""
    torch.compiler.reset()
    reset_peak(device)
    with random_run(config, device) as run:
        began = time.perf_counter()
        run.step(1)
        synchronize(device)
        first_s, step_s = time.perf_counter() - began, seconds(run, 2, n)
        last = run.step(n + 2)
    flops = run.flops_per_token.total
    tokens_per_s = config.training.local_batch_size * config.training.seq_len / step_s
    peak, measured = peak_flops(device), None if device.type == "cpu" else peak_memory(device)
    planned = plan(replace(config, compile=type(config.compile)()), world_size=1, rank=0).peak_bytes
    return {
        "tokens/s": tokens_per_s,
        "mfu": None if peak is None else tokens_per_s * flops / peak,
        "step s": step_s,
        "first step s": first_s,
        "peak GiB": None if measured is None else measured / GIB,
        "planned GiB": planned / GIB,
        "peak off": None if measured is None else measured / planned - 1,
        "loss": last.loss,
    }


def sizes(device: torch.device, tiny: bool) -> Cases:
    """Published sizes: what backward keeps, torch.compile, float8, attention kernels."""
    float8 = Float8LinearConverter.Config(emulate=tiny)
    cases: list[tuple[Callable[[], Trainer.Config], Row]] = [
        (qwen3_1_7b, {"mode": "selective", "compiled": True}),
        (qwen3_1_7b, {"mode": "selective", "compiled": False}),
        (qwen3_1_7b, {"mode": "none", "compiled": True}),
        (qwen3_1_7b, {"mode": "selective", "compiled": True, "float8": True}),
        (qwen3_1_7b, {"mode": "selective", "compiled": True, "attention": "varlen"}),
        (qwen3_1_7b, {"mode": "selective", "compiled": True, "attention": "flex"}),
        (qwen3_0_6b, {"mode": "selective", "compiled": True}),
        (qwen3_1_7b, {"mode": "full", "compiled": False}),
        (qwen3_1_7b, {"mode": "none", "compiled": False}),
        (qwen3_0_6b, {"mode": "none", "compiled": True}),
        (qwen3_0_6b, {"mode": "none", "compiled": False}),
        (qwen3_1_7b, {"mode": "full", "compiled": True}),
    ]
    for recipe, case in cases[2:6] if tiny else cases:
        config = small(qwen3_debug if tiny else recipe, tiny)
        config.activation_checkpoint.mode = case["mode"]
        config.model.attention.backend = case.get("attention", "sdpa")
        config.converters = [float8] if case.get("float8") else []
        config.compile.enable = case["compiled"] and not tiny
        yield {"recipe": recipe.__name__, **case}, partial(speed, config, device, 1 if tiny else 8)


def waits(device: torch.device, tiny: bool) -> Cases:
    """How often, and where, the host waits for a GPU in a step of every debug recipe, without reports."""
    for name, recipe in installed().items():
        yield {"recipe": name}, partial(waits_of, recipe, device, tiny)


def waits_of(recipe: Callable[[], Trainer.Config], device: torch.device, tiny: bool) -> Row:
    tells = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    with random_run(small(recipe, tiny), device) as run, warnings.catch_warnings(record=True) as caught:
        run.step(1)
        warnings.simplefilter("always")
        tells("warn")
        run.step(2)
        tells("default")
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    places = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in found})
    return {"waits": len(found) if device.type == "cuda" else None, "where": ", ".join(places)}


def profile(device: torch.device, tiny: bool) -> Cases:
    """Where the time of a step goes, by kinds and by operations."""
    yield {}, partial(profiled, device, tiny)


def profiled(device: torch.device, tiny: bool) -> Row:
    config = small(qwen3_debug if tiny else qwen3_0_6b, tiny)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with random_run(config, device) as run:
        run.step(1)
        run.step(2)
        with torch.profiler.profile(activities=activities) as recorded:
            run.step(3)
            synchronize(device)
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    kinds = time_table(recorded.events(), f"where the time of a step of {config.model.n_layers} layers goes")
    return {"text": kinds + recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)}
