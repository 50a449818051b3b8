"""A class that is built from its own nested Config: what a run is, as data, beside the code that it configures."""

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, ClassVar

from core.config.errors import did_you_mean


class Configurable:
    """A class with a nested `Config` that says everything about an instance that may stand in a file.

    The Config is a `@dataclass(kw_only=True, slots=True)` that derives from the parent's Config, and makes its owner by
    `config.build(**live)`. Live arguments are objects of one run (a tokenizer, parameters) or numbers that another
    Config states; they are arguments of `__init__` after `config`, and never fields. A subclass that states no Config
    gets an empty one of its own, so that it builds itself. A breach is a TypeError when the class is made.
    """

    @dataclass(kw_only=True, slots=True)
    class Config:
        """Fields are data: numbers, strings, None, enums, literals, other Configs, and lists, tuples and dicts of them.

        A derived value is a property. A group of settings that configures no class of its own may be a Config outside
        of any Configurable; it has no `build`.
        """

        _owner: ClassVar[type | None] = None

        def __init_subclass__(cls) -> None:
            mend_super(cls)

        def build(self, **live: Any) -> Any:
            """A new instance of the owner, made from a copy of this config and the live arguments."""
            config, owner = type(self), owner_of(type(self))
            if owner is None:
                raise TypeError(f"{config.__qualname__} builds nothing: it is not nested in a Configurable")
            if both := sorted(live.keys() & set(field_names(config))):
                raise ValueError(f"{config.__qualname__}: {both} are fields; set them there instead of passing them on")
            return owner(deepcopy(self), **live)

        def problems(self) -> Iterator[tuple[str, str]]:
            """What is wrong with the values: pairs of a field's path below this config and a message with the mend.

            Types have been checked before; an empty path blames the config as a whole.
            """
            yield from ()

        @classmethod
        def upgrade(cls, data: dict[str, Any], now: "Configurable.Config | None" = None) -> dict[str, Any]:
            """Settings that an older version wrote, as this version writes them; those of this version stay.

            `now` is the configuration that they change, None where they make a new one. A "class" that is added here
            keeps the other settings of `now`.
            """
            del now
            return data

        def places(self) -> dict[str, Any]:
            """The settings that name a place on this machine, so that they name the same one from any directory."""
            return {}

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                object.__setattr__(self, name, value)
            except AttributeError:
                if hasattr(type(self), name):
                    raise  # a property without a setter: Python says it well
                raise AttributeError(unknown_field(type(self), name)) from None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" not in vars(cls):
            names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            config = dataclass(kw_only=True, slots=True)(type("Config", (cls.Config,), names))
            cls.Config = config  # pyrefly: ignore[read-only]
        check_config(cls.Config)
        for parent in cls.__bases__:
            if issubclass(parent, Configurable) and not issubclass(cls.Config, parent.Config):
                raise TypeError(f"{cls.__qualname__}.Config must derive from {parent.__qualname__}.Config")
        if (owner := owner_of(cls.Config)) is not None:
            raise TypeError(f"{cls.__qualname__}.Config is the Config of {owner.__qualname__}: derive a class from it")
        live = inspect.signature(cls.__init__).parameters.keys()
        if both := [name for name in field_names(cls.Config) if name in live]:
            raise TypeError(
                f"{cls.__qualname__}: {both} are fields of the Config and arguments of __init__: choose one"
            )
        cls.Config._owner = cls


def range_problems(config: Configurable.Config, low: int = 1, **most: int) -> Iterator[tuple[str, str]]:
    """The fields below `low`, or above what is stated for each: so large ones are mistakes, which would take memory and
    minutes before they show. A field that is None is left out."""
    for name, high in most.items():
        value, or_none = getattr(config, name), ", or None" * ("None" in str(config.__dataclass_fields__[name].type))
        if value is not None and value < low:
            yield name, f"{name} {value} must be at least {low}{or_none}"
        elif value is not None and value > high:
            yield name, f"{name} {value:,} must be at most {high:,}{or_none}"


def owner_of(config: type[Configurable.Config]) -> type | None:
    """The class that this very Config builds; None for a Config that stands outside of a Configurable."""
    return vars(config).get("_owner")


def field_names(config: type[Configurable.Config]) -> list[str]:
    """The names of all fields, inherited ones first."""
    return [field.name for field in fields(config)]


def unknown_field(config: type[Configurable.Config], name: str) -> str:
    """Says that the config has no field of that name, and which one may be meant."""
    names = field_names(config)
    hint = did_you_mean(name, names) or f"it has {', '.join(names) or 'none'}"
    return f"{config.__qualname__} has no field {name}; {hint}"


def check_config(config: type[Configurable.Config]) -> None:
    """Raise a TypeError unless this class itself is a dataclass with slots, and all its fields are keywords."""
    own = {"__slots__", "__dataclass_fields__"} <= vars(config).keys()
    if not own or not all(field.kw_only and field.init for field in fields(config)):
        raise TypeError(
            f"{config.__qualname__} must be a @dataclass(kw_only=True, slots=True) without init=False fields"
        )
    if taken := sorted({"build", "places", "problems", "upgrade"} & set(field_names(config))):
        raise TypeError(f"{config.__qualname__}: {taken} cannot be fields, every Config has methods of that name")


def mend_super(config: type) -> None:
    """Let `super()` work in the methods of a Config.

    `dataclass(slots=True)` makes a second class and leaves the methods with the first (python/cpython#90562, mended in
    Python 3.14).
    """
    for member in vars(config).values():
        if isinstance(member, FunctionType) and "__class__" in member.__code__.co_freevars:
            cell = (member.__closure__ or ())[member.__code__.co_freevars.index("__class__")]
            cell.cell_contents = config
