"""validate: every wrong type and every problem of the tree, in one error."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Optional

import pytest

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.fields import field_types, type_name, walk
from core.config.validate import validate

Color = Enum("Color", "RED BLUE")


class Layer(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int = 8

        def problems(self):
            if self.dim % 2:
                yield "dim", f"dim {self.dim} must be even"


class Wide(Layer):
    @dataclass(kw_only=True, slots=True)
    class Config(Layer.Config):
        factor: float = 2.0


class Net(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        steps: int = 10
        rate: float = 0.1
        enable: bool = False
        name: str | None = None
        mode: Literal["full", "none", 3] = "full"
        color: Color = Color.RED
        betas: tuple[float, float] = (0.9, 0.95)
        sizes: list[int] = field(default_factory=lambda: [1, 2])
        shares: dict[str, float] = field(default_factory=dict)
        first: Layer.Config = field(default_factory=Layer.Config)
        last: Optional[Layer.Config] = None  # noqa: UP045 - both spellings must do
        layers: list[Layer.Config] = field(default_factory=list)
        named: dict[str, Layer.Config] = field(default_factory=dict)

        def problems(self):
            if self.steps < 1:
                yield "steps", f"steps {self.steps} must be at least 1"
            if self.first.dim > 100:
                yield "first.dim", f"first.dim {self.first.dim} must be at most 100"
            if self.rate > self.steps:
                yield "", "rate above steps"


def problems_of(config: Configurable.Config) -> list[str]:
    with pytest.raises(UserError) as error:
        validate(config)
    return str(error.value).splitlines()


def test_a_good_tree_passes():
    validate(Net.Config())
    validate(
        Net.Config(
            rate=1,
            name="x",
            mode=3,
            first=Wide.Config(),
            last=Layer.Config(),
            layers=[Layer.Config(), Wide.Config()],
            named={"a": Wide.Config()},
            shares={"a": 1, "b": 0.5},
        )
    )


def test_all_problems_come_together_with_their_paths():
    config = Net.Config(
        steps=0,
        rate=5.0,
        first=Wide.Config(dim=103),
        layers=[Layer.Config(), Layer.Config(dim=1)],
        last=Layer.Config(dim=3),
    )
    config.named["odd"] = Layer.Config(dim=5)
    assert problems_of(config) == [
        "steps: steps 0 must be at least 1",
        "first.dim: first.dim 103 must be at most 100",
        "rate above steps",
        "first.dim: dim 103 must be even",
        "last.dim: dim 3 must be even",
        "layers.1.dim: dim 1 must be even",
        "named.odd.dim: dim 5 must be even",
    ]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("steps", "100", "steps: expected int, got '100'"),
        ("steps", True, "steps: expected int, got True"),
        ("steps", 1.0, "steps: expected int, got 1.0"),
        ("steps", None, "steps: expected int, got None"),
        ("rate", "1e-3", "rate: expected float, got '1e-3'"),
        ("rate", True, "rate: expected float, got True"),
        ("enable", 1, "enable: expected bool, got 1"),
        ("name", 3, "name: expected str or None, got 3"),
        ("mode", "ful", "mode: expected 'full' or 'none' or 3, got 'ful'"),
        ("mode", 3.0, "mode: expected 'full' or 'none' or 3, got 3.0"),
        ("color", "RED", "color: expected Color (RED, BLUE), got 'RED'"),
        ("betas", [0.9, 0.95], "betas: expected tuple[float, float], got [0.9, 0.95]"),
        ("betas", (0.9,), "betas: expected tuple[float, float], got (0.9,)"),
        ("betas", (0.9, "x"), "betas.1: expected float, got 'x'"),
        ("sizes", (1, 2), "sizes: expected list[int], got (1, 2)"),
        ("sizes", [1, "2"], "sizes.1: expected int, got '2'"),
        ("shares", {"a": "b"}, "shares.a: expected float, got 'b'"),
        ("shares", {1: 1.0}, "shares: expected keys of type str, got 1"),
        ("first", None, "first: expected Layer.Config, got None"),
        ("last", 3, "last: expected Layer.Config or None, got 3"),
        ("layers", [Layer.Config(), 3], "layers.1: expected Layer.Config, got 3"),
    ],
)
def test_wrong_types(name: str, value: Any, line: str):
    config = Net.Config()
    setattr(config, name, value)
    assert problems_of(config) == [line]


def test_a_config_of_another_class_does_not_fit():
    (line,) = problems_of(Net.Config(first=Net.Config()))  # type: ignore
    assert line.startswith("first: expected Layer.Config, got Net.Config(")
    assert len(line) < 100


def test_problems_are_not_asked_of_a_config_with_wrong_types_below():
    config = Net.Config(steps=0, first=Layer.Config(dim="x"), last=Layer.Config(dim=3))  # type: ignore
    assert problems_of(config) == ["first.dim: expected int, got 'x'", "last.dim: dim 3 must be even"]


def test_walk_gives_parents_first_in_the_order_of_declaration():
    config = Net.Config(layers=[Layer.Config(), Wide.Config()], last=Layer.Config())
    assert [path for path, _ in walk(config)] == ["", "first", "last", "layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Any, "Any is not data"),
        (object, "object is not data"),
        (list, "list is not data"),
        (set[int], r"set\[int\] is not data"),
        (dict[int, str], r"dict\[int, str\] is not data"),
        (list[object], "object is not data"),
        (int | object, "object is not data"),
        (str | Color, "look the same in JSON"),
        (Literal["a"] | str, "look the same in JSON"),
        (list[int] | tuple[int, ...], "look the same in JSON"),
        (dict[str, int] | Layer.Config, "look the same in JSON"),
        (list[str | Color], "look the same in JSON"),
    ],
)
def test_a_field_must_be_data_that_json_can_tell(annotation: Any, reason: str):
    class Toy(Configurable):
        @dataclass(kw_only=True, slots=True)
        class Config(Configurable.Config):
            thing: annotation = None

    with pytest.raises(TypeError, match=rf"Toy.Config.thing: .*{reason}"):
        field_types(Toy.Config)


def test_type_names():
    names = {
        int | None: "int or None",
        Optional[float]: "float or None",  # noqa: UP045
        tuple[int, ...]: "tuple[int, ...]",
        dict[str, list[int]]: "dict[str, list[int]]",
        Layer.Config | Net.Config: "Layer.Config or Net.Config",
    }
    for annotation, name in names.items():
        assert type_name(annotation) == name


def test_settings_outside_of_a_configurable_need_the_form_too():
    class Loose(Configurable.Config):
        seed: int = 0

    with pytest.raises(TypeError, match="Loose must be a @dataclass"):
        field_types(Loose)
