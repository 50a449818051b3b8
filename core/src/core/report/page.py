"""The report of runs: one HTML page that needs nothing but itself."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from core.report.comparison import differing_settings, mixed_versions, written
from core.report.curves import drawn_curves, heat_maps
from core.report.run_folder import RunFolder

ASSETS = files("core.report") / "assets"
UPLOT = "uPlot-1.6.32.min"
PLACES_OF_FILES = {
    "/*{charts.css}*/": f"{UPLOT}.css",
    "/*{page.css}*/": "page.css",
    "/*{library.js}*/": f"{UPLOT}.js",
    "/*{charts.js}*/": "charts.js",
    "/*{page.js}*/": "page.js",
}
"""What stands in page.html for a file."""


def page_data(runs: Sequence[RunFolder], *, version: int = 0, following: bool = False) -> dict[str, Any]:
    """What the page shows, as data; `version` counts its changes, and a page that is `following` asks for more."""
    return {
        "version": version,
        "following": following,
        "notes": list(mixed_versions(runs)),
        "differences": differing_settings(runs) if len(runs) > 1 else [],
        "runs": [run_data(run) for run in runs],
    }


def run_data(run: RunFolder) -> dict[str, Any]:
    """What the page shows of a run."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "notes": run.notes,
        "facts": run.facts(),
        "maps": heat_maps(run.columns),
        "events": run.shown_events(),
        "settings": [[path, written(value)] for path, value in run.settings().items()],
        "system": (run.systems() or [{}])[-1],
        "schedule": run.schedule(),
        "profiles": run.profiles,
        "plan": list(run.planned()),
        **drawn_curves(run.columns),
    }


def page_text(data: dict[str, Any]) -> str:
    """The page that shows this data."""
    page = (ASSETS / "page.html").read_text(encoding="utf-8")
    for mark, name in PLACES_OF_FILES.items():
        page = page.replace(mark, (ASSETS / name).read_text(encoding="utf-8"))
    return page.replace("{data}", page_json(data).replace("<", "\\u003c"))


def page_json(data: dict[str, Any]) -> str:
    """The data as strict JSON, in which a number that is not finite is null."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False)


def finite(value: Any) -> Any:
    """The value with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0 else value
