"""A configuration as plain data and back: what stands in `config.json`, and how two configurations differ.

A nested config whose class its field does not already tell (a subclass, one of several, the root) carries it as
`"class": "module:Owner"`. Enums are written by name. Floats that are not finite are written as Python writes them (NaN,
Infinity), which Python reads back but strict JSON does not know.
"""

import json
import os
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, TypeVar, get_origin

from core.config.configurable import Configurable, owner_of
from core.config.console import tell_user
from core.config.decode import ConfigDecoder
from core.config.errors import at_most, joined
from core.config.fields import alternatives, default_of, field_types, is_config, join, members, typed_parts, walk
from core.config.json_file import parse_json
from core.config.validate import wrong_field_types

Config = Configurable.Config
ConfigT = TypeVar("ConfigT", bound=Configurable.Config)
MOST_DEFAULTS = 10
"""So many settings that an older file lacks are named."""


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists. Raises `UserError` where a value does not fit its field's type."""
    if problems := wrong_field_types(config):
        raise joined(problems)
    return _encode(config, Config)


def from_dict(
    data: Any, fits: type[Config] = Config, *, trust: Collection[str] = (), say: Callable[[str], object] = tell_user
) -> Config:
    """The configuration that `to_dict` gave this data for; its class must be `fits` or derive from it.

    A setting that is not there, because an older version wrote the data, takes its default, and `say` is told in one
    line which. Raises one `UserError` that lists all that is wrong: a setting that is unknown, one that has no default
    and is not there, a value that does not fit, a class of a module that is neither loaded already, nor of core, nor in
    `trust`.
    """
    decoder = ConfigDecoder(trust=trust)
    config = decoder.value(data, fits, "")
    if decoder.problems:
        raise joined(decoder.problems)
    if decoder.defaulted:
        say(f"not stated, so at the default: {', '.join(at_most(MOST_DEFAULTS, decoder.defaulted))}")
    return config


def to_json(config: Config) -> str:
    """The configuration as indented JSON that ends in a newline."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, fits: type[Config] = Config, *, trust: Collection[str] = ()) -> Config:
    """The configuration that `to_json` wrote as this text; errors as in `from_dict` and `parse_json`."""
    return from_dict(parse_json(text, "the text"), fits, trust=trust)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its path, `training.steps` or `layers.0.dim`, in the order of declaration and as JSON values."""
    return dict(_leaves(to_dict(config), ""))


def diff(config: Config, base: Config) -> list[tuple[str, Any, Any]]:
    """The settings that differ, as (path, value in the base, value here); `...` for a path that one side lacks."""
    return differences(to_dict(config), to_dict(base))


def differences(data: dict[str, Any], base: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """As `diff`, of configurations as data: those that another version wrote, too."""
    new, old = dict(_leaves(data, "")), dict(_leaves(base, ""))
    pairs = [(path, old.get(path, ...), new.get(path, ...)) for path in old | new]
    return [(path, before, after) for path, before, after in pairs if repr(before) != repr(after)]


def located(config: ConfigT) -> ConfigT:
    """A copy in which every place is absolute, as a file states it that is read in another directory."""
    copy = deepcopy(config)
    for _, node in walk(copy):
        for name, place in node.places().items():
            setattr(node, name, place)
    return copy


def place_paths(config: Config) -> list[str]:
    """The paths of the settings that name a place on this machine."""
    return [join(path, name) for path, node in walk(config) for name in node.places()]


def absolute(path: str | None) -> str | None:
    """A path that names the same place from any directory; what does so already (~/..., a URI) stays as it is."""
    return os.path.abspath(path) if path and "://" not in path and not path.startswith("~") else path


def completed(data: dict[str, Any], config: Config) -> dict[str, Any]:
    """A configuration as data of another version, and the settings of `config` that it lacks, at their defaults."""
    return _completed(data, config)


def _completed(data: Any, value: Any) -> Any:
    """`data` beside a value of this version."""
    if isinstance(data, list):
        return [_completed(part, members(value).get(place)) for place, part in enumerate(data)]
    if not isinstance(data, dict):
        return data
    known, added = members(value), {}
    if isinstance(value, Config):
        data = value.upgrade(data, value)
        types = field_types(type(value))
        lacking = {each.name: default_of(each) for each in fields(value) if each.name not in data}
        added = {name: _encode(part, types[name]) for name, part in lacking.items() if part is not MISSING}
        known = {name: getattr(value, name) for name in types}
    return {key: _completed(part, known.get(key)) for key, part in data.items()} | added


def _leaves(data: Any, path: str) -> list[tuple[str, Any]]:
    nested = isinstance(data, dict) or (isinstance(data, list) and any(isinstance(item, dict) for item in data))
    if not data or not nested:
        return [(path, data)]
    return [leaf for key, part in members(data).items() for leaf in _leaves(part, join(path, key))]


def _encode(value: Any, annotation: Any) -> Any:
    options = alternatives(annotation)
    if isinstance(value, Config):
        known = [option for option in options if is_config(option)] == [type(value)]
        types = field_types(type(value))
        fields = {name: _encode(getattr(value, name), types[name]) for name in types}
        return fields if known else {"class": _class_name(type(value)), **fields}
    for option in options:
        if type(value) is get_origin(option) and (items := typed_parts(value, option)) is not None:
            encoded = {key: _encode(part, part_type) for key, part, part_type in items}
            return encoded if isinstance(value, dict) else list(encoded.values())
    if isinstance(value, Enum):
        return value.name
    return float(value) if type(value) is int and float in options and int not in options else value


def _class_name(config: type[Config]) -> str:
    """`module:Owner`, the name under which a record finds the class again."""
    owner = owner_of(config)
    if owner is None or "<locals>" in owner.__qualname__:
        raise TypeError(f"{config.__qualname__} cannot be found again by name: nest it in a Configurable of a module")
    return f"{owner.__module__}:{owner.__qualname__}"
