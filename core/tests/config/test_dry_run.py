"""--dry-run on the command line: what the owner's `plan` is asked, and how its answer is shown."""

import json
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from core.config.cli import main
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.validate import validate

ASKED: list[tuple[Any, int | None, int]] = []


@dataclass
class Answer:
    cost: int

    def __str__(self) -> str:
        return f"it costs {self.cost}"


@dataclass(kw_only=True, slots=True)
class Luggage(Configurable.Config):
    bags: int = 1


@dataclass(kw_only=True, slots=True)
class Trunks(Luggage):
    locks: int = 2


class Guide(Configurable):
    pass


class Local(Guide):
    @dataclass(kw_only=True, slots=True)
    class Config(Guide.Config):
        language: str = ""


class Voyage(Configurable):
    """What can be planned."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        days: int = 3
        luggage: Luggage = field(default_factory=Luggage)
        guide: Guide.Config = field(default_factory=Guide.Config)

        def problems(self):
            if self.days < 1:
                yield "days", f"days {self.days} must be at least 1"

    @staticmethod
    def plan(config: Config, *, world_size: int | None, rank: int) -> Answer:
        validate(config)
        ASKED.append((config, world_size, rank))
        if rank > 8:
            raise UserError(f"rank {rank} is too high")
        return Answer(config.days * 10)

    def __init__(self, config: Config) -> None:
        raise AssertionError("a plan builds nothing")


class Longer(Voyage):
    """Has more methods, parts of another class, and the same run."""

    @dataclass(kw_only=True, slots=True)
    class Config(Voyage.Config):
        guide: Guide.Config = field(default_factory=Local.Config)

    def supper(self) -> None:
        pass


class Stay(Longer):
    """Has a setting that its parent's plan cannot know."""

    @dataclass(kw_only=True, slots=True)
    class Config(Longer.Config):
        nights: int = 2


class Move(Longer):
    """Has a group of settings with more in it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Longer.Config):
        luggage: Trunks = field(default_factory=Trunks)


class Return(Longer):
    """Runs otherwise."""

    def __init__(self, config: Longer.Config) -> None:
        pass


class Planned(Return):
    """Runs otherwise, and says what that takes."""

    @staticmethod
    def plan(config: Voyage.Config, *, world_size: int | None, rank: int) -> Answer:
        return Answer(config.days * 20)


class Walk(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


def recipes() -> ModuleType:
    module = ModuleType("places")
    exec("def voyage():\n    return Voyage.Config()\ndef walk():\n    return Walk.Config()", module.__dict__)
    module.__dict__.update(Voyage=Voyage, Walk=Walk)
    return module


def test_a_plan_is_printed_and_nothing_is_built(capsys: pytest.CaptureFixture[str]):
    main(recipes(), ["--config", "voyage", "--dry-run", "--days", "4", "--world-size", "16", "--rank", "2"])
    assert capsys.readouterr().out == "it costs 40\n"
    (config, world_size, rank) = ASKED.pop()
    assert (config.days, world_size, rank) == (4, 16, 2)


def test_without_numbers_the_plan_chooses(capsys: pytest.CaptureFixture[str]):
    main(recipes(), ["--dry_run", "--config", "voyage", "--json"])
    assert json.loads(capsys.readouterr().out) == {"cost": 30}
    assert ASKED.pop()[1:] == (None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "voyage", "--rank", "1"], "--rank says how --dry-run is done: add --dry-run, or leave it out"),
        (["--config", "voyage", "--json", "--world-size", "2"], "--world-size, --json says how --dry-run is done"),
        (["--config", "voyage", "--dry-run", "--rank", "-1"], "--rank takes a whole number, got -1"),
        (["--config", "voyage", "--dry-run", "--world-size", "many"], "--world-size takes a whole number, got many"),
        (["--config", "voyage", "--dry-run", "--world-size"], "--world-size takes 1 value, got nothing"),
        (["--config", "voyage", "--dry-run", "--days", "0"], "days: days 0 must be at least 1"),
        (["--config", "voyage", "--dry-run", "--rank", "9"], "rank 9 is too high"),
        (["--config", "walk", "--dry-run"], "Walk.Config makes no plans: leave --dry-run out"),
    ],
)
def test_mistakes_end_with_code_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(recipes(), options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_subclass_is_planned_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Never silently as its parent, whose methods it overrides, or whose settings are not all that it has."""
    module = ModuleType("subclasses")
    owners = {"longer": Longer, "planned": Planned, "returned": Return, "stay": Stay, "move": Move}
    for name, owner in owners.items():
        exec(f"def {name}():\n    return owner.Config()", {"__name__": module.__name__, "owner": owner}, vars(module))
    for recipe, cost in (("longer", 30), ("planned", 60)):
        main(module, ["--config", recipe, "--dry-run"])
        assert capsys.readouterr().out == f"it costs {cost}\n"
    with pytest.raises(SystemExit):
        main(module, ["--config", "returned", "--dry-run"])
    assert "Return has a __init__ of its own and the plan of its parent" in capsys.readouterr().err
    for recipe, message in {
        "stay": "Stay has settings of its own (nights), of which the plan of its parent knows nothing",
        "move": "Move has settings of its own (luggage)",
    }.items():
        with pytest.raises(SystemExit):
            main(module, ["--config", recipe, "--dry-run"])
        assert message in capsys.readouterr().err
