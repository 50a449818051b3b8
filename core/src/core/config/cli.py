"""The command lines: choose a recipe or a file where there is a choice, change any setting, run."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from inspect import isroutine
from types import ModuleType

from core.config.completion import program_of, script
from core.config.configurable import Configurable, field_names, owner_of
from core.config.decode import trusted
from core.config.errors import UserError, did_you_mean
from core.config.exit import exit_plainly
from core.config.fields import alternatives, field_types, walk
from core.config.help import (
    CONFIG_OPTION,
    HELP,
    MANY,
    MODEL_FROM,
    PRINT_COMPLETION,
    TRUST,
    VERSION,
    OwnOption,
    first_line,
    program,
    recipe_list,
    setting_help,
    show,
    usage,
)
from core.config.older import apply_older
from core.config.options import Option, comparable, options
from core.config.recipe import load_config, recipe_module, recipes, take_part
from core.config.record import to_json
from core.config.validate import validate
from core.config.version import version_lines

Config = Configurable.Config
Flag = tuple[str, list[str]]
"""An option as it was written, and the words behind it."""
Own = dict[str, list[str]]
"""Options that are no settings, and the words of each."""

RUN_OPTIONS = {
    "config": CONFIG_OPTION,
    "model.from": MODEL_FROM,
    "trust": TRUST,
    "help": HELP,
    "version": VERSION,
    "print_completion": PRINT_COMPLETION,
    "print_config": OwnOption("", "print the resolved settings as JSON, and end", 0),
    "dry_run": OwnOption("", "print what a step would take of one rank, or what keeps it from starting, and end", 0),
    "world_size": OwnOption("N", "with --dry-run: of so many ranks; else of as many as the settings ask for"),
    "rank": OwnOption("N", "with --dry-run: of the rank with this number; else of rank 0"),
    "json": OwnOption("", "with --dry-run: as JSON", 0),
}
"""The options of `main` that are no settings."""
SYNTAX = """
Options come in any order, `-` and `_` are alike, the last word counts. A switch is set by --section.enable, unset by
--section.no-enable, and takes true or false; lists take their items one after another: --section.names a b.
"""
OF_DRY_RUN = ("world_size", "rank", "json")
WEIGHTS = "; weights beside it are read with --checkpoint.enable --checkpoint.initial_load_path {folder}"
"""What is said of a file that describes a model alone."""


def main(configs: str | ModuleType, argv: Sequence[str] | None = None) -> None:
    """Resolve a configuration from the command line, validate it, build it and run it.

    `configs` is the module of the recipes, or its name, which is imported when a recipe is needed. They are its public
    functions without arguments, which return the Config of something that has a `run()`, and for --dry-run a static
    `plan(config, world_size, rank)`, which validates it and returns a dataclass. Command line precedes recipe or file,
    and those before the defaults of the classes. A mistake of the user ends the program with code 2 and one line that
    says what to do.
    """
    with exit_plainly():
        own, settings = own_flags(split_flags(argv), RUN_OPTIONS)
        if told_version(own, configs):
            return
        configs = recipe_module(configs)
        known = recipes(configs)
        if "print_completion" in own:
            show(completion(own["print_completion"][0], RUN_OPTIONS, known, lambda name: load_config([name], configs)))
        elif "config" in own:
            trust = trusted(own.get("trust", []))
            config = load_config(own["config"], configs, trust=trust, of_part=WEIGHTS)
            for folder in own.get("model.from", []):
                take_part("model", folder, config, configs, trust)
            settle_and_run(config, " ".join(own["config"]), own, settings, RUN_OPTIONS)
        elif own.get("help") and known:
            name = next(iter(known))
            title = f"{name}, the first recipe (with --config NAME another)"
            show(setting_help(title, load_config([name], configs), own["help"], RUN_OPTIONS))
        else:
            line = "--config NAME|FILE.json [FILE.json ...] [--section.field VALUE ...]"
            show("\n".join([usage(line, RUN_OPTIONS), SYNTAX, recipe_list(known)]))
            if "help" not in own:
                raise UserError(f"choose a recipe: --config NAME{' beside --model.from' * ('model.from' in own)}")


def told_version(own: Own, configs: str | ModuleType) -> bool:
    """Whether --version was asked for, and has been answered."""
    if "version" in own:
        show(version_lines((configs if isinstance(configs, str) else configs.__name__).partition(".")[0]))
    return "version" in own


def completion(shell: str, own: Mapping[str, OwnOption], known: Iterable[str], load: Callable[[str], Config]) -> str:
    """The script that completes this program in a shell; `load_config` returns what a recipe configures here."""
    configs = {}
    for name in known:
        try:
            configs[name] = load(name)
        except UserError:  # a recipe that cannot be had has a name all the same
            continue
    return script(shell, program_of(own, known, configs))


def run(config: Config, argv: Sequence[str] | None = None) -> None:
    """The command line of a program without recipes: it changes this configuration; all else is as in `main`."""
    with exit_plainly():
        known = {"help": HELP}
        own, settings = own_flags(split_flags(argv), known)
        settle_and_run(config, f"{program()}: {first_line(owner_of(type(config)))}", own, settings, known)


def settle_and_run(
    config: Config, title: str, own: Own, settings: Sequence[Flag], known: Mapping[str, OwnOption]
) -> None:
    """What the options ask for: help, under this title, or the resolved settings, or the run.

    `known` has the options of the program that are no settings, and `own` the words of those that were given.
    """
    if "help" in own:
        show(setting_help(title, config, own["help"], known))
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


def planned(config: Config, own: Own) -> str:
    """What the configured run would take of one rank, as its owner's `plan` says, in words or as JSON.

    Raises `UserError` where the plan is a parent's, and the owner overrides its methods or has settings that it lacks:
    it would be of another run.
    """
    owner = owner_of(type(config))
    plan = getattr(owner, "plan", None)
    if owner is None or plan is None:
        raise UserError(f"{type(config).__qualname__} makes no plans: leave --dry-run out")
    if changed := overridden_below("plan", owner):
        raise UserError(
            f"{owner.__qualname__} has a {', '.join(changed)} of its own and the plan of its parent, which is of "
            "another run: leave --dry-run out, or give the class a static plan(config, world_size, rank)"
        )
    if new := settings_below("plan", owner, config):
        raise UserError(
            f"{owner.__qualname__} has settings of its own ({', '.join(new)}), of which the plan of its parent knows "
            "nothing: leave --dry-run out, or give the class a static plan(config, world_size, rank)"
        )
    world_size = number("--world-size", *own["world_size"]) if "world_size" in own else None
    found = plan(config, world_size=world_size, rank=number("--rank", *own.get("rank", ["0"])))
    return json.dumps(asdict(found), indent=2) if "json" in own else str(found)


def overridden_below(name: str, owner: type) -> list[str]:
    """The methods that classes below the one that defines `name` override, as far as that one has them."""
    classes, place = owner.__mro__, place_of(name, owner)
    known = {key for each in classes[place:-1] for key, value in vars(each).items() if isroutine(value)}
    return sorted({key for each in classes[:place] for key, value in vars(each).items() if isroutine(value)} & known)


def settings_below(name: str, owner: type, config: Config) -> list[str]:
    """The settings of `config` that the class which defines `name` does not have: fields, and groups of settings of a
    class of their own that nothing is built from. (What a part of its own class builds is planned as it is built.)"""
    known = field_types(getattr(owner.__mro__[place_of(name, owner)], "Config", type(config)))
    found = {each: getattr(config, each) for each in field_names(type(config))}
    new = [each for each in found if each not in known]
    groups = {each: type(value) for each, value in found.items() if each in known and isinstance(value, Config)}
    groups = {each: kind for each, kind in groups.items() if owner_of(kind) is None}
    return new + [each for each, kind in groups.items() if kind not in alternatives(known[each])]


def place_of(name: str, owner: type) -> int:
    """Which of the classes that `owner` derives from, itself first, defines `name`."""
    return next(i for i, each in enumerate(owner.__mro__) if name in vars(each))


def number(flag: str, word: str) -> int:
    """The whole number, not negative, that one of our options was given."""
    if not word.isdecimal():
        raise UserError(f"{flag} takes a whole number, got {word}")
    return int(word)


def split_flags(argv: Sequence[str] | None) -> list[Flag]:
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


def own_flags(flags: Sequence[Flag], known: Mapping[str, OwnOption]) -> tuple[Own, list[Flag]]:
    """The options that are no settings, by name, with their words; and the others.

    Raises `UserError` for another number of words than an option takes.
    """
    own: Own = {}
    settings: list[Flag] = []
    for flag, words in flags:
        name = "help" if flag == "-h" else comparable(flag)
        if name not in known:
            settings.append((flag, words))
        elif (n := known[name].n_words) in (None, len(words)):
            own[name] = words
        elif n == MANY and words:
            own[name] = own.get(name, []) + words
        else:
            wanted = "one value or more" if n == MANY else "1 value" if n else "no values"
            raise UserError(f"{flag} takes {wanted}, got {' '.join(words) or 'nothing'}")
    return own, settings


def override(config: Config, flags: Sequence[Flag]) -> None:
    """Set the fields of the tree that the options name. Raises one `UserError` for all that cannot be set."""
    flags = apply_older(config, flags)
    known = {comparable(option.path): option for path, node in walk(config) for option in options(node, path)}
    problems = []
    for flag, words in flags:
        try:
            option, words = find_option(flag, words, known)
            setattr(option.node, option.name, option.read(words))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def find_option(flag: str, words: list[str], known: dict[str, Option]) -> tuple[Option, list[str]]:
    """The option that a flag names and the words for its value; `--a.no-b` is `--a.b False`."""
    path = comparable(flag)
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
    raise UserError(f"no option {flag}; {hint or '--help WORD searches, --help all lists them'}")
