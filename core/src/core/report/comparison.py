"""What differs between runs, as text: --diff and --table."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from core.config.errors import at_most
from core.config.record import differences
from core.report.run_folder import RunFolder
from core.runtime.units import rate

OWN = ("dump_folder", "recipe")
"""Settings that name a run, and say nothing of it."""
MISSING = "(not stated)"


VERSIONS = ("core", "torch")
"""What of a system a run's numbers depend on."""


def mixed_versions(runs: Sequence[RunFolder]) -> Iterator[str]:
    """What is said of runs, and of starts of one run, that had not the same versions, a line each."""
    for name in VERSIONS:
        found: dict[str, dict[str, None]] = {}
        for run in runs:
            for system in run.systems():
                if name in system:
                    found.setdefault(system[name], {})[run.name] = None
        if len(found) > 1:
            said = (f"{version} ({', '.join(at_most(3, list(names)))})" for version, names in found.items())
            yield f"mixed versions of {name}: {', '.join(said)}"


def differing_settings(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, each with its value in every run."""
    stated = [run.settings() for run in runs]
    paths = dict.fromkeys(path for settings in stated for path in settings)
    table = [(path, [written(settings.get(path, ...)) for settings in stated]) for path in paths if path not in OWN]
    return [(path, values) for path, values in table if len(set(values)) > 1]


def diff_text(before: RunFolder, after: RunFolder) -> str:
    """What differs between the configurations of two runs, a setting a line."""
    lines = [
        f"{path}: {written(old)} -> {written(new)}"
        for path, old, new in differences(after.config, before.config)
        if path != OWN[0]
    ]
    return "\n".join([f"{before.name} -> {after.name}", *(lines or ["no setting differs"])])


def written(value: Any) -> str:
    """A setting as its file has it."""
    return MISSING if value is ... else json.dumps(value)


def leaderboard(runs: Sequence[RunFolder]) -> str:
    """A line per run, the best validation loss first: recipe, steps, losses, speed, and its changes, which are the
    settings in which it differs from most of the runs of its recipe here."""
    ordered = sorted(runs, key=lambda run: (run.best("validation_loss") or run.last("loss") or (inf,))[0])
    rows = [("run", "recipe", "step", "loss", "best val", "at", "tok/s", "changes")]
    usual = {
        recipe: usual_settings([run for run in runs if run.setting("recipe") == recipe]) for recipe in recipes_of(runs)
    }
    for run in ordered:
        last, best, speed = run.last("loss"), run.best("validation_loss"), run.tokens_per_second()
        recipe = run.setting("recipe")
        rows.append(
            (
                run.name,
                str(recipe or ""),
                f"{last[1]:,}" if last else "",
                f"{last[0]:.4f}" if last else "no record",
                f"{best[0]:.4f}" if best else "",
                f"{best[1]:,}" if best else "",
                "" if speed is None else rate(speed),
                ", ".join(changes(run, usual[recipe])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def recipes_of(runs: Sequence[RunFolder]) -> set[Any]:
    """The recipes that these runs are of."""
    return {run.setting("recipe") for run in runs}


def usual_settings(runs: Sequence[RunFolder]) -> dict[str, str]:
    """The value that each setting has in most of these runs; of several the first."""
    stated = [{path: written(value) for path, value in run.settings().items()} for run in runs]
    counts: dict[str, Counter[str]] = {}
    for settings in stated:
        for path, value in settings.items():
            counts.setdefault(path, Counter())[value] += 1
    return {path: values.most_common(1)[0][0] for path, values in counts.items()}


def changes(run: RunFolder, usual: dict[str, str]) -> Iterator[str]:
    """The settings in which a run differs from what is usual."""
    settings = {path: written(value) for path, value in run.settings().items()}
    for path, value in settings.items():
        if path not in OWN and usual[path] != value:
            yield f"{path} {value}"
