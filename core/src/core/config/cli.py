"""The command lines: choose a recipe or a file where there is a choice, change any setting, run."""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import ModuleType

from core.config.configurable import Configurable, field_names, owner_of
from core.config.errors import UserError, did_you_mean
from core.config.exit import exit_plainly
from core.config.fields import alternatives, walk
from core.config.help import field_help, program, recipe_help, show
from core.config.json_file import read_json
from core.config.options import Option, options
from core.config.record import from_dict, to_json
from core.config.validate import validate

Config = Configurable.Config
Flag = tuple[str, list[str]]
"""An option as it was written, and the words behind it."""

OWN = {"config": 1, "help": 0, "print_config": 0, "dry_run": 0, "world_size": 1, "rank": 1, "json": 0}
"""The options of `main` that are no settings, and how many words each takes."""
OF_DRY_RUN = ("world_size", "rank", "json")


def main(configs: ModuleType, argv: Sequence[str] | None = None) -> None:
    """Resolve a configuration from the command line, validate it, build it and run it.

    `configs` is the module of the recipes: its public functions without arguments, which return the Config of something
    that has a `run()`, and for --dry-run a static `plan(config, world_size, rank)`, which validates it and gives a
    dataclass. Command line goes before recipe or file, and those before the defaults of the classes. A mistake of the
    user ends the program with code 2 and one line that says what to do.
    """
    with exit_plainly():
        own, settings = own_flags(split(argv), OWN)
        if "config" in own:
            settle_and_run(load(own["config"], configs), own["config"], own, settings)
            return
        show(recipe_help(recipes(configs)))
        if "help" not in own:
            raise UserError("choose a recipe: --config NAME")


def run(config: Config, argv: Sequence[str] | None = None) -> None:
    """The command line of a program without recipes: it changes this configuration; all else is as in `main`."""
    with exit_plainly():
        own, settings = own_flags(split(argv), {"help": 0})
        purpose = (inspect.getdoc(owner_of(type(config))) or "").partition("\n")[0]
        settle_and_run(config, f"{program()}: {purpose}", own, settings)


def settle_and_run(config: Config, title: str, own: dict[str, str], settings: Sequence[Flag]) -> None:
    """What the options ask for: help, under this title, or the resolved settings, or the run."""
    if "help" in own:
        show(field_help(title, config))
        return
    lost = [f"--{name.replace('_', '-')}" for name in OF_DRY_RUN if name in own and "dry_run" not in own]
    if lost:
        raise UserError(f"{', '.join(lost)} says how --dry-run is done: add --dry-run, or leave it out")
    override(config, settings)
    if "dry_run" in own:
        show(planned(config, own))
        return
    validate(config)
    if "print_config" in own:
        show(to_json(config).rstrip())
        return
    config.build().run()


def planned(config: Config, own: dict[str, str]) -> str:
    """What the configured run would take of one rank, as its owner's `plan` says, in words or as JSON."""
    plan = getattr(owner_of(type(config)), "plan", None)
    if plan is None:
        raise UserError(f"{type(config).__qualname__} makes no plans: leave --dry-run out")
    world_size = number("--world-size", own["world_size"]) if "world_size" in own else None
    found = plan(config, world_size=world_size, rank=number("--rank", own.get("rank", "0")))
    return json.dumps(asdict(found), indent=2) if "json" in own else str(found)


def number(flag: str, word: str) -> int:
    """The whole number, not negative, that an option of ours was given."""
    if not word.isdecimal():
        raise UserError(f"{flag} takes a whole number, got {word}")
    return int(word)


def split(argv: Sequence[str] | None) -> list[Flag]:
    """Every option with the words behind it; `--name=word` takes that word alone. None: as the process was called."""
    flags: list[Flag] = []
    closed = True
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
            closed = bool(equals)
        elif closed:
            raise UserError(f"{word} belongs to no option: write --NAME {word}")
        else:
            flags[-1][1].append(word)
    return flags


def own_flags(flags: Sequence[Flag], known: dict[str, int]) -> tuple[dict[str, str], list[Flag]]:
    """The options that are no settings, by name, with their word; and the others.

    `known` says how many words each takes; for another number of them a `UserError` is raised.
    """
    own: dict[str, str] = {}
    settings: list[Flag] = []
    for flag, words in flags:
        name = "help" if flag == "-h" else plain(flag)
        if name not in known:
            settings.append((flag, words))
        elif (n := known[name]) == len(words):
            own[name] = " ".join(words)
        else:
            raise UserError(f"{flag} takes {n or 'no'} value{'s' * (n != 1)}, got {' '.join(words) or 'nothing'}")
    return own, settings


def plain(name: str) -> str:
    """A name as it is compared: without leading dashes, and with `_` for every `-`."""
    return name.lstrip("-").replace("-", "_")


def recipes(configs: ModuleType) -> dict[str, Callable[[], Config]]:
    """The public functions without arguments that the module defines, in its order."""
    return {
        name: function
        for name, function in vars(configs).items()
        if inspect.isfunction(function)
        and function.__module__ == configs.__name__
        and not name.startswith("_")
        and not inspect.signature(function).parameters
    }


def load(source: str, configs: ModuleType) -> Config:
    """The configuration of a recipe or of a JSON file. Raises `UserError` if there is none, or the file is not one.

    A configuration with a field `recipe` is told the name of its recipe.
    """
    if source.endswith(".json"):
        data = read_json(source)
        try:
            return from_dict(data)
        except UserError as error:
            raise UserError(f"{source} is no configuration:\n{error}") from error
    known = recipes(configs)
    if (name := plain(source)) not in known:
        hint = did_you_mean(name, known, n=3) or f"the recipes are {', '.join(known)}"
        raise UserError(f"no recipe {source}; {hint}")
    config = known[name]()
    if not isinstance(config, Config):
        raise TypeError(f"{configs.__name__}.{name} gives no Config: let the name of what is no recipe start with _")
    if "recipe" in field_names(type(config)):
        setattr(config, "recipe", name)  # noqa: B010 - not every Config has it
    return config


def override(config: Config, flags: Sequence[Flag]) -> None:
    """Set the fields of the tree that the options name. Raises one `UserError` for all that cannot be set."""
    known = {plain(option.path): option for path, node in walk(config) for option in options(node, path)}
    problems = []
    for flag, words in flags:
        try:
            option, words = find(flag, words, known)
            setattr(option.node, option.name, option.read(words))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def find(flag: str, words: list[str], known: dict[str, Option]) -> tuple[Option, list[str]]:
    """The option that a flag names and the words for its value; `--a.no-b` is `--a.b False`."""
    path = plain(flag)
    if path in known:
        return known[path], words
    section, dot, name = path.rpartition(".")
    option = known.get(f"{section}{dot}{name.removeprefix('no_')}")
    if option is not None and bool in alternatives(option.annotation):
        if words:
            raise UserError(f"{flag} takes no value, got {' '.join(words)}")
        return option, ["False"]
    same_name = [f"--{other.path}" for key, other in known.items() if key.rpartition(".")[2] == name]
    near = [f"--{other.path}" for other in known.values()]
    hint = did_you_mean(flag, same_name, n=3, cutoff=0.0) or did_you_mean(flag, near)
    raise UserError(f"no option {flag}; {hint or '--help lists them all'}")
