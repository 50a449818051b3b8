"""What ranks and the wires between them do in a second."""

import json
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from core.config.errors import UserError, did_you_mean
from core.config.json_file import read_json


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Rates that are reached in training, not those of data sheets."""

    memory_gib: float
    """Of a rank, for a run."""
    ranks_per_host: int
    matmul_tflops: float
    """Of products of 16 bits."""
    float8_tflops: float
    """Of products of 8 bits, their scaling included."""
    attention_tflops: float
    """Of causal attention, counted as if every token saw every other."""
    memory_gb_s: float
    """Of the rank's own memory."""
    inner_gb_s: float
    """What a rank sends within its host."""
    outer_gb_s: float
    """What a rank sends to other hosts."""
    host_gb_s: float
    """Between a rank and its host's memory."""
    eager_passes: float
    """How often one forward and backward of a block reads or writes as much as its input, beside products."""
    compiled_passes: float
    """The same under torch.compile."""
    overlap: float
    """The part of tensor-parallel messages that asynchronous tensor parallelism hides."""
    contention: float
    """By how much a computation is slower while FSDP's messages run beside it."""
    inner_delay_us: float
    """What a collective takes for each rank of a host that it passes, however few its bytes."""
    outer_delay_us: float
    """The same for each host."""
    reserve: float
    """What PyTorch's allocator takes of a device beyond the tensors that come and go in a step, in parts of them."""


H100 = Hardware(
    memory_gib=94,
    ranks_per_host=8,
    matmul_tflops=550,
    float8_tflops=950,
    attention_tflops=470,
    memory_gb_s=2400,
    inner_gb_s=400,
    outer_gb_s=45,
    host_gb_s=50,
    eager_passes=400,
    compiled_passes=205,
    overlap=0.28,
    contention=0.05,
    inner_delay_us=3.4,
    outer_delay_us=14,
    reserve=0.1,
)
"""The rates of products and of attention, the passes, `overlap` and `contention` are fitted to eight public runs
(`autolayout.published`); bandwidths are nine tenths of what the wires state, the memory's that of HBM2e. The delays are
NCCL's own, of its Simple protocol in rings (src/graph/tuning.cc). `reserve` lies above what the twelve public runs took
on average, 0.06, and below the most, 0.26."""
KNOWN = {"h100": H100}
"""By name."""
MAY_BE_0 = ("overlap", "contention", "inner_delay_us", "outer_delay_us", "reserve")


def hardware(name: str, bandwidth: str | None = None) -> Hardware:
    """The hardware of this name, or of a JSON file, which changes figures of the one that its "like" names (h100);
    `bandwidth` is a file with figures that differ from it."""
    found = KNOWN.get(name)
    if found is None:
        if not name.endswith(".json"):
            raise UserError(f"no hardware {name}; {', '.join(KNOWN)} are known, or give a .json file")
        data = read_json(name)
        like = data.pop("like", "h100")
        if not isinstance(like, str) or like not in KNOWN:
            raise UserError(f"{name}: no hardware {like!r} to be like: use one of {', '.join(KNOWN)}")
        found = changed(KNOWN[like], data, name)
    return found if bandwidth is None else changed(found, read_json(bandwidth), bandwidth)


def changed(found: Hardware, data: dict[str, Any], file: str) -> Hardware:
    """Hardware with the figures that a file states."""
    known = [field.name for field in fields(Hardware)]
    for key, value in data.items():
        if key not in known:
            raise UserError(f"{file}: no figure {key}; {did_you_mean(key, known, n=3) or ', '.join(known)}")
        least = "at least" if key in MAY_BE_0 else "above"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 < value < math.inf or (value == 0 and key in MAY_BE_0)):
            raise UserError(f"{file}: {key} must be a number {least} 0, got {json.dumps(value)}")
        if key == "ranks_per_host" and not isinstance(value, int):
            raise UserError(f"{file}: ranks_per_host must be a whole number, got {value}")
        if key == "overlap" and value > 1:
            raise UserError(f"{file}: overlap is a part of messages and must be at most 1, got {value}")
    return replace(found, **data)
