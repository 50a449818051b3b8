"""Plain data to a configuration: every mistake at once, and no code that the data alone asked for.

A file may name classes, and a class is found by importing its module, which runs it. So only modules are imported that
this process has loaded already, those of core, and those of packages that the caller trusts.
"""

import sys
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from reprlib import repr as short_repr
from typing import Any, get_origin

from core.config.configurable import Configurable, unknown_field
from core.config.errors import UserError
from core.config.fields import (
    Problem,
    abstract_problem,
    alternatives,
    default_of,
    field_types,
    is_config,
    is_enum,
    join,
    type_name,
    type_problems,
    typed_parts,
)
from core.config.outside import import_outside, refused

Config = Configurable.Config
OWN_PACKAGE = "core"


@dataclass(kw_only=True, slots=True)
class ConfigDecoder:
    """Values out of data, and what was found on the way."""

    trust: Collection[str] = ()
    """Packages and modules whose classes are taken, besides those that are loaded and those of core."""
    problems: list[Problem] = field(default_factory=list)
    """What does not fit."""
    defaulted: list[str] = field(default_factory=list)
    """Paths of the settings that are not stated, each with the default that it takes."""

    def value(self, data: Any, annotation: Any, path: str) -> Any:
        """The value that was written as `data` for a field of this type."""
        options = alternatives(annotation)
        if isinstance(data, dict) and any(map(is_config, options)):
            return self.config(data, annotation, path)
        for option in options:
            if (items := typed_parts(data, option)) is not None:
                decoded = {key: self.value(part, part_type, join(path, key)) for key, part, part_type in items}
                return decoded if isinstance(data, dict) else get_origin(option)(decoded.values())
            if is_enum(option) and isinstance(data, str) and data in option.__members__:
                return option[data]
        problems = list(type_problems(data, annotation, path))
        self.problems += problems
        as_float = type(data) is int and float in options and int not in options
        return float(data) if as_float and not problems else data

    def config(self, data: dict[str, Any], annotation: Any, path: str) -> Config | None:
        """The configuration that the data describes; None where it lacks a setting without a default."""
        for option in filter(is_config, alternatives(annotation)):
            data = option.upgrade(data)
        try:
            config = self.class_of(data, annotation)
        except UserError as error:
            self.problems.append((join(path, "class"), str(error)))
            return None
        data = config.upgrade(data)
        types, values = field_types(config), {}
        unknown = [name for name in data if name not in types and name != "class"]
        self.problems += [(join(path, name), unknown_field(config, name)) for name in unknown]
        for each in fields(config):
            place = join(path, each.name)
            if each.name in data:
                values[each.name] = self.value(data[each.name], types[each.name], place)
            elif (default := default_of(each)) is MISSING:
                self.problems.append((place, f"missing; expected {type_name(types[each.name])}"))
            else:
                values[each.name] = default
                self.defaulted.append(place if isinstance(default, Config) else f"{place} {short_repr(default)}")
        return config(**values) if len(values) == len(types) else None

    def onto(self, config: Config, data: dict[str, Any], path: str = "") -> None:
        """Set what the data states in a configuration that is there already; all else stays as it is."""
        data, types = config.upgrade(data, config), field_types(type(config))
        for name, part in data.items():
            place = join(path, name)
            if name not in types and not (path and name == "class"):
                self.problems.append((place, unknown_field(type(config), name)))
            elif name in types:
                value = getattr(config, name)
                if isinstance(value, Config) and isinstance(part, dict):
                    self._onto_part(config, name, part, place)
                else:
                    setattr(config, name, self.value(part, types[name], place))

    def _onto_part(self, config: Config, name: str, data: dict[str, Any], path: str) -> None:
        """Set what the data states in a part of a configuration, which becomes a new one where its class changes."""
        value, annotation = getattr(config, name), field_types(type(config))[name]
        newer = value.upgrade(data, value)
        if self._is_of(newer, value, annotation):
            self.onto(value, newer, path)
            return
        made = self.value(newer, annotation, path)
        if isinstance(made, Config) and "class" not in data:  # an older version had one class with a setting
            for kept in field_types(type(made)).keys() & field_types(type(value)).keys() - newer.keys():
                setattr(made, kept, getattr(value, kept))
        setattr(config, name, made)

    def _is_of(self, data: dict[str, Any], value: Config, annotation: Any) -> bool:
        """Whether the data is about the class that this value has."""
        try:
            return "class" not in data or self.class_of(data, annotation) is type(value)
        except UserError:
            return False  # and decoding the data says what is wrong

    def class_of(self, data: dict[str, Any], annotation: Any) -> type[Config]:
        """The class that the data asks for, if it fits; else a `UserError`."""
        choices = [option for option in alternatives(annotation) if is_config(option)]
        expected = type_name(annotation)
        if "class" not in data:
            if len(choices) == 1 and choices[0] is not Config and not abstract_problem(choices[0]):
                return choices[0]
            raise UserError(f'missing; expected "module:Class" with a Config that is a {expected}')
        owner = self._find(data["class"])
        fits = isinstance(owner, type) and issubclass(owner, Configurable) and issubclass(owner.Config, tuple(choices))
        if not fits:
            raise UserError(f"{data['class']} is no Configurable with a Config that is a {expected}")
        if reason := abstract_problem(owner.Config):
            raise UserError(reason)
        return owner.Config

    def _find(self, name: Any) -> Any:
        """What goes by the name `module:Class`, or None."""
        module, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
        if not all(part.isidentifier() for part in [*module.split("."), *path.split(".")]):
            raise UserError(f'expected "module:Class", got {short_repr(name)}')
        if module not in sys.modules and not any(is_inside(module, package) for package in (OWN_PACKAGE, *self.trust)):
            raise UserError(refused(name, module))
        try:
            found: Any = import_module(module)
        except ImportError as error:
            raise UserError(f"{name} cannot be imported: {error}") from error
        for part in path.split("."):
            found = getattr(found, "__dict__", {}).get(part)  # getattr(found, part) may run code
        return found


def is_inside(module: str, package: str) -> bool:
    """Whether a module is this package, or in it."""
    return f"{module}.".startswith(f"{package}.")


def trusted(modules: Collection[str]) -> list[str]:
    """The names of these modules and `.py` files, which are imported now: their code may run. Raises `UserError` for
    one that is not there."""
    return [import_outside(module, "--trust").__name__ for module in modules]
