"""What `--help` says: how a program is called, its recipes, and every setting with its meaning."""

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from core.config.configurable import Configurable
from core.config.console import lost
from core.config.errors import UserError
from core.config.fields import walk
from core.config.options import field_docs, options

Config = Configurable.Config
SYNTAX = """\
usage: {program} --config NAME|FILE.json [--section.field VALUE ...]

  --config NAME|FILE.json   a recipe, or the config.json of an earlier run
  --help                    this text; with --config all settings of that recipe
  --print-config            print the resolved settings as JSON, and end
  --dry-run                 print what a step would take of one rank, and end; or all that keeps it from starting
    --world-size N          of so many ranks; else of as many as the settings ask for
    --rank N                of the rank with this number; else of rank 0
    --json                  as JSON

Options come in any order, `-` and `_` are alike, the last word counts. A switch is set by --section.enable and
unset by --section.no-enable; lists take their items one after another: --section.names a b.
"""


def program() -> str:
    """How this program was called."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def recipe_help(known: Mapping[str, Callable[[], Config]]) -> str:
    """How to call the program, and its recipes with the first line of their docstrings."""
    width = max(map(len, known), default=0)
    firsts = {name: (inspect.getdoc(function) or "").partition("\n")[0] for name, function in known.items()}
    lines = [f"  {name:{width}}   {first}".rstrip() for name, first in firsts.items()]
    return "\n".join([SYNTAX.format(program=program()), "recipes:", *lines])


def field_help(title: str, config: Config) -> str:
    """Every setting with its value in this configuration, its default where that is another, and its meaning."""
    lines = [title, "Every setting as --path TYPE = value here, and the default of its class where that is another:"]
    nodes = dict(walk(config))
    for path, node in nodes.items():
        parent, _, name = path.rpartition(".")
        doc = field_docs(type(nodes[parent])).get(name, "") if path and parent in nodes else ""
        lines += ["", f"{path or 'run'} ({type(node).__qualname__}): {doc}".rstrip(": ")]
        lines += [option.text() for option in options(node, path)]
    return "\n".join(lines)


def show(text: str) -> None:
    """Print what the program was called for, to a reader that may leave early, as `head` does.

    Raises `UserError` where standard output cannot take it for another reason.
    """
    print(text, flush=True)
    error = lost(sys.stdout)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise UserError(f"standard output does not take the text: {error}")
