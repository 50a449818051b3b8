"""Settings of a run that belong to no single part."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Literal

import torch

from core.config.configurable import Configurable, range_problems
from core.data.samples import MaskKind, Samples

MOST_TOKENS_PER_STEP = 2**30
"""They lie in the host's memory, and no published run came near."""


@dataclass(kw_only=True, slots=True)
class Training(Configurable.Config):
    """How long, how much at once, and in which precision."""

    steps: int = 10_000
    """Optimizer updates of the run."""
    seq_len: int = 2048
    """Tokens in a row."""
    local_batch_size: int = 8
    """Rows in one microbatch on one data rank."""
    global_batch_size: int = -1
    """Rows in one step over all ranks and microbatches; -1 is one microbatch per rank. Gradients of more microbatches
    are accumulated."""
    mask: Literal["auto", "causal", "document"] = "auto"
    """What a token may look at: all before it in its row, or only those of its own document (positions restart); auto
    is document where rows hold whole documents, as of conversations."""
    max_norm: float = 1.0
    """Gradients are scaled down to this joint norm, but for groups of the optimizer with a norm of their own; inf
    leaves them as they are."""
    fixed_norm: float | None = None
    """Take this for the joint norm, whatever it is: gradients are scaled by max_norm / fixed_norm in every step, as is
    known before backward (optimizer.in_backward). Without it the norm of the step counts."""
    max_value: float | None = None
    """Instead of a norm (set max_norm inf): each number of a gradient is cut to this size."""
    device: str = "auto"
    """auto (the accelerator, or else the CPU), cpu, or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; bfloat16 is rounded stochastically, so that small updates are not lost."""
    mixed_precision_param: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that matrix products compute in; auto is bfloat16 on an accelerator and the type of the weights on a CPU,
    where bfloat16 is many times slower."""
    gc_freq: int = 50
    """Python's cycle collector runs every so many steps, at a moment of our choice."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from range_problems(self, steps=2**40, seq_len=2**30, local_batch_size=2**20, gc_freq=2**40)
        for name in ("max_norm", "max_value"):
            if (value := getattr(self, name)) is not None and not value > 0:
                yield name, f"{name} {value} must be above 0; inf leaves gradients as they are"
        if self.fixed_norm is not None and not self.max_norm < self.fixed_norm < inf:
            yield (
                "fixed_norm",
                f"fixed_norm {self.fixed_norm} must be finite and above max_norm {self.max_norm}, to which it is "
                "scaled: lower max_norm, or leave fixed_norm out",
            )
        if self.max_value is not None and self.max_norm < inf:
            yield (
                "max_value",
                f"max_value {self.max_value} and max_norm {self.max_norm}: choose one, and set the other inf",
            )
        if self.global_batch_size != -1 and (
            self.global_batch_size < 1 or self.global_batch_size % max(self.local_batch_size, 1)
        ):
            yield (
                "global_batch_size",
                f"global_batch_size {self.global_batch_size} must be a multiple of local_batch_size "
                f"{self.local_batch_size}, or -1",
            )
        if (tokens := self.rows_per_step() * self.seq_len) > MOST_TOKENS_PER_STEP:
            yield "global_batch_size", f"a step of {tokens:,} tokens must have at most {MOST_TOKENS_PER_STEP:,}"
        if self.dtype == "bfloat16" and self.mixed_precision_param == "float32":
            yield (
                "mixed_precision_param",
                "mixed_precision_param float32 cannot be had from weights in bfloat16: set dtype float32, or auto here",
            )

    def rows_per_step(self, n_data: int = 1) -> int:
        """Rows in one step when `n_data` ranks read different ones."""
        return self.local_batch_size * n_data if self.global_batch_size == -1 else self.global_batch_size

    def mask_of(self, data: Samples.Config) -> MaskKind:
        """What a token may look at in rows of such data."""
        return data.mask() if self.mask == "auto" else self.mask

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The type of matrix products on `device`."""
        if self.mixed_precision_param != "auto":
            return getattr(torch, self.mixed_precision_param)
        return getattr(torch, self.dtype) if device.type == "cpu" else torch.bfloat16


@dataclass(kw_only=True, slots=True)
class Compile(Configurable.Config):
    """torch.compile, block by block."""

    enable: bool = False
    """Compile what `components` names."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """Every block of the model, the loss, or both. Cross-entropy on a CPU is left as it is, which is faster."""
    backend: str = "inductor"
    """Backend of torch.compile."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.enable:
            return
        if not self.components:
            yield "components", "components is empty: name model, loss or both, or unset enable"
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            usual = ", ".join(torch.compiler.list_backends())
            yield "backend", f"backend {self.backend} is not known to torch.compile: use one of {usual}"

    def takes(self, component: Literal["model", "loss"]) -> bool:
        """Whether that part of the run is compiled."""
        return self.enable and component in self.components

    def shows_blocks(self) -> bool:
        """Whether blocks run as modules do, so that what looks into them sees each step."""
        return not self.takes("model")


@dataclass(kw_only=True, slots=True)
class Debug(Configurable.Config):
    """Seeds, determinism, and what to do when numbers break."""

    seed: int = 0
    """Starts the weights, the order of the data, and every other draw; from 0 to 2^63 - 1."""
    deterministic: bool = False
    """Only algorithms whose result is the same every time; an operation without one is an error. A CPU repeats itself
    without this."""
    detect_anomaly: bool = False
    """End with a traceback to the operation whose backward made the first NaN (slow)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient norm that is not finite does: end the run before the update, or leave the step out."""
    on_spike: Literal["keep", "skip"] = "keep"
    """What a finite loss or gradient norm far above those before it does: nothing, or leave the step out."""
    spike_z_score: float = 6.0
    """How far: in standard deviations above the mean of the window."""
    spike_window: int = 128
    """Steps that a step is compared with; the first ones have nothing to be compared with."""
    log_every_rank: bool = False
    """Each rank writes its messages to logs/rank-<number>.log in the run's folder; without it only the first speaks."""
    moe_force_load_balance: bool = False
    """Deal out tokens to experts in turn, whatever the router says: for measuring speed, not for learning."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.seed < 2**63:
            yield "seed", f"seed {self.seed} must be from 0 to 2^63 - 1"
        if not 0 < self.spike_z_score < inf:
            yield "spike_z_score", f"spike_z_score {self.spike_z_score} must be a finite number above 0"
        yield from range_problems(self, low=2, spike_window=2**20)
        if self.detect_anomaly and self.on_nonfinite == "skip":
            yield "on_nonfinite", "detect_anomaly ends the run at the first NaN, skip goes on: choose one of the two"
