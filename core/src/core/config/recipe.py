"""What --config names: a recipe, a JSON file or a folder with a config.json, and files that change it.

A recipe is a function of the program's own package, or one outside: `package.module:function`, `file.py:function`. A
file is one of four things, which its text tells apart:

    {"class": "core.train.trainer:Trainer", ...}     a whole configuration, as the config.json of a run
    {"class": "qwen3.model:Qwen3", ...}              a part of one, as the config.json that `convert` leaves
    {"recipe": "qwen3_debug", "training": {...}}     what differs from a recipe; behind another --config the recipe may
                                                     be left out
    {"model_type": "qwen3", ...}                     a published model, as the config.json of Hugging Face
"""

import gc
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from core.config.configurable import Configurable, field_names, owner_of
from core.config.console import tell_user
from core.config.decode import ConfigDecoder, is_inside
from core.config.errors import OtherFamily, UserError, did_you_mean, joined
from core.config.fields import alternatives, field_types, is_config, short_repr
from core.config.json_file import read_json
from core.config.links import file_in
from core.config.options import comparable
from core.config.outside import module_name, names_outside, place_and_name, recipe_outside, refused
from core.config.record import diff, from_dict

Config = Configurable.Config


def recipe_module(configs: str | ModuleType) -> ModuleType:
    """The module of the recipes, which may be given by its name.

    What the import of one brings, torch above all, is no garbage: it is not looked through meanwhile, 0.1 s each time,
    and nothing that is there at its end is later.
    """
    if isinstance(configs, ModuleType):
        return configs
    if configs in sys.modules or not gc.isenabled():
        return import_module(configs)
    gc.disable()
    try:
        module = import_module(configs)
        gc.freeze()
    finally:
        gc.enable()
    return module


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


def load_config(
    sources: Sequence[str], configs: ModuleType, *, trust: Collection[str] = (), of_part: str = ""
) -> Config:
    """The configuration of the first source, changed by the files behind it in their order.

    `trust` are the modules whose classes a file may name, besides those of the recipes' own package. `of_part` is said
    of a file that describes a part alone, whose folder is `{folder}`. Raises `UserError` for a source that is not there
    or does not fit, with all that is wrong in it.
    """
    first, *others = sources
    trust = [configs.__name__.partition(".")[0], *trust]
    if is_folder(first, configs):
        first = str(Path(first).expanduser() / "config.json")
    config = from_file(first, configs, trust, of_part) if first.endswith(".json") else from_recipe(first, configs)
    if names_outside(first) and not first.endswith(".json"):
        trust = [*trust, module_name(place_and_name(first)[0]).partition(".")[0]]
    for source in others:
        lay(source, config, configs, trust, first)
    return config


def is_folder(source: str, configs: ModuleType) -> bool:
    """Whether a source is a folder, whose config.json is meant; a recipe of that name goes before it."""
    return comparable(source) not in recipes(configs) and Path(source).expanduser().is_dir()


def from_recipe(source: str, configs: ModuleType) -> Config:
    """The configuration of a recipe. One with a field `recipe` is told its name."""
    known = recipes(configs)
    if (name := comparable(source)) in known:
        function = known[name]
    elif names_outside(source):
        name, function = recipe_outside(source)
    else:
        hint = did_you_mean(name, known, n=3) or f"the recipes are {', '.join(known)}"
        raise UserError(f"no recipe {source}; {hint}")
    config = function()
    if not isinstance(config, Config):
        mistake = UserError if names_outside(source) else TypeError
        raise mistake(f"{function.__module__}.{name} returns no Config: let the name of what is no recipe start with _")
    if "recipe" in field_names(type(config)):
        setattr(config, "recipe", name)  # noqa: B010 - not every Config has it
    return config


def from_file(source: str, configs: ModuleType, trust: Collection[str], of_part: str) -> Config:
    """The configuration of a file that stands first."""
    data = read_json(source)
    if "class" in data or "model_type" in data:
        config = stated(source, data, configs, trust)
        if not runs(config):
            return around(source, config, configs, of_part)
        tell_where(source, config)
        return config
    if "recipe" not in data:
        raise UserError(
            f'{source} has no "class", which a whole configuration has, and no "recipe" that it changes: put the '
            f"recipe in front of it, --config NAME {source}"
        )
    name = data.pop("recipe")
    if not isinstance(name, str):
        raise UserError(f"{source}: recipe: expected the name of one, got {short_repr(name)}")
    if names_outside(name) and not any(is_inside(module_name(place_and_name(name)[0]), package) for package in trust):
        raise UserError(f"{source}: {refused(f'the recipe {name}', place_and_name(name)[0])}")
    config = from_recipe(name, configs)
    change(source, config, data, trust)
    return config


def tell_where(source: str, config: Config) -> None:
    """Say that the file lies in the folder of a run, and states another one for it: it was moved, or copied."""
    here, folder = Path(source).resolve().parent, getattr(config, "dump_folder", None)
    if folder is not None and here != Path(folder).resolve() and (here / "metrics.jsonl").exists():
        tell_user(
            f"{source} says dump_folder {folder}, where the run is written; to go on here add --dump_folder {here}"
        )


def take_part(place: str, source: str, config: Config, configs: ModuleType, trust: Collection[str]) -> None:
    """Put into this place of a configuration what the config.json of a folder says of it: the configuration of a run,
    of that part, or of a published model. Raises `UserError` where it says nothing of it, or what cannot stand there.
    """
    path = Path(source).expanduser()
    file = str(file_in(path, "config.json") or path / "config.json") if path.is_dir() else str(path)
    data = read_json(file)
    data = data[place] if isinstance(data.get(place), dict) else data
    if not {"class", "model_type"} & data.keys():
        raise UserError(f"{file} describes no {place}: it states neither a class nor a model_type")
    part = stated(file, data, configs, [configs.__name__.partition(".")[0], *trust])
    if (fits := place_of(file, part, config)) != place:
        raise UserError(f"{file} describes a {type(part).__qualname__}, which stands at {fits}, not at {place}")
    setattr(config, place, part)


def lay(source: str, config: Config, configs: ModuleType, trust: Collection[str], first: str) -> None:
    """Change the configuration of the `first` source as a file behind it says."""
    if not source.endswith(".json"):
        raise UserError(f"--config takes one recipe, in front, and .json files behind it, got {source}")
    data = read_json(source)
    if "class" in data or "model_type" in data:
        part = stated(source, data, configs, trust)
        if runs(part):
            raise UserError(f"{source} is a whole configuration: put it in front of the files that change it")
        setattr(config, place_of(source, part, config), part)
        return
    below, named = getattr(config, "recipe", None), data.pop("recipe", None)
    if named not in (None, below, first):
        raise UserError(f"{source} changes the recipe {short_repr(named)}, not {short_repr(below)}")
    change(source, config, data, trust)


def published(data: dict[str, Any], configs: ModuleType, folder: str | Path, say: Callable[[str], object]) -> Config:
    """The part of a run that a published model's config.json in this folder describes, by the first family of the
    recipes that knows it: a class of theirs with a class method `from_published(data, folder, say)`, which raises
    `OtherFamily` for those of others.

    Raises `UserError` where none knows it, or the one that does cannot be this model.
    """
    known: dict[Any, None] = {}
    for name in recipes(configs):
        try:
            config = from_recipe(name, configs)
        except UserError:  # a recipe that cannot be had
            continue
        parts = (getattr(config, field) for field in field_names(type(config)))
        known |= {owner: None for part in parts if (owner := owner_of(type(part))) and hasattr(owner, "from_published")}
    others: list[str] = []
    for family in known:
        try:
            return family.from_published(data, Path(folder), say)
        except OtherFamily as error:
            others.append(str(error))
    raise UserError("\n".join(others) or f"no recipe here has a model that Hugging Face has: {data['model_type']}")


def stated(source: str, data: dict[str, Any], configs: ModuleType, trust: Collection[str]) -> Config:
    """The configuration, or the part of one, that this data of a file states; ours or that of a published model."""
    if "class" not in data:
        try:
            return published(data, configs, Path(source).parent, lambda line: tell_user(f"{source}: {line}"))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    try:
        return from_dict(data, trust=trust, say=lambda line: tell_user(f"{source}: {line}"))
    except UserError as error:
        raise UserError(f"{source} is no configuration:\n{error}") from error


def change(source: str, config: Config, data: dict[str, Any], trust: Collection[str]) -> None:
    """Set what the data of a file states."""
    decoder = ConfigDecoder(trust=trust)
    decoder.onto(config, data)
    if decoder.problems:
        raise UserError(f"{source} does not fit:\n{joined(decoder.problems)}")


def runs(config: Config) -> bool:
    """Whether what this configures is a run, not a part of one."""
    return callable(getattr(owner_of(type(config)), "run", None))


def place_of(source: str, part: Config, config: Config) -> str:
    """The field of a configuration in which a part of it stands; `UserError` where it could not, or in several."""
    places = [
        name
        for name, annotation in field_types(type(config)).items()
        if any(is_config(option) and isinstance(part, option) for option in alternatives(annotation))
    ]
    if len(places) != 1:
        where = " or ".join(places) or "nowhere"
        raise UserError(f"{source} describes a {type(part).__qualname__}, which may stand {where} in a run")
    return places[0]


def around(source: str, part: Config, configs: ModuleType, of_part: str) -> Config:
    """The recipe whose own part is most like this one, with this one in its place; it is said which that is."""
    near: list[tuple[int, str, str, Config]] = []
    for name in recipes(configs):
        try:
            config = from_recipe(name, configs)
            place = place_of(source, part, config)
        except UserError:  # of a recipe that cannot be had, or of another kind
            continue
        near.append((len(diff(part, getattr(config, place))), name, place, config))
    if not near:
        raise UserError(f"{source} describes a {type(part).__qualname__}, and no recipe has a place for it")
    _, name, place, config = min(near, key=lambda each: each[0])
    setattr(config, place, part)
    tell_user(
        f"{source} describes the {place} alone: all else is as in recipe {name}, whose {place} is most like it; "
        f"--config NAME {source} takes another's{of_part.format(folder=Path(source).parent)}"
    )
    return config
