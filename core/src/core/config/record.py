"""A configuration as plain data and back: what stands in `config.json`, and how two configurations differ.

A nested config whose class its field does not already tell (a subclass, one of several, the root) carries it as
`"class": "module:Owner"`. Enums are written by name. Floats that are not finite are written as Python writes them (NaN,
Infinity), which Python reads back but strict JSON does not know.
"""

import json
from enum import Enum
from importlib import import_module
from typing import Any, get_origin

from core.config.configurable import Configurable, owner_of, unknown_field
from core.config.errors import UserError, joined
from core.config.fields import (
    Problem,
    alternatives,
    field_types,
    is_config,
    is_enum,
    join,
    parts,
    short_repr,
    type_name,
    type_problems,
    typed_parts,
)
from core.config.json_file import parse_json
from core.config.validate import wrong_field_types

Config = Configurable.Config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists. Raises `UserError` where a value does not fit its field's type."""
    if problems := wrong_field_types(config):
        raise joined(problems)
    return _encode(config, Config)


def from_dict(data: Any, fits: type[Config] = Config) -> Config:
    """The configuration that `to_dict` gave this data for; its class must be `fits` or derive from it.

    Every field must be there and nothing else. Raises one `UserError` that lists all that is wrong.
    """
    problems: list[Problem] = []
    config = _decode(data, fits, "", problems)
    if problems:
        raise joined(problems)
    return config


def to_json(config: Config) -> str:
    """The configuration as indented JSON that ends in a newline."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, fits: type[Config] = Config) -> Config:
    """The configuration that `to_json` wrote as this text; errors as in `from_dict` and `parse_json`."""
    return from_dict(parse_json(text, "the text"), fits)


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


def _leaves(data: Any, path: str) -> list[tuple[str, Any]]:
    nested = isinstance(data, dict) or (isinstance(data, list) and any(isinstance(item, dict) for item in data))
    if not data or not nested:
        return [(path, data)]
    return [leaf for key, part in parts(data).items() for leaf in _leaves(part, join(path, key))]


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


def _decode(data: Any, annotation: Any, path: str, problems: list[Problem]) -> Any:
    """The value that was written as `data`. What does not fit adds to the problems."""
    options = alternatives(annotation)
    if isinstance(data, dict) and any(map(is_config, options)):
        return _decode_config(data, annotation, path, problems)
    for option in options:
        if (items := typed_parts(data, option)) is not None:
            decoded = {key: _decode(part, part_type, join(path, key), problems) for key, part, part_type in items}
            return decoded if isinstance(data, dict) else get_origin(option)(decoded.values())
        if is_enum(option) and isinstance(data, str) and data in option.__members__:
            return option[data]
    problems += type_problems(data, annotation, path)
    return float(data) if type(data) is int and float in options and int not in options else data


def _decode_config(data: dict[str, Any], annotation: Any, path: str, problems: list[Problem]) -> Config | None:
    try:
        config = _class_of(data, annotation)
    except UserError as error:
        problems.append((join(path, "class"), str(error)))
        return None
    types, values = field_types(config), {}
    unknown = [name for name in data if name not in types and name != "class"]
    problems += [(join(path, name), unknown_field(config, name)) for name in unknown]
    for name, field_type in types.items():
        if name in data:
            values[name] = _decode(data[name], field_type, join(path, name), problems)
        else:
            problems.append((join(path, name), f"missing; expected {type_name(field_type)}"))
    return config(**values) if len(values) == len(types) else None


def _class_of(data: dict[str, Any], annotation: Any) -> type[Config]:
    """The class that the data asks for, if it fits; else a `UserError`. Only the module that it names is imported."""
    choices = [option for option in alternatives(annotation) if is_config(option)]
    expected = type_name(annotation)
    if "class" not in data:
        if len(choices) == 1 and choices[0] is not Config:
            return choices[0]
        raise UserError(f'missing; expected "module:Class" with a Config that is a {expected}')
    owner = _resolve(data["class"])
    if not (isinstance(owner, type) and issubclass(owner, Configurable) and issubclass(owner.Config, tuple(choices))):
        raise UserError(f"{data['class']} is no Configurable with a Config that is a {expected}")
    return owner.Config


def _class_name(config: type[Config]) -> str:
    """`module:Owner`, the name under which a record finds the class again."""
    owner = owner_of(config)
    if owner is None or "<locals>" in owner.__qualname__:
        raise TypeError(f"{config.__qualname__} cannot be found again by name: nest it in a Configurable of a module")
    return f"{owner.__module__}:{owner.__qualname__}"


def _resolve(name: Any) -> Any:
    module, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
        raise UserError(f'expected "module:Class", got {short_repr(name)}')
    try:
        found = import_module(module)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported: {error}") from error
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
