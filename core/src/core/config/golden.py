"""Golden texts: every setting of every recipe in a file, so that a review sees what a change does to each run."""

import difflib
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.recipe import recipes
from core.config.record import flatten


def golden_text(config: Configurable.Config) -> str:
    """A line `path = value` for every setting, in the order of declaration; values are JSON."""
    return "".join(f"{path} = {json.dumps(value)}\n" for path, value in flatten(config).items())


def golden_texts(configs: ModuleType) -> dict[str, str]:
    """What the file `<recipe>.txt` of each recipe has to hold: a line that names the recipe, then its golden text."""
    return {name: f"{header(name)}\n{golden_text(recipe())}" for name, recipe in recipes(configs).items()}


def header(name: str) -> str:
    """The first line of a recipe's golden file."""
    return f"# recipe {name}"


def update(configs: ModuleType, folder: Path) -> list[str]:
    """Write the golden files that differ, remove those of recipes that are gone, and give the lines that say so.

    Other files in the folder are left alone: a golden file is known by its first line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = golden_texts(configs)
    old = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))}
    old = {name: text for name, text in old.items() if text.startswith(f"{header(name)}\n")}
    report = []
    for name in sorted(old.keys() - new.keys()):
        (folder / f"{name}.txt").unlink()
        report.append(f"removed {name}.txt")
    for name, text in new.items():
        if text != old.get(name):
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
            report.append(f"{'changed' if name in old else 'new'} {name}.txt")
            lines = difflib.unified_diff(old.get(name, text).splitlines(), text.splitlines(), n=0, lineterm="")
            report += [f"  {line}" for line in list(lines)[2:] if not line.startswith("@@")]
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m core.config.golden MODULE FOLDER`: update FOLDER for the recipes of MODULE, as in qwen3.configs."""
    with exit_plainly():
        words = sys.argv[1:] if argv is None else argv
        if len(words) != 2:
            raise UserError("usage: python -m core.config.golden MODULE FOLDER")
        module, folder = words
        try:
            configs = import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"no recipes in {module}: {error}") from error
        if not recipes(configs):
            raise UserError(f"no recipes in {module}: name the module that defines them, as in qwen3.configs")
        print("\n".join(update(configs, Path(folder)) or ["nothing changed"]))


if __name__ == "__main__":
    main()
