"""Scripts that let a shell complete `python -m PACKAGE.program`: recipes, options, and the words that an option takes.

A script has two parts. The engine is the same for every first-party program: it takes over the completion of python and
torchrun where `-m` names a program that it knows, and leaves all else to what was there before. The table of one
program answers what may stand behind an option, and which options there are. No first-party code runs while one types.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.fields import alternatives, walk
from core.config.help import MANY, OwnOption
from core.config.options import Option, options, reader

Config = Configurable.Config
SHELLS = ("bash", "zsh")
ANY = 99  # words behind an option that takes as many as one likes


class Taken(NamedTuple):
    """What an option takes: the words that are known, how many at most, and whether it may be the name of a file."""

    words: tuple[str, ...] = ()
    most: int = 1
    files: bool = False


class Program(NamedTuple):
    """What one can write behind a program's name."""

    first: Taken
    """What stands in front of all options."""
    takes: Mapping[str, Taken]
    """Every option, with its dashes."""
    of_recipes: Mapping[str, Sequence[str]] = {}
    """The options that there are with each recipe, where not all have the same."""


def taken_by(option: Option) -> Taken:
    """What a setting takes."""
    spec = reader(option.annotation)
    most = spec.nargs if isinstance(spec.nargs, int) else ANY
    files = not spec.choices and any(part in (str, list[str]) for part in alternatives(option.annotation))
    return Taken(tuple(spec.choices or ()), most, files)


def program_of(own: Mapping[str, OwnOption], names: Iterable[str], configs: Mapping[str, Config]) -> Program:
    """The program with these options that are no settings, recipes of these names, and the settings that they have."""
    of_recipes, settings, sections = {}, {}, {"all": None}
    for name, config in configs.items():
        found = [option for path, node in walk(config) for option in options(node, path)]
        of_recipes[name] = [f"--{option.path}" for option in found]
        settings |= {f"--{option.path}": taken_by(option) for option in found}
        sections |= dict.fromkeys(path for path, _ in walk(config) if path)
    known = {"config": tuple(names), "help": tuple(sections), "print_completion": SHELLS}
    takes = {}
    for name, option in own.items():
        most = 1 if name == "config" else ANY if option.n_words in (None, MANY) else option.n_words
        takes[f"--{name.replace('_', '-')}"] = Taken(known.get(name, ()), most, files=name in ("config", "model.from"))
    return Program(Taken(most=0), {**takes, **settings}, of_recipes)


def script(shell: str, program: Program) -> str:
    """The script for a shell. Raises `UserError` for another shell, and where the program was not called by `-m`."""
    if shell not in SHELLS:
        raise UserError(f"--print-completion knows {' and '.join(SHELLS)}, got {shell}")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        raise UserError("--print-completion is for programs that are called as python -m PACKAGE.PROGRAM")
    module = spec.name.removesuffix(".__main__")
    python = dict.fromkeys(["python", "python3", Path(sys.executable).name, "torchrun"])
    engine = (Path(__file__).parent / f"completion.{shell}").read_text(encoding="utf-8")
    return engine.replace("@PROGRAMS@", " ".join(python)) + "\n" + table(module, program)


def table(module: str, program: Program) -> str:
    """The function that sets, for an option and a recipe, what the engine asks for; bash and zsh read it alike."""
    common = [name for name in program.takes if all(name in names for names in program.of_recipes.values())]
    own = [name for name in program.takes if not any(name in names for names in program.of_recipes.values())]
    rest = [name for name in program.takes if name not in common and name not in own]
    lines = [f"# python -m {module}", f"_armature_of_{module.replace('.', '_')}() {{", "    values='' most=1 files=''"]
    lines += ["    case $1 in", *branch("''", program.first)]
    for taken, names in groups({spelled(name): taken for name, taken in program.takes.items()}):
        lines += branch("|".join(names), taken)
    lines += ["    esac", f"    offered='{' '.join(dict.fromkeys([*own, *common]))}'", "    case $2 in"]
    more = {name: tuple(option for option in rest if option in has) for name, has in program.of_recipes.items()}
    for names, recipes in groups(more):
        lines.append(f'    {"|".join(recipes)}) offered="$offered {" ".join(names)}" ;;')
    lines += [f'    *) offered="$offered {" ".join(rest)}" ;;', "    esac", "}"]
    return "\n".join(lines)


def spelled(option: str) -> str:
    """An option as the engine asks for it, which takes `-` for `_`."""
    return "--" + option.removeprefix("--").replace("-", "_")


def groups(table: Mapping[str, Any]) -> Iterable[tuple[Any, list[str]]]:
    """The names that have the same in a table, together."""
    found: dict[Any, list[str]] = {}
    for name, same in table.items():
        found.setdefault(same, []).append(name)
    return found.items()


def branch(names: str, taken: Taken) -> list[str]:
    """A branch of a `case`, where something differs from an option that takes one word of which nothing is known."""
    said = [f"values='{' '.join(taken.words)}'"] * bool(taken.words)
    said += [f"most={taken.most}"] * (taken.most != 1) + ["files=1"] * taken.files
    return [f"    {names}) {' '.join(said)} ;;"] if said else []
