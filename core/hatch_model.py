"""The metadata hook of every model's pyproject.toml: under pip, core comes from where the model comes from.

The pyproject names the range of released cores that a published wheel asks an index for. When pip builds the model in
a checkout, the requirement becomes the folder next door instead, so `pip install models/qwen3` needs nothing before it.
When pip has cloned the repository to a temporary folder, it becomes the same commit of the same repository, because the
folder is gone when the installation is done. A core that is already installed in editable mode from this very checkout
is left alone: a direct reference would replace the live source by a frozen copy. Other builders (`python -m build`, uv)
always get the range; uv finds core by `[tool.uv.sources]`.
"""

import json
import os
import subprocess
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hatchling.metadata.plugin.interface import MetadataHookInterface
from packaging.requirements import Requirement

CORE = "armature-core"


def is_editable(url: str) -> bool:
    """Whether the environment that pip installs into has core in editable mode from `url`."""
    for distribution in distributions(name=CORE, path=[sysconfig.get_path("purelib")]):
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
        return direct.get("url") == url and direct.get("dir_info", {}).get("editable", False)
    return False


def is_clone_of_pip(checkout: Path, tracker: Path) -> bool:
    """Whether pip made the checkout, in a `pip-...` folder beside the one in which it tracks its builds."""
    temporary = tracker.resolve().parent
    return checkout.is_relative_to(temporary) and checkout.relative_to(temporary).parts[0].startswith("pip-")


def commit_url(checkout: Path) -> str | None:
    """The commit of a clone, as pip takes it; None for no clone, and where the address has a password in it.

    What a package requires is readable by all who can read the environment.
    """
    asked = (["config", "remote.origin.url"], ["rev-parse", "HEAD"])
    told = [subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True) for words in asked]
    if any(one.returncode for one in told) or not (checkout / ".git").exists():
        return None
    url, commit = (one.stdout.strip() for one in told)
    address = urlsplit(url)
    if not address.scheme or address.password or (address.username and address.scheme != "ssh"):
        return None
    url = url.replace("file:///", "file://localhost/", 1)  # older pips want a host
    return f"git+{url}@{commit}#subdirectory=core"


class CoreRequirement(MetadataHookInterface):
    """Writes where pip takes core from."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Change `dependencies` in place; pip marks the builds that it drives by PIP_BUILD_TRACKER."""
        checkout = Path(self.root).resolve().parents[1]
        core, tracker = checkout / "core", os.environ.get("PIP_BUILD_TRACKER")
        if tracker is None or not (core / "pyproject.toml").is_file():
            return
        url = (commit_url(checkout) if is_clone_of_pip(checkout, Path(tracker)) else None) or core.as_uri()
        if not is_editable(url):
            needs = metadata["dependencies"]
            metadata["dependencies"] = [f"{CORE} @ {url}" if Requirement(need).name == CORE else need for need in needs]
