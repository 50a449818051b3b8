"""Whole steps, for `gpu.py`: of the debug recipes beside the same on the CPU, and of published sizes."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_rows import random_run

from core.plan.plan import plan
from core.quantization.float8 import Float8LinearConverter
from core.runtime.device import GIB, device_name, peak_flops, peak_memory
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
CLOSE = {"loss off": 0.003, "gradient off": 0.1}
"""How far losses, and all gradients of the first step together, may lie from the CPU's in fp32, as shares of these."""
Row = dict[str, Any]


class Steps(NamedTuple):
    """The losses of three steps, the first's gradients as they were clipped, on the host, and their norm before."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    norm: float


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
        row |= {"C compiler": shutil.which("cc") or shutil.which("gcc") or "none: torch.compile needs one"}
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
    expected: dict[str, tuple[dict[str, torch.Tensor], Steps]] = {}
    for compiled in (False, True):
        for name, recipe in list(installed().items())[: 1 if compiled and tiny else None]:
            compared = partial(compare, recipe, name, expected, device, compiled=compiled, tiny=tiny)
            yield {"recipe": name, "compiled": compiled}, compared


def three_steps(run: Trainer) -> Steps:
    first = run.step(1)
    weights = run.built.models[0].named_parameters()
    gradients = {name: weight.grad.float().cpu() for name, weight in weights if weight.grad is not None}
    return Steps([first.loss, run.step(2).loss, run.step(3).loss], gradients, first.grad_norm)


def compare(
    recipe: Callable[[], Trainer.Config],
    name: str,
    expected: dict[str, tuple[dict[str, torch.Tensor], Steps]],
    device: torch.device,
    *,
    compiled: bool,
    tiny: bool,
) -> Row:
    """A recipe's first steps beside those on the CPU, which are `expected` or else computed; in small in bf16 too."""
    if name not in expected:
        with random_run(small(recipe, tiny), torch.device("cpu")) as own:
            weights = {key: value.clone() for key, value in own.built.models[0].state_dict().items()}
            expected[name] = weights, three_steps(own)
    weights, theirs = expected[name]
    config = small(recipe, tiny)
    config.training.mixed_precision_param = "bfloat16"
    config.compile.enable, config.compile.backend = compiled, "aot_eager" if tiny else "inductor"
    with random_run(config, device) as run:
        run.built.models[0].load_state_dict(weights)
        began = time.perf_counter()
        found = three_steps(run)
        first_s = time.perf_counter() - began
        step_s = seconds(run, 4, 1 if tiny else 5)
    row = {
        "loss off": max(abs(a - b) / b for a, b in zip(found.losses, theirs.losses, strict=True)),
        "gradient off": distance(found.gradients, theirs.gradients),
        "norm off": abs(found.norm / theirs.norm - 1),
    }
    return row | {
        "equal": all(row[key] < limit for key, limit in CLOSE.items()),
        "three steps s": first_s,
        "tokens/s": config.training.local_batch_size * config.training.seq_len / step_s,
    }


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of tensors by name, of any shapes, as a share of that of those expected."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    off, size = (
        torch.stack([side(name).norm() for name in expected]).norm()
        for side in (lambda name: found[name] - expected[name], lambda name: expected[name])
    )
    return float(off / size)


def speed(config: Trainer.Config, device: torch.device, n: int, plans: dict[str, int]) -> Row:
    """Speed and peak of a recipe's steps, and the plan's prediction, which `plans` keeps: it compiles nothing."""
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
    eager = replace(config, compile=type(config.compile)())
    key = repr((eager.model, eager.activation_checkpoint, eager.converters))
    if key not in plans:
        plans[key] = plan(eager, world_size=1, rank=0).peak_bytes
    planned = plans[key]
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
    plans: dict[str, int] = {}
    for recipe, case in cases[2:6] if tiny else cases:
        recipe = qwen3_debug if tiny else recipe
        config = small(recipe, tiny)
        config.activation_checkpoint.mode = case["mode"]
        config.model.attention.backend = case.get("attention", "sdpa")
        config.converters = [float8] if case.get("float8") else []
        config.compile.enable = case["compiled"] and not tiny
        yield {"recipe": recipe.__name__, **case}, partial(speed, config, device, 1 if tiny else 8, plans)


def waits(device: torch.device, tiny: bool) -> Cases:
    """How often, and where, the host waits for a GPU in a step without reports: of every debug recipe on rows of eight
    documents, and of the first by each attention kernel."""
    for name, recipe in installed().items():
        for backend in ("sdpa", "varlen", "flex") if name == next(iter(RECIPES)) else ("sdpa",):
            yield {"recipe": name, "attention": backend}, partial(waits_of, recipe, backend, device, tiny)


def waits_of(recipe: Callable[[], Trainer.Config], backend: str, device: torch.device, tiny: bool) -> Row:
    tells = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    config = small(recipe, tiny)
    config.model.attention.backend, config.training.mask = backend, "document"
    documents = config.training.seq_len // 8
    with random_run(config, device, document_tokens=documents) as run, warnings.catch_warnings(record=True) as caught:
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
    texts: list[str] = []
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"

    def tell(recorded: torch.profiler.profile) -> None:
        texts.append(time_table(recorded.events(), f"where the time of a step of {config.model.n_layers} layers goes"))
        texts.append(recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))

    once = torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1)
    with (
        random_run(config, device) as run,
        torch.profiler.profile(activities=activities, schedule=once, on_trace_ready=tell) as recording,
    ):
        for number in (1, 2, 3):
            run.step(number)
            synchronize(device)
            recording.step()
    return {"text": "\n".join(texts)}
