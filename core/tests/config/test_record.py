"""The record: a configuration to JSON and back, what is refused on the way, and how two of them differ."""

import json
import math
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.record import diff, flatten, from_dict, from_json, to_dict, to_json


class Color(Enum):
    RED = 1
    BLUE = "b"


class Model(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int = 8


class Deep(Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Model.Config):
        n_layers: int = 2


class Heir(Deep):
    pass


class Adam(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        betas: tuple[float, float] = (0.9, 0.95)


class Muon(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        momentum: float = 0.95


@dataclass(kw_only=True, slots=True)
class Training(Configurable.Config):
    steps: int = 10
    rate: float = 0.1


class Outer:
    class Run(Configurable):
        @dataclass(kw_only=True, slots=True)
        class Config(Configurable.Config):
            seed: int
            enable: bool = True
            name: str | None = None
            scale: int | float = 1
            auto: int | Literal["auto"] = "auto"
            mode: Literal["full", "none"] = "full"
            color: Color = Color.RED
            colors: list[Color] | None = None
            sizes: tuple[int, ...] = (1, 2, 3)
            pair: tuple[int, str] = (1, "x")
            table: dict[str, list[int]] = field(default_factory=dict)
            training: Training = field(default_factory=Training)
            model: Model.Config = field(default_factory=Deep.Config)
            optimizer: Adam.Config | Muon.Config = field(default_factory=Adam.Config)
            maybe: Adam.Config | None = None
            layers: list[Model.Config] = field(default_factory=list)
            named: dict[str, Model.Config] = field(default_factory=dict)


Run = Outer.Run


def rich() -> Run.Config:
    return Run.Config(
        seed=1,
        enable=False,
        name='naïve\n"text"',
        scale=2,
        auto=3,
        mode="none",
        color=Color.BLUE,
        colors=[Color.RED, Color.BLUE],
        sizes=(),
        pair=(7, "y"),
        table={"a": [1, 2], "class": []},
        training=Training(steps=3, rate=1e-5),
        model=Heir.Config(dim=4),
        optimizer=Muon.Config(momentum=0.5),
        maybe=Adam.Config(betas=(0.5, 0.25)),
        layers=[Model.Config(), Deep.Config(n_layers=9)],
        named={"x": Heir.Config()},
    )


@pytest.mark.parametrize("config", [Run.Config(seed=0), rich(), Deep.Config(), Heir.Config()], ids=repr)
def test_the_round_trip_is_the_identity(config: Configurable.Config):
    again = from_json(to_json(config))
    assert again == config and type(again) is type(config)
    assert to_json(again) == to_json(config)
    assert repr(again) == repr(config)


def test_the_classes_that_are_written():
    data = to_dict(rich())
    module = __name__
    assert data["class"] == f"{module}:Outer.Run"
    assert data["model"] == {"class": f"{module}:Heir", "dim": 4, "n_layers": 2}
    assert data["optimizer"] == {"class": f"{module}:Muon", "momentum": 0.5}
    assert data["maybe"] == {"betas": [0.5, 0.25]}
    assert data["training"] == {"steps": 3, "rate": 1e-5}
    assert data["layers"] == [{"dim": 8}, {"class": f"{module}:Deep", "dim": 8, "n_layers": 9}]
    assert data["color"] == "BLUE" and data["colors"] == ["RED", "BLUE"]
    assert list(data)[:4] == ["class", "seed", "enable", "name"]


@pytest.mark.parametrize("rate", [math.inf, -math.inf, math.nan])
def test_floats_that_are_not_finite_survive(rate: float):
    config = Run.Config(seed=0, training=Training(rate=rate))
    assert repr(from_json(to_json(config)).training.rate) == repr(rate)


def test_an_int_in_a_float_field_becomes_a_float():
    data = to_dict(Run.Config(seed=0, training=Training(rate=1)))
    assert repr(data["training"]["rate"]) == "1.0"
    data["training"]["rate"] = 2
    rate = from_dict(data).training.rate
    assert rate == 2.0 and type(rate) is float
    data["scale"] = 5
    assert type(from_dict(data).scale) is int


def test_a_root_of_a_known_class_needs_no_name():
    data = to_dict(Deep.Config(dim=2))
    del data["class"]
    assert from_dict(data, Deep.Config) == Deep.Config(dim=2)
    assert from_dict(to_dict(Heir.Config()), Model.Config) == Heir.Config()
    with pytest.raises(UserError, match='class: missing; expected "module:Class"'):
        from_dict(data)
    with pytest.raises(UserError, match="no Configurable with a Config that is a Adam.Config"):
        from_dict(to_dict(Deep.Config()), Adam.Config)


def test_of_very_much_that_is_wrong_the_beginning_is_told():
    """As where sections changed places."""
    wrong = {f"field_{n}": n for n in range(40)}
    with pytest.raises(UserError) as caught:
        from_dict(wrong | {"class": f"{__name__}:Adam"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "and 20 more"
    assert lines[0].startswith("field_0: Adam.Config has no field field_0")


def test_everything_wrong_is_told_at_once():
    data = to_dict(Run.Config(seed=0))
    data["training"] = {"stpes": 3, "rate": "fast"}
    data["seed"] = True
    data["sizes"] = [1, 2.5]
    data["pair"] = [1]
    data["color"] = "GREEN"
    data["table"] = {"a": 3}
    data["layers"] = [{"dim": 8}, 3, {"dim": None}]
    data["optimizer"] = {"momentum": 1.0}
    data["maybe"] = []
    data["zzz"] = 1
    del data["mode"]  # has a default
    with pytest.raises(UserError) as error:
        from_dict(data)
    assert sorted(str(error.value).splitlines()) == sorted(
        [
            "zzz: Outer.Run.Config has no field zzz; it has "
            + ", ".join(name for name in to_dict(Run.Config(seed=0)) if name != "class"),
            "training.stpes: Training has no field stpes; did you mean steps?",
            "training.rate: expected float, got 'fast'",
            "seed: expected int, got True",
            "sizes.1: expected int, got 2.5",
            "pair: expected tuple[int, str], got [1]",
            "color: expected Color (RED, BLUE), got 'GREEN'",
            "table.a: expected list[int], got 3",
            "layers.1: expected Model.Config, got 3",
            "layers.2.dim: expected int, got None",
            'optimizer.class: missing; expected "module:Class" with a Config that is a Adam.Config or Muon.Config',
            "maybe: expected Adam.Config or None, got []",
        ]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:Adam", "no Configurable with a Config that is a Model.Config"),
        (f"{__name__}:Deep.Config", "no Configurable with a Config that is a Model.Config"),
        (f"{__name__}:Training", "no Configurable"),
        (f"{__name__}:Gone", "no Configurable"),
        (f"{__name__}:to_dict", "no Configurable"),
        ("builtins:int", "no Configurable"),
        (
            "no_such_module_at_all:X",
            "is code of the module no_such_module_at_all, and a file alone",
        ),
        ("core.no_such_module:X", "cannot be imported: No module named"),
        ("Deep", 'expected "module:Class", got'),
        ("os.system('x'):Deep", 'expected "module:Class", got'),
        (".record:Deep", 'expected "module:Class", got'),
        ("", 'expected "module:Class", got'),
        (3, 'expected "module:Class", got 3'),
    ],
)
def test_a_class_is_taken_only_if_it_fits(name: Any, message: str):
    data = to_dict(Run.Config(seed=0))
    data["model"]["class"] = name
    with pytest.raises(UserError) as error:
        from_dict(data)
    assert str(error.value).startswith("model.class: ") and message in str(error.value)


def test_a_module_is_imported_only_where_a_class_may_stand(tmp_path, monkeypatch):
    (tmp_path / "armature_side_effect.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = to_dict(Run.Config(seed=0))
    data["name"] = {"class": "armature_side_effect:X"}
    with pytest.raises(UserError, match="name: expected str or None"):
        from_dict(data)
    assert "armature_side_effect" not in sys.modules


@pytest.mark.parametrize("data", [None, 3, [], "x", {}])
def test_a_root_must_be_a_configuration(data: Any):
    with pytest.raises(UserError):
        from_dict(data)


def test_broken_json():
    with pytest.raises(UserError, match="not JSON: .*line 1 column 2"):
        from_json("{")
    with pytest.raises(UserError, match="the key 'seed' stands twice"):
        from_json('{"seed": 1, "x": 2, "seed": 2}')


def test_what_could_not_be_read_is_not_written():
    with pytest.raises(UserError, match="training.steps: expected int, got 'x'"):
        to_dict(Run.Config(seed=0, training=Training(steps="x")))  # type: ignore

    class Local(Model):
        pass

    with pytest.raises(TypeError, match="cannot be found again by name"):
        to_dict(Run.Config(seed=0, model=Local.Config()))
    with pytest.raises(TypeError, match="Training cannot be found again"):
        to_dict(Training())


def test_flatten_gives_every_setting_in_order():
    flat = flatten(rich())
    assert list(flat)[:3] == ["class", "seed", "enable"]
    assert flat["training.steps"] == 3 and flat["model.class"] == f"{__name__}:Heir" and flat["model.dim"] == 4
    assert flat["layers.1.n_layers"] == 9 and flat["named.x.dim"] == 8 and flat["table.a"] == [1, 2]
    assert flat["colors"] == ["RED", "BLUE"] and flat["sizes"] == []
    assert flatten(Run.Config(seed=0))["maybe"] is None and flatten(Run.Config(seed=0))["table"] == {}


def test_diff_names_what_changed():
    base = Run.Config(seed=0, training=Training(rate=math.nan))
    config = Run.Config(seed=0, training=Training(rate=math.nan, steps=20), optimizer=Muon.Config())
    assert diff(base, base) == []
    assert diff(config, base) == [
        ("training.steps", 10, 20),
        ("optimizer.class", f"{__name__}:Adam", f"{__name__}:Muon"),
        ("optimizer.betas", [0.9, 0.95], ...),
        ("optimizer.momentum", ..., 0.95),
    ]


def test_json_is_plain():
    text = to_json(rich())
    assert text.endswith("}\n") and json.loads(text) == to_dict(rich())
