"""Steps whose loss or gradient norm stands far above those before them, which a run may leave out."""

from collections import deque
from collections.abc import Mapping
from math import sqrt

from core.step.settings import Debug


class SpikeDetector:
    """Compares each step with the `spike_window` steps before it, by z-scores of its loss and of its gradient norm.

    A step that was left out joins the window as any other, so that numbers which stay high are no spike for long. All
    ranks have the same numbers, and so come to the same result.
    """

    def __init__(self, config: Debug) -> None:
        self.config = config
        self.skipped = 0
        """Steps of the run that were left out, those that were not finite included."""
        self._window: dict[str, deque[float]] = {
            name: deque(maxlen=config.spike_window) for name in ("loss", "grad_norm")
        }

    def spike(self, loss: float, grad_norm: float) -> str:
        """What of a step is a spike, in words, empty for none or while the window is not full; both join the window."""
        if self.config.on_spike == "keep":
            return ""
        found = ""
        for (name, window), value in zip(self._window.items(), (loss, grad_norm), strict=True):
            if len(window) == self.config.spike_window:
                mean = sum(window) / len(window)
                deviation = sqrt(sum((each - mean) ** 2 for each in window) / len(window))
                if deviation > 0 and value > mean + self.config.spike_z_score * deviation:
                    found = found or (
                        f"{name} {value:.4g} is {(value - mean) / deviation:.1f} standard deviations above the mean "
                        f"{mean:.4g} of {len(window)} steps"
                    )
            window.append(value)
        return found

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of it."""
        return {"skipped": [self.skipped], **{name: list(window) for name, window in self._window.items()}}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Go on from what a checkpoint kept; an older one kept nothing."""
        self.skipped = int(state["skipped"][0]) if state else 0
        for name, window in self._window.items():
            window.extend(state.get(name, []))
