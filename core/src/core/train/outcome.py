"""The end of a run on the console."""

from pathlib import Path

from core.runtime.signals import StopRequest


def outcome(step: int, last_step: int, stop: StopRequest, folder: Path, saved: str) -> str:
    """How a run ended after `step`, and what it leaves in its folder; `saved` says what there is to go on from."""
    end = f"finished {step:,} steps"
    if stop or step < last_step:
        cause = stop.signal.name if stop.signal else "a signal to another rank"
        end = f"stopped by {cause} after step {step} of {last_step}"
    return f"{end}; kept in {folder}: config.json and metrics.jsonl ({saved})"
