"""What ranks and the wires between them do in a second."""

import json
from dataclasses import dataclass, fields, replace

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


H100 = Hardware(
    memory_gib=94,
    ranks_per_host=8,
    matmul_tflops=465,
    float8_tflops=635,
    attention_tflops=570,
    memory_gb_s=2400,
    inner_gb_s=400,
    outer_gb_s=45,
    host_gb_s=50,
    eager_passes=345,
    compiled_passes=140,
    overlap=0.2,
)
KNOWN = {"h100": H100}
"""By name; README.md says where the figures come from."""


def hardware(name: str) -> Hardware:
    """The hardware of this name, or of a JSON file, which changes fields of the one that its "like" names (h100)."""
    if name in KNOWN:
        return KNOWN[name]
    if not name.endswith(".json"):
        raise UserError(f"no hardware {name}; {', '.join(KNOWN)} are known, or give a .json file")
    data = read_json(name)
    like = data.pop("like", "h100")
    if like not in KNOWN:
        raise UserError(f"{name}: no hardware {like!r} to be like: use one of {', '.join(KNOWN)}")
    known = [field.name for field in fields(Hardware)]
    for key, value in data.items():
        if key not in known:
            raise UserError(f"{name}: no figure {key}; {did_you_mean(key, known, n=3) or ', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{name}: {key} must be a number above 0, got {json.dumps(value)}")
    return replace(KNOWN[like], **data)
