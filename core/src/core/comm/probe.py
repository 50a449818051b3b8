"""Which of DeepEP's three builds is installed, and why one that was asked for cannot run.

V1, V2 and HybridEP are builds of one package, `deep_ep`, of which only one can be installed. What it is shows in its
classes; versions say little. Importing it asserts what it needs of the machine and starts compilers: it happens here,
when a setting or `python -m core.doctor` asks, and any exception is a reason.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

Build = Literal["deepep_v1", "deepep_v2", "hybridep"]
CLASSES: dict[Build, str] = {"deepep_v1": "Buffer", "deepep_v2": "ElasticBuffer", "hybridep": "HybridEPBuffer"}
COMMITS: dict[Build, str] = {"deepep_v1": "9af0e0d", "deepep_v2": "dd758ca", "hybridep": "94a9f8f"}
"""Of github.com/deepseek-ai/DeepEP: what the adapters were written against."""


def from_source(build: Build) -> str:
    """How a build is made."""
    return (
        "build it from source: git clone --recursive https://github.com/deepseek-ai/DeepEP, then git checkout "
        f"{COMMITS[build]} (docs/expert-parallel.md has the rest)"
    )


@cache
def imported() -> ModuleType | str:
    """The package, or why it cannot be had."""
    if find_spec("deep_ep") is None:
        return "there is no package deep_ep"
    try:
        return import_module("deep_ep")
    except Exception as error:  # whatever it is: an AssertionError of a missing compiler, an OSError of a library
        return f"importing deep_ep failed with {type(error).__name__}: {str(error) or 'no message'}"


def library() -> ModuleType:
    """The package; to be called where `missing` had nothing to say."""
    found = imported()
    assert not isinstance(found, str), found
    return found


def version() -> str:
    """As the package tells it."""
    return str(getattr(library(), "__version__", "of unknown version"))


def missing(build: Build) -> str | None:
    """Why a build is not there, and how to get it; None when it is there."""
    found = imported()
    if isinstance(found, str):
        return f"{found}; {from_source(build)}"
    if not hasattr(found, CLASSES[build]):
        there = " and ".join(name for name in CLASSES.values() if hasattr(found, name)) or "none of the known classes"
        return f"the installed deep_ep ({version()}) has {there}, and not {CLASSES[build]}; {from_source(build)}"
    return None
