"""The run of this experiment."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from autolayout.hardware import hardware
from autolayout.layout import applied
from autolayout.search import search
from core.config.derive import derive
from core.runtime.launcher import World, find_world
from core.train.trainer import Trainer


class AutolayoutTrainer(Trainer):
    """A training run that chooses its layout for the ranks that it finds; all else is as in any run."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        autolayout: bool = True
        """Search for the fastest layout that fits; without it the settings' own is taken."""
        hardware: str = "h100"
        """What ranks do in a second: h100, or a JSON file with figures of your own."""

    def __init__(self, config: Config) -> None:
        world = find_world() or World()
        super().__init__(chosen(config, world.size))

    @staticmethod
    def plan(config: Trainer.Config, *, world_size: int | None, rank: int) -> Any:
        """The plan of the layout that would be chosen: a `core.plan.plan.Plan`."""
        world_size = world_size or config.parallelism.degrees(1).world
        return Trainer.plan(chosen(config, world_size), world_size=world_size, rank=rank)


def chosen(config: Trainer.Config, world_size: int) -> AutolayoutTrainer.Config:
    """The configuration in the layout that was found for so many ranks, which searches no more."""
    assert isinstance(config, AutolayoutTrainer.Config)
    if not config.autolayout:
        return config
    found = search(config, world_size, hardware(config.hardware))
    settled = applied(config, found.best[0].layout, world_size)
    return derive(deepcopy(settled), AutolayoutTrainer.Config, autolayout=False)
