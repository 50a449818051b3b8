"""Which checkpoints are kept."""

from collections.abc import Mapping


def to_remove(
    steps: Mapping[int, float | None], *, latest: int, every: int, best: int, pinned: frozenset[int]
) -> list[int]:
    """The steps, of those that have a checkpoint with this validation loss, that no rule keeps.

    Kept are the `latest` newest (0 is all), those that `every` divides (0 is none), the `best` with the lowest
    validation loss (the newer of equals), those that are `pinned`, and always the newest.
    """
    newest = sorted(steps, reverse=True)
    measured = [(loss, -step) for step, loss in steps.items() if loss is not None]
    kept = set(newest[: latest or len(newest)]) | set(newest[:1]) | pinned
    kept |= {step for step in newest if every and step % every == 0}
    kept |= {-step for _, step in sorted(measured)[:best]}
    return sorted(set(steps) - kept)
