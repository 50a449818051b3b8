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
    minimum one step after the run. `inverse_sqrt` has no end: it falls as the root of the steps since it began.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        warmup_steps: int = 200
        """Steps until the learning rate reaches its peak."""
        total_steps: int | None = None
        """Length of the schedule; without it the length of the run. With it the run can be made longer at any time."""
        decay_ratio: float | None = None
        """Share of the schedule that decays; without it everything after the warm-up, and 0 keeps the peak."""
        decay_type: Literal["linear", "sqrt", "cosine", "inverse_sqrt"] = "linear"
        """Shape of the decay: 1 - p, 1 - sqrt(p), or (1 + cos(pi p)) / 2 of the progress p; or sqrt(n / step), where n
        is the step at which it begins."""
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
        if self.warmup < config.warmup_steps:
            log.warning(
                f"the learning rate rises for {config.warmup_steps:,} steps, lr_scheduler.warmup_steps, and there are "
                f"{total:,}: it rises faster, for all of them, and never falls; use --lr_scheduler.warmup_steps "
                f"{total // 10}, or more steps"
            )
        elif self.decay < decay:
            log.warning(
                f"of {total:,} steps the learning rate rises for {self.warmup:,}, lr_scheduler.warmup_steps, and falls "
                f"for {self.decay:,}; lr_scheduler.decay_ratio {config.decay_ratio} asks for {decay:,}"
            )
        if steps > total and self.factor(total + 1) == 0:
            log.warning(
                f"the learning rate is 0 after step {total:,}, lr_scheduler.total_steps, and the run has {steps:,}: "
                f"nothing is learned in the last {steps - total:,}"
            )

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at `step`, counted from 1."""
        done = step - 1
        if done < self.warmup:
            return step / self.warmup
        if done < self.warmup + self.stable:
            return 1.0
        if self.config.decay_type == "inverse_sqrt":
            return self._above_minimum(math.sqrt((self.warmup + self.stable) / step))
        progress = min((step - self.warmup - self.stable) / max(self.decay, 1), 1.0)
        shape = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.config.decay_type]
        return self._above_minimum(shape)

    def _above_minimum(self, share: float) -> float:
        return self.config.min_lr_factor + (1 - self.config.min_lr_factor) * share

    def sampled(self, n_steps: int, n: int) -> list[tuple[int, float]]:
        """At most `n` of the steps from 1 to `n_steps`, evenly spread, and the share of the peak that each has."""
        n = min(n, n_steps)
        steps = [1 + round(i * (n_steps - 1) / max(n - 1, 1)) for i in range(n)]
        return [(step, self.factor(step)) for step in steps]

    def picture(self, n_steps: int, width: int, height: int = 4) -> list[str]:
        """Lines of at most `width` characters: what the steps from 1 to `n_steps` have, as columns of marks."""
        shown = self.sampled(n_steps, width)
        return [
            "".join("#" if share * height > level + 0.5 else " " for _, share in shown).rstrip()
            for level in reversed(range(height))
        ]

    def words(self, peak: float) -> str:
        """Between which learning rates it goes, of which the highest is `peak`."""
        low = self.config.min_lr_factor * peak
        return f"up to {peak:g}" + (f", down to {low:g} ({self.config.decay_type})" if self.decay else "")
