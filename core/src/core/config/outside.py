"""Modules and recipes outside of the program's own package, which a user names: `package.module`, or a file `name.py`.

Whatever is named on a command line is imported, and its code runs; a name that stands in a file is not enough.
"""

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from core.config.errors import UserError, did_you_mean
from core.config.options import comparable

NAMED: dict[str, str] = {}
"""Modules that were imported here because the user named them, and how: what a later process has to be told, too."""


def names_outside(source: str) -> bool:
    """Whether this is the form of a recipe outside: package.module:function, file.py:function, or the file alone."""
    return source.endswith(".py") or ":" in source


def place_and_name(source: str) -> tuple[str, str]:
    """The module or file of a recipe outside, and the name of its function; empty where the file stands alone."""
    place, _, name = source.rpartition(":")
    return (place, name) if place else (source, "")


def module_name(place: str) -> str:
    """What the module of this name, or in this file, is called once it is imported."""
    return Path(place).stem if place.endswith(".py") else place


def refused(name: str, place: str) -> str:
    """Says that `name`, which a file states, is code of a module or a `.py` file that nobody trusts."""
    top = place.partition(".")[0]
    unknown = top.isidentifier() and not place.endswith(".py") and top not in sys.modules and find_spec(top) is None
    where = f", --trust FOLDER/{top}.py where it is a file," if unknown else ""
    return (
        f"{name} is code of the module {place}, and a file alone does not make it run: if you trust it, add "
        f"--trust {place}{where} or import it before"
    )


def import_outside(place: str, option: str) -> ModuleType:
    """The module of this name, or in this `.py` file, imported now. Modules beside a file can be imported as well.

    Raises `UserError`, which begins with `option`, where it is not there, or another module has the file's name.
    """
    name = module_name(place)
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{option}: {name!r} is no name of a module, which is made of letters, digits and _")
    if place.endswith(".py"):
        _make_importable(Path(os.path.abspath(Path(place).expanduser())), option)
    try:
        module = import_module(name)
    except ImportError as error:
        raise UserError(f"{option}: {place} cannot be imported: {error}") from error
    NAMED[name] = place
    return module


def _make_importable(file: Path, option: str) -> None:
    """Have the name of a file stand for the file, and for nothing else."""
    if not file.is_file():
        raise UserError(f"{option}: there is no file {file}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # at the end, so that nothing that is installed is hidden
    invalidate_caches()
    loaded = sys.modules.get(file.stem)
    found = getattr(loaded, "__file__", None) if loaded else getattr(find_spec(file.stem), "origin", None)
    if found is None or not os.path.exists(found) or not os.path.samefile(found, file):
        raise UserError(f"{option}: {file.stem} is the name of another module, {found or 'of Python'}: rename {file}")


def recipe_outside(source: str) -> tuple[str, Callable[[], Any]]:
    """The name and the function of a recipe outside. Raises `UserError` that says what is missing."""
    option = f"--config {source}"
    place, name = place_and_name(source)
    module = import_outside(place, option)
    known = {
        each: function
        for each, function in vars(module).items()
        if inspect.isfunction(function) and not each.startswith("_") and not inspect.signature(function).parameters
    }
    if (name := comparable(name)) not in known:
        own = [each for each, function in known.items() if function.__module__ == module.__name__]
        has = f"it has {', '.join(own)}" if own else "it has no function without arguments"
        hint = did_you_mean(name, known, n=3) or has
        asked = f"{place} has no recipe {name}" if name else f"name a recipe, --config {place}:NAME"
        raise UserError(f"{option}: {asked}; {hint}")
    return name, known[name]
