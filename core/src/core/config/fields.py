"""What a field of a Config may hold: the types that are data, the values that fit them, and the tree that they make."""

from collections.abc import Iterator
from dataclasses import MISSING, Field
from enum import Enum
from functools import cache
from inspect import isabstract
from reprlib import repr as short_repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from core.config.configurable import Configurable, check_config, field_names, owner_of

SCALARS = (NoneType, bool, int, float, str)
MOST, MOST_CHARACTERS = 2**63 - 1, 2**20
Problem = tuple[str, str]
"""Path and message."""


@cache
def field_types(config: type[Configurable.Config]) -> dict[str, Any]:
    """The type of every field, in order. Raises TypeError for one that is not data, or that JSON would confuse."""
    check_config(config)
    hints = get_type_hints(config)
    for name in field_names(config):
        if reason := not_data(hints[name]):
            raise TypeError(f"{config.__qualname__}.{name}: {reason}")
    return {name: hints[name] for name in field_names(config)}


def default_of(field: Field[Any]) -> Any:
    """The default of a field, made anew where a factory makes it; MISSING where there is none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type there is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def is_config(option: Any) -> bool:
    """Whether a type is a class of Configs."""
    return isinstance(option, type) and issubclass(option, Configurable.Config)


def is_enum(option: Any) -> bool:
    """Whether a type is an enum."""
    return isinstance(option, type) and issubclass(option, Enum)


def not_data(annotation: Any) -> str:
    """Why a field may not have this type; empty if it may."""
    written_as: list[type] = [dict] if any(map(is_config, alternatives(annotation))) else []
    for option in alternatives(annotation):
        origin, arguments = get_origin(option), [argument for argument in get_args(option) if argument is not ...]
        if option in SCALARS or is_enum(option):
            written_as.append(option if option in SCALARS else str)
        elif origin is Literal and all(type(member) in SCALARS for member in arguments):
            written_as += {type(member) for member in arguments}
        elif arguments and (origin in (list, tuple) or (origin is dict and arguments[0] is str)):
            written_as.append(dict if origin is dict else list)
            if reason := "".join(map(not_data, arguments)):
                return reason
        elif not is_config(option):
            return f"{type_name(option)} is not data"
    confused = len(written_as) > len(set(written_as))
    return f"two members of {type_name(annotation)} look the same in JSON" if confused else ""


def type_name(annotation: Any) -> str:
    """The type as a user would say it: `int or None`, `'full' or 'none'`, `Color (RED, BLUE)`."""
    options, origin, arguments = alternatives(annotation), get_origin(annotation), get_args(annotation)
    if len(options) > 1:
        return " or ".join(map(type_name, options))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if a is ... else type_name(a) for a in arguments)}]"
    if is_enum(annotation):
        return f"{annotation.__qualname__} ({', '.join(annotation.__members__)})"
    return "None" if annotation is NoneType else getattr(annotation, "__qualname__", str(annotation))


def members(value: Any) -> dict[Any, Any]:
    """What a list, tuple or dict holds, by index or key; nothing for any other value."""
    return value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}


def typed_parts(value: Any, option: Any) -> list[tuple[Any, Any, Any]] | None:
    """(key, part, its type) for what a list, tuple or dict holds; None where it cannot be of the type `option`."""
    origin, arguments = get_origin(option), get_args(option)
    fits = isinstance(value, dict) if origin is dict else origin in (list, tuple) and isinstance(value, list | tuple)
    fixed = origin is tuple and arguments[-1] is not ...
    if not fits or fixed and len(value) != len(arguments):
        return None
    types = arguments if fixed else [arguments[-1] if origin is dict else arguments[0]] * len(value)
    return [(key, part, part_type) for (key, part), part_type in zip(members(value).items(), types, strict=True)]


def type_problems(value: Any, annotation: Any, path: str) -> Iterator[Problem]:
    """Where a value does not fit its type, down to the Configs in it, which are not entered. An int fits a float."""
    for option in alternatives(annotation):
        if type(value) is get_origin(option) and (items := typed_parts(value, option)) is not None:
            for key, part, part_type in items:
                yield from type_problems(part, part_type, join(path, key))
                if isinstance(value, dict) and type(key) is not str:
                    yield path, f"expected keys of type str, got {short_repr(key)}"
            return
        if option is Any:
            return
        if get_origin(option) is Literal:
            fits = any(type(value) is type(member) and value == member for member in get_args(option))
        else:
            fits = isinstance(value, option) if is_config(option) or is_enum(option) else type(value) is option
        if fits or (option is float and type(value) is int):
            if reason := out_of_bounds(value):
                yield path, reason
            return
    yield path, f"expected {type_name(annotation)}, got {short_repr(value)}"


def out_of_bounds(value: Any) -> str:
    """Why a number or a text is none that a setting may have, whatever it is for; empty if it may."""
    if type(value) is int and not -MOST <= value <= MOST:
        return f"a whole number must be from -2^63 to 2^63 - 1, this one has {value.bit_length()} bits"
    if isinstance(value, str) and ("\0" in value or len(value) > MOST_CHARACTERS):
        return f"a text may have {MOST_CHARACTERS:,} characters, and no zero byte; this one has {len(value):,}"
    return ""


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Configurable.Config]]:
    """Every Config in a value with its path, parents first, in the order of declaration."""
    if isinstance(value, Configurable.Config):
        yield path, value
        value = {name: getattr(value, name) for name in field_types(type(value))}
    for key, part in members(value).items():
        yield from walk(part, join(path, key))


def join(path: str, key: object) -> str:
    """`path.key`; the one alone where the other is empty."""
    return f"{path}.{key}" if path and key != "" else path or str(key)


def abstract_problem(config: type[Configurable.Config]) -> str:
    """Why a class of Configs builds nothing, since its owner stands for several classes; empty if it does build."""
    owner = owner_of(config)
    if owner is None or not isabstract(owner):
        return ""
    finals, todo = set(), [owner]
    while todo:
        kinds = todo.pop().__subclasses__()
        todo += kinds
        finals |= {f"{kind.__qualname__}.Config" for kind in kinds if not isabstract(kind)}
    known = f", {' or '.join(sorted(finals))}" if finals else ""
    return f"{owner.__qualname__} is abstract: choose a class that derives from it{known}"
