"""A configuration of a subclass made from one of its parent's: how a recipe is extended by inheritance."""

from copy import deepcopy
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from core.config.configurable import Configurable, field_names, unknown_field
from core.config.errors import UserError
from core.config.fields import default_of, field_types, type_problems

ConfigT = TypeVar("ConfigT", bound=Configurable.Config)


def derive(config: Configurable.Config, into: type[ConfigT], **changes: Any) -> ConfigT:
    """A new `into` with the values of `config`, or of `changes` where those name a field.

    `into` is the class of `config` or derives from it; a field that it adds takes its default where no change names
    it. Nothing is shared with `config` or the changes: all values are deep copies. Raises one `UserError` that lists
    every name that is no field, with the nearest one, every added field that has neither a change nor a default, and
    every value that does not fit its field in `into`.

        derive(qwen3_debug(), MyTrainer.Config, z_loss=1e-4)
    """
    if not issubclass(into, type(config)):
        raise UserError(
            f"{into.__qualname__} does not derive from {type(config).__qualname__}, so it has no place for its fields: "
            f"derive({type(config).__qualname__}, ...) takes that class or a subclass"
        )
    problems = [unknown_field(into, name) for name in changes if name not in field_names(into)]
    known = {name: getattr(config, name) for name in field_names(type(config))} | changes
    problems += [
        f"{into.__qualname__}.{each.name} has no default: derive(..., {each.name}=...) states it"
        for each in fields(into)
        if each.name not in known and default_of(each) is MISSING
    ]
    problems += [
        f"{path}: {message}; derive(..., {name}=...) states another"
        for name, value in known.items()
        if name in field_names(into)
        for path, message in type_problems(value, field_types(into)[name], name)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return into(**deepcopy(known))
