"""Which versions a program runs on, told without importing torch."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import core


def version_lines(package: str) -> str:
    """A line each for the package of the recipes, core, torch and Python."""
    ours = getattr(import_module(package), "__version__", "states no __version__")
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    found = {package: ours, "core": core.__version__, "torch": torch, "python": platform.python_version()}
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {number}" for name, number in found.items())
