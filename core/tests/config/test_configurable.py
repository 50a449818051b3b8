"""Configurable: the form of a Config, who builds whom, and what building leaves alone."""

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from core.config.configurable import Configurable
from core.config.errors import did_you_mean, joined


class Part(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        size: int = 1
        names: list[str] = field(default_factory=list)

        @property
        def doubled(self) -> int:
            return 2 * self.size

        def problems(self):
            if self.size < 0:
                yield "size", "negative"

    def __init__(self, config: Config, *, scale: float = 1.0) -> None:
        config.names.append("built")
        self.config, self.scale = config, scale


class Heir(Part):
    pass


class Grown(Part):
    @dataclass(kw_only=True, slots=True)
    class Config(Part.Config):
        extra: int = 0

        def problems(self):
            yield from super().problems()
            if self.extra < 0:
                yield "extra", "negative too"


class Whole(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        part: Part.Config = field(default_factory=Part.Config)

    def __init__(self, config: Config) -> None:
        config.part.size = 99
        self.part = config.part.build()


def test_build_makes_the_owner_from_a_copy():
    config = Part.Config(size=3)
    part = config.build(scale=0.5)
    assert type(part) is Part and part.scale == 0.5 and part.config.size == 3
    assert part.config.names == ["built"] and config.names == []


def test_building_leaves_nested_configs_alone():
    config = Whole.Config()
    before = copy.deepcopy(config)
    assert config.build().part.config.size == 99
    assert config == before


def test_a_subclass_without_a_config_builds_itself():
    config = Heir.Config(size=4)
    assert type(config.build()) is Heir
    assert issubclass(Heir.Config, Part.Config) and Heir.Config is not Part.Config
    assert Heir.Config.__qualname__ == "Heir.Config" and Heir.Config.__module__ == __name__
    assert pickle.loads(pickle.dumps(config)) == config
    assert "__slots__" in vars(Heir.Config)


def test_super_works_outside_of_a_configurable_too():
    @dataclass(kw_only=True, slots=True)
    class Settings(Configurable.Config):
        seed: int = 0

        def problems(self):
            yield "seed", "bad"
            yield from super().problems()

    assert list(Settings().problems()) == [("seed", "bad")]


def test_an_abstract_class_may_be_configurable():
    class Shape(Configurable, ABC):
        @dataclass(kw_only=True, slots=True)
        class Config(Configurable.Config):
            side: float = 1.0

        def __init__(self, config) -> None:
            self.config = config

        @abstractmethod
        def area(self) -> float: ...

    class Square(Shape):
        def area(self) -> float:
            return self.config.side**2

    assert Square.Config(side=3.0).build().area() == 9.0
    with pytest.raises(TypeError, match="abstract"):
        Shape.Config().build()


def test_super_works_in_the_methods_of_a_config():
    assert list(Grown.Config(size=-1, extra=-1).problems()) == [("size", "negative"), ("extra", "negative too")]


@pytest.mark.parametrize(
    "decorate",
    [
        lambda config: config,
        dataclass,
        dataclass(kw_only=True),
        dataclass(slots=True),
        dataclass(kw_only=True, slots=False),
    ],
)
def test_a_config_must_have_the_form(decorate: Callable):
    class Config(Configurable.Config):
        size: int = 1

    with pytest.raises(TypeError, match=r"Config must be a @dataclass\(kw_only=True, slots=True\)"):
        type("Wrong", (Configurable,), {"Config": decorate(Config)})


def test_errors_name_the_class():
    with pytest.raises(TypeError, match="Wrong.Config must be"):

        class Wrong(Configurable):
            class Config(Configurable.Config):
                size: int = 1


def test_derived_fields_and_names_of_methods_are_refused():
    with pytest.raises(TypeError, match="init=False"):

        class Derived(Configurable):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                size: int = field(init=False)

    with pytest.raises(TypeError, match="'build'.*cannot be fields"):

        class Shadow(Configurable):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                build: int = 1


def test_a_config_must_derive_from_its_parents():
    with pytest.raises(TypeError, match="Stranger.Config must derive from Part.Config"):

        class Stranger(Part):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                size: int = 1


def test_a_config_belongs_to_one_class():
    with pytest.raises(TypeError, match="is the Config of .*Part"):

        class Thief(Part):
            Config = Part.Config


def test_a_name_is_a_field_or_a_live_argument():
    with pytest.raises(TypeError, match=r"Both: \['size'\] are fields of the Config and arguments of __init__"):

        class Both(Configurable):
            @dataclass(kw_only=True, slots=True)
            class Config(Configurable.Config):
                size: int = 1

            def __init__(self, config, *, size): ...

    with pytest.raises(TypeError, match="scale"):  # an inherited __init__ against a new field

        class Late(Part):
            @dataclass(kw_only=True, slots=True)
            class Config(Part.Config):
                scale: float = 1.0

    with pytest.raises(TypeError, match="size"):  # an inherited field against a new __init__

        class Early(Part):
            def __init__(self, config, size): ...


def test_build_refuses_fields_and_unknown_arguments():
    with pytest.raises(ValueError, match=r"Part.Config: \['size'\] are fields"):
        Part.Config().build(size=3)
    with pytest.raises(TypeError, match="unknown"):
        Part.Config().build(unknown=3)


def test_a_config_outside_of_a_configurable_builds_nothing():
    @dataclass(kw_only=True, slots=True)
    class Settings(Configurable.Config):
        seed: int = 0

    @dataclass(kw_only=True, slots=True)
    class Inline(Part.Config):
        more: int = 0

    for config in (Settings(), Inline(), Configurable.Config()):
        with pytest.raises(TypeError, match="builds nothing"):
            config.build()


def test_setting_an_unknown_field_names_the_nearest():
    config = Part.Config()
    with pytest.raises(AttributeError, match=r"Part.Config has no field sizes; did you mean size\?"):
        config.sizes = 3
    with pytest.raises(AttributeError, match="it has size, names"):
        config.qqqq = 3
    with pytest.raises(AttributeError, match="doubled"):
        config.doubled = 3
    config.size = 5
    assert config.doubled == 10


def test_configs_compare_by_class_and_value():
    assert Part.Config(size=2) == Part.Config(size=2) != Part.Config(size=3)
    assert Heir.Config() != Part.Config()


def test_hints_and_joined_lines():
    names = ["qwen3_1_7b", "qwen3_4b", "llama"]
    assert did_you_mean("qwen3_1_8b", names) == "did you mean qwen3_1_7b?"
    assert did_you_mean("qwen3_1_8b", names, n=3) == "did you mean qwen3_1_7b or qwen3_4b?"
    assert did_you_mean("zzz", names) == ""
    assert str(joined([("a.b", "wrong"), ("", "all wrong")])) == "a.b: wrong\nall wrong"
