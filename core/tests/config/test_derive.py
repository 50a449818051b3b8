"""derive: a Config of a subclass with the values of its parent's."""

from dataclasses import dataclass, field, fields

import pytest

from core.config.configurable import Configurable
from core.config.derive import derive
from core.config.errors import UserError
from core.config.record import from_dict, to_dict


class Net(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dim: int
        names: list[str] = field(default_factory=list)


class Gated(Net):
    @dataclass(kw_only=True, slots=True)
    class Config(Net.Config):
        gate: float = 0.5


class Run(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        net: Net.Config
        nets: dict[str, Net.Config] = field(default_factory=dict)
        steps: int = 10


class ZRun(Run):
    @dataclass(kw_only=True, slots=True)
    class Config(Run.Config):
        z_loss: float
        window: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config


def recipe() -> Run.Config:
    return Run.Config(net=Net.Config(dim=8, names=["a"]), nets={"b": Gated.Config(dim=2)}, steps=3)


def test_a_subclass_has_the_values_of_its_parent_and_the_changes():
    base = recipe()
    found = derive(base, ZRun.Config, z_loss=1e-4, steps=7)
    assert type(found) is ZRun.Config and type(found.build()) is ZRun
    assert {each.name: getattr(found, each.name) for each in fields(found)} == {
        "net": base.net,
        "nets": base.nets,
        "steps": 7,
        "z_loss": 1e-4,
        "window": None,
    }
    assert base == recipe()
    assert from_dict(to_dict(found)) == found


def test_nothing_is_shared():
    base, net = recipe(), Net.Config(dim=1)
    found = derive(base, ZRun.Config, z_loss=0.0, net=net)
    found.net.dim, found.nets["b"].dim = 99, 99
    found.net.names.append("z")
    assert base == recipe() and net == Net.Config(dim=1)


def test_a_nested_config_is_derived_in_its_place():
    base = recipe()
    base.net = derive(base.net, Gated.Config, gate=0.1)
    assert base.net == Gated.Config(dim=8, names=["a"], gate=0.1)


def test_the_same_class_is_a_deep_copy():
    base = recipe()
    found = derive(base, Run.Config)
    assert found == base and found is not base and found.net is not base.net


def test_all_that_is_wrong_is_one_error():
    with pytest.raises(UserError) as caught:
        derive(recipe(), ZRun.Config, z_los=1e-4, stpes=2)
    assert str(caught.value).splitlines() == [
        "ZRun.Config has no field z_los; did you mean z_loss?",
        "ZRun.Config has no field stpes; did you mean steps?",
        "ZRun.Config.z_loss has no default: derive(..., z_loss=...) states it",
    ]


class GatedRun(Run):
    @dataclass(kw_only=True, slots=True)
    class Config(Run.Config):
        net: Gated.Config


def test_a_value_that_a_narrower_field_does_not_take_is_an_error():
    with pytest.raises(
        UserError, match=r"^net: expected Gated\.Config, got Net.*; derive\(\.\.\., net=\.\.\.\) states"
    ):
        derive(recipe(), GatedRun.Config)
    base = recipe()
    found = derive(base, GatedRun.Config, net=derive(base.net, Gated.Config))
    assert found.net == Gated.Config(dim=8, names=["a"])


def test_only_a_subclass_has_room_for_all():
    with pytest.raises(UserError, match=r"^Net\.Config does not derive from Run\.Config"):
        derive(recipe(), Net.Config)
    with pytest.raises(UserError, match="does not derive from Gated.Config"):
        derive(Gated.Config(dim=1), Net.Config)
