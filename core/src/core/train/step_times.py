"""Where the time of a step goes: the events of a recording by what they are for."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from core.step.rows_ahead import ROWS_EVENT

DATA = "data"
KINDS = {
    "attention": (
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "armature::tiled_attention",
        "flex_",
    ),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::_scaled_"),
    "norms": ("aten::rms_norm", "aten::_fused_rms_norm", "armature::cpu_rms_norm"),
    "loss": ("SoftmaxLoss", "aten::log_softmax", "aten::logsumexp"),
    "optimizer, clipping": ("aten::_foreach", "aten::_fused_adam", "aten::lerp"),
    DATA: (ROWS_EVENT,),
    "communication": ("nccl:", "gloo:", "c10d::", "_c10d", "record_param_comms", "FSDP::"),
}
"""What an event is for, by how its name begins, or that of the outermost event around it that is named here."""
OTHER_OPERATIONS, IDLE_TIME = "other operations", "idle, Python between operations"
STEP_EVENT = "ProfilerStep"


def time_table(events: Iterable[Any], title: str) -> str:
    """A table of milliseconds per step and shares of a recording with torch.profiler; `events` are its FunctionEvents.

    An accelerator's time is that of its kernels, and of the wait for data; on a CPU it is that of the operations
    themselves, whichever thread of the program calls them.
    """
    events = list(events)
    steps = [event for event in events if event.name.startswith(STEP_EVENT) and is_of_cpu(event)]
    n_steps, wall = max(len(steps), 1), sum(event.time_range.elapsed_us() for event in steps)
    spent = Counter(dict(times_by_kind(events)))
    rows = {kind: spent[kind] for kind in (*KINDS, OTHER_OPERATIONS)}
    rows[IDLE_TIME] = max(wall - sum(rows.values()), 0.0)
    total = sum(rows.values()) or 1.0
    lines = [title, "", f"{'':36}{'ms per step':>12}{'share':>9}"]
    lines += [f"{kind:36}{us / n_steps / 1000:12,.2f}{us / total:9.1%}" for kind, us in rows.items()]
    lines.append(f"{'a step':36}{wall / n_steps / 1000:12,.2f}")
    return "\n".join(lines) + "\n"


def times_by_kind(events: list[Any]) -> Iterator[tuple[str, float]]:
    """Microseconds by kind, of the kernels if there are any.

    PyTorch counts a kernel for the operation that launched it, and lists it beside the operations once more; only those
    that nobody launched, as far as is known, are taken from there.
    """
    on_device = any(event.self_device_time_total for event in events)
    measure = "self_device_time_total" if on_device else "self_cpu_time_total"
    spent: Counter[str] = Counter()
    for event in filter(is_of_cpu, events):
        if not event.name.startswith(STEP_EVENT) and not (on_device and event.name == ROWS_EVENT):
            spent[kind_of(event)] += getattr(event, measure)
    kernels = (event for event in events if not is_of_cpu(event) and not event.is_user_annotation)
    spent[OTHER_OPERATIONS] += max(sum(event.self_device_time_total for event in kernels) - spent.total(), 0.0)
    if on_device:
        spent[DATA] += sum(e.time_range.elapsed_us() for e in events if e.name == ROWS_EVENT and is_of_cpu(e))
    yield from spent.items()


def is_of_cpu(event: Any) -> bool:
    """Whether an event is of the program, and no mark of it among the kernels of an accelerator."""
    return str(event.device_type).endswith("CPU")


def kind_of(event: Any) -> str:
    """What an event is for."""
    found = OTHER_OPERATIONS
    while event is not None:
        found = next((kind for kind, names in KINDS.items() if event.name.startswith(names)), found)
        event = event.cpu_parent
    return found
