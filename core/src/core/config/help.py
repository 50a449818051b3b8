"""What `--help` says: how a program is called, its recipes, an overview of the settings, those that are asked for."""

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from core.config.configurable import Configurable
from core.config.console import lost
from core.config.errors import UserError, did_you_mean
from core.config.fields import walk
from core.config.options import Option, comparable, field_docs, options
from core.config.search import Entry, matches, vocabulary

Config = Configurable.Config
HELP_WIDTH, SCREEN = 78, 60  # columns of a line that is to fit a terminal; lines of a text that needs no overview


MANY = -1


class OwnOption(NamedTuple):
    """An option of a program that is no setting: what follows it, and what it does."""

    metavar: str
    doc: str
    n_words: int | None = 1
    """How many words it takes: None is any number, MANY one or more, which those of another time are added to."""


CONFIG_OPTION = OwnOption(
    "NAME|FILE.json ...",
    "a recipe, which may be package.module:name or file.py:name, or the config.json of a run or of a model, or its "
    "folder; behind it files that change it: "
    '{"training": {"steps": 50}}',
    MANY,
)
MODEL_FROM = OwnOption(
    "FOLDER", "the model is what the config.json of this folder says: of ours, of a run, of Hugging Face"
)
TRUST = OwnOption("MODULE ...", "let files name classes of these modules or .py files, which are imported", MANY)
HELP = OwnOption(
    "[WORD ...]", "this text; with --config its settings; --help SECTION, --help WORD or --help all explain them", None
)
VERSION = OwnOption("", "print the versions of the packages, and end", 0)
PRINT_COMPLETION = OwnOption("bash|zsh", "print a script that completes this program's options in a shell, and end")


def usage(line: str, own: Mapping[str, OwnOption]) -> str:
    """How a program is called: `line` follows its name, the options that are no settings follow one after another."""
    lines = [f"usage: {program()} {line}", ""]
    names = {name: f"--{name.replace('_', '-')} {option.metavar}".rstrip() for name, option in own.items()}
    width = max(map(len, names.values()))
    for name, option in own.items():
        first = f"  {names[name]:{width}}   "
        lines += textwrap.wrap(option.doc, 110, initial_indent=first, subsequent_indent=" " * len(first))
    return "\n".join(lines)


def program() -> str:
    """How this program was called."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def recipe_list(known: Mapping[str, Callable[[], Config]]) -> str:
    """The recipes with the first line of their docstrings."""
    width = max(map(len, known), default=0)
    firsts = {name: first_line(function) for name, function in known.items()}
    return "\n".join(["recipes:", *(f"  {name:{width}}   {first}".rstrip() for name, first in firsts.items())])


def first_line(thing: object) -> str:
    """The first line of a docstring; nothing where there is none."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def setting_help(title: str, config: Config, words: Sequence[str], own: Mapping[str, OwnOption]) -> str:
    """What `--help` says of one configuration: an overview where there is much to say; with words all of it (`all`),
    a section, or what they find.

    Raises `UserError` for words that find nothing, with those like them that find something.
    """
    asked = [comparable(word) for word in words]
    nodes = sections(config)
    whole = "\n".join([title, LEGEND, *section_texts(nodes, nodes)])
    if asked == ["all"] or not asked and whole.count("\n") < SCREEN:
        return whole
    if not asked:
        return overview(title, nodes)
    entries = [*(of_setting(option) for path, (node, _) in nodes.items() for option in options(node, path))]
    entries += [of_own(name, option) for name, option in own.items()]
    found = matches(asked, entries)
    if len(asked) == 1 and (inside := sections_named(asked[0], nodes)):
        shown = {f"--{option.path}" for path in inside for option in options(nodes[path][0], path)}
        also = [entry.name for entry in found if entry.name not in shown]
        more = wrap(", ".join(also), f"\nAlso about {words[0]}: ", "    ") if also else []
        return "\n".join([title, LEGEND, *section_texts(inside, nodes), *more])
    if not found:
        near = did_you_mean(asked[-1], {*vocabulary(entries), *map(last, nodes)}, n=3)
        raise UserError(f"no setting about {' '.join(words)}; {near or '--help all lists every one'}")
    return "\n".join([title, LEGEND, "", *(entry.text for entry in found)])


LEGEND = "Settings as --path TYPE = value here, and the default of its class where that is another:"
Sections = Mapping[str, tuple[Config, str]]
"""Every config of a tree by its path, with what its parent says of it."""


def sections(config: Config) -> Sections:
    """The configs of a tree, parents first."""
    nodes = dict(walk(config))
    found = {}
    for path, node in nodes.items():
        parent, _, name = path.rpartition(".")
        found[path] = node, field_docs(type(nodes[parent])).get(name, "") if path and parent in nodes else ""
    return found


def sections_named(word: str, nodes: Sections) -> list[str]:
    """The paths of the sections of that path or last name, and of those inside them; `run` is the outermost alone."""
    if word == "run":
        return [""]
    named = [path for path in nodes if path and word in (path, last(path))]
    return [path for path in nodes if any(path == name or path.startswith(f"{name}.") for name in named)]


def last(path: str) -> str:
    """The last name of a path."""
    return path.rpartition(".")[2]


def section_texts(paths: Sequence[str] | Sections, nodes: Sections) -> Iterator[str]:
    """Sections with every setting in them: its value in this configuration, its default, and its meaning."""
    for path in paths:
        node, doc = nodes[path]
        yield ""
        yield f"{path or 'run'} ({type(node).__qualname__}): {doc}".rstrip(": ")
        yield from (option.text() for option in options(node, path))


def overview(title: str, nodes: Sections) -> str:
    """The settings outside of sections, the sections with the names of theirs, and how to read about them."""
    names = {path: [option.name for option in options(node, path)] for path, (node, _) in nodes.items()}
    count = sum(map(len, names.values()))
    lines = [title, "", *(option.text() for option in options(nodes[""][0], "")), ""]
    for path in filter(None, nodes):
        lines += wrap(f"{path}: {nodes[path][1]}", "", "    ") + wrap(" ".join(names[path]), "    ", "    ")
    return "\n".join(
        [
            *lines,
            "",
            f"--help SECTION   what the settings of a section mean, such as --help {next(filter(None, nodes), 'run')}",
            "--help WORD      the settings about something, such as --help seed",
            f"--help all       all {count} settings",
        ]
    )


def wrap(text: str, first: str, others: str) -> list[str]:
    """Lines that fit a terminal; a name is never cut."""
    return textwrap.wrap(
        text, HELP_WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def of_setting(option: Option) -> Entry:
    """A setting as an entry of the search."""
    return Entry(f"--{option.path}", option.text())


def of_own(name: str, option: OwnOption) -> Entry:
    """An option that is no setting as an entry of the search."""
    name = f"--{name.replace('_', '-')}"
    doc = textwrap.indent(textwrap.fill(option.doc, 110), "      ")
    return Entry(name, f"  {name} {option.metavar}".rstrip() + f"\n{doc}")


def show(text: str) -> None:
    """Print what the program was called for, to a reader that may leave early, as `head` does.

    Raises `UserError` where standard output cannot take it for another reason.
    """
    print(text, flush=True)
    error = lost(sys.stdout)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise UserError(f"standard output does not take the text: {error}")
