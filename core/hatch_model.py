"""The metadata hook of the pyproject.toml of every model and experiment: under pip, core, and the models that an
experiment needs, come from where it comes from itself.

The pyproject names the range of releases that a published wheel asks an index for. When pip builds the package in a
checkout, the requirement becomes the folder next door instead, so `pip install models/qwen3` needs nothing before it.
When pip has cloned the repository to a temporary folder, it becomes the same commit of the same repository, because the
folder is gone when the installation is done. A package that is already installed in editable mode from this very
checkout is left alone: a direct reference would replace the live source by a frozen copy. Other builders
(`python -m build`, uv) always get the range; uv finds the folders by `[tool.uv.sources]`.
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

OURS = "armature-"


def folder_of(name: str) -> str | None:
    """Where a checkout has the package of this name: core, or models/<name>; None for packages of others."""
    if not name.startswith(OURS):
        return None
    short = name.removeprefix(OURS)
    return "core" if short == "core" else f"models/{short.replace('-', '_')}"


def is_editable(name: str, url: str) -> bool:
    """Whether the environment that pip installs into has this package in editable mode from `url`."""
    for distribution in distributions(name=name, path=[sysconfig.get_path("purelib")]):
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
        return direct.get("url") == url and direct.get("dir_info", {}).get("editable", False)
    return False


def is_clone_of_pip(checkout: Path, tracker: Path) -> bool:
    """Whether pip made the checkout, in a `pip-...` folder beside the one in which it tracks its builds."""
    temporary = tracker.resolve().parent
    return checkout.is_relative_to(temporary) and checkout.relative_to(temporary).parts[0].startswith("pip-")


def commit_url(checkout: Path, folder: str) -> str | None:
    """A folder of the commit of a clone, as pip takes it; None for no clone, and where the address has a password.

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
    return f"git+{url}@{commit}#subdirectory={folder}"


class CoreRequirement(MetadataHookInterface):
    """Writes where pip takes core and models from."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Change `dependencies` in place; pip marks the builds that it drives by PIP_BUILD_TRACKER."""
        checkout, tracker = Path(self.root).resolve().parents[1], os.environ.get("PIP_BUILD_TRACKER")
        if tracker is not None:
            cloned = is_clone_of_pip(checkout, Path(tracker))
            metadata["dependencies"] = [self._placed(need, checkout, cloned) for need in metadata["dependencies"]]

    def _placed(self, need: str, checkout: Path, cloned: bool) -> str:
        """A requirement with its place in the checkout, or as it is where it has none."""
        name = Requirement(need).name
        folder = folder_of(name)
        if folder is None or not (checkout / folder / "pyproject.toml").is_file():
            return need
        url = (commit_url(checkout, folder) if cloned else None) or (checkout / folder).as_uri()
        return need if is_editable(name, url) else f"{name} @ {url}"
