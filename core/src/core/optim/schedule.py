"""The learning rate as a pure function of the step: warm up, stay, decay."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from core.config.configurable import Configurable

log = logging.getLogger("armature")


class Schedule(Configurable):
    """Warmup-stable-decay (arXiv:2404.06395): linear warm-up, a plateau, then a decay to `min_lr_factor`.

            1 |    ________
              |   /        \\
              |  /          \\
          min | /            \\
              +-warmup-stable-decay-> step

    The last step does not reach the minimum: a decay of n steps ends one n-th above it, as the decay would hit the
    minimum one step after the run.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        warmup_steps: int = 200
        """Steps until the learning rate reaches its peak."""
        total_steps: int | None = None
        """Length of the schedule; without it the length of the run."""
        decay_ratio: float | None = None
        """Share of the schedule that decays; without it everything after the warm-up."""
        decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
        """Shape of the decay: 1 - p, 1 - sqrt(p), or (1 + cos(pi p)) / 2 of the progress p."""
        min_lr_factor: float = 0.0
        """Where the decay ends, as a share of the peak."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if self.warmup_steps < 0:
                yield "warmup_steps", f"warmup_steps {self.warmup_steps} must not be negative"
            if self.total_steps is not None and self.total_steps < 1:
                yield "total_steps", f"total_steps {self.total_steps} must be at least 1"
            if self.decay_ratio is not None and not 0 <= self.decay_ratio <= 1:
                yield "decay_ratio", f"decay_ratio {self.decay_ratio} must be between 0 and 1"
            if not 0 <= self.min_lr_factor <= 1:
                yield "min_lr_factor", f"min_lr_factor {self.min_lr_factor} must be between 0 and 1"

    def __init__(self, config: Config, *, steps: int) -> None:
        self.config = config
        total = config.total_steps or steps
        self.warmup = min(config.warmup_steps, total)
        decay = total - self.warmup if config.decay_ratio is None else round(total * config.decay_ratio)
        self.decay = min(decay, total - self.warmup)
        self.stable = total + 1 - self.warmup - self.decay
        wanted = {"warms up": (self.warmup, config.warmup_steps), "decays": (self.decay, decay)}
        cut = [f"{verb} for {n} of {all_of_it} steps" for verb, (n, all_of_it) in wanted.items() if n < all_of_it]
        if cut:
            log.warning(f"{total} steps are few for the learning rate's schedule: it {' and '.join(cut)}")

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at `step`, counted from 1."""
        done = step - 1
        if done < self.warmup:
            return step / self.warmup
        if done < self.warmup + self.stable:
            return 1.0
        progress = min((step - self.warmup - self.stable) / max(self.decay, 1), 1.0)
        shape = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.config.decay_type]
        return self.config.min_lr_factor + (1 - self.config.min_lr_factor) * shape
