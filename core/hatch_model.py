"""The metadata hook of every model's pyproject.toml: inside a checkout, pip takes core from that checkout.

The pyproject names the range of released cores that a published wheel asks an index for. When pip builds the model in
a checkout, the requirement becomes the folder next door instead, so `pip install models/qwen3` needs nothing before it.
A core that is already installed in editable mode from this very checkout is left alone: a direct reference would
replace the live source by a frozen copy. Other builders (`python -m build`, uv) always get the range.
"""

import json
import os
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CORE = "armature-core"


def is_editable(url: str) -> bool:
    """Whether the environment that pip installs into has core in editable mode from `url`."""
    for distribution in distributions(name=CORE, path=[sysconfig.get_path("purelib")]):
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
        return direct.get("url") == url and direct.get("dir_info", {}).get("editable", False)
    return False


class CoreRequirement(MetadataHookInterface):
    """Writes the one dependency of a model: core, as a folder or as a range of versions."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `dependencies` in place; pip marks the builds that it drives by PIP_BUILD_TRACKER."""
        core = Path(self.root).parents[1] / "core"
        in_checkout = "PIP_BUILD_TRACKER" in os.environ and (core / "pyproject.toml").is_file()
        beside = in_checkout and not is_editable(core.as_uri())
        metadata["dependencies"] = [f"{CORE} @ {core.as_uri()}" if beside else self.config["core"]]
