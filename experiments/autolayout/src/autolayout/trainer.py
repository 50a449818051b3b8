"""The run of this experiment."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from autolayout.hardware import hardware
from autolayout.layout import applied
from autolayout.picture import check_picture, draw
from autolayout.search import Found, search
from core.config.derive import derive
from core.config.help import show
from core.config.record import absolute
from core.config.validate import validate
from core.plan.plan import Plan
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
        bandwidth: str | None = None
        """A JSON file with figures that differ from those of `hardware`, such as {"outer_gb_s": 25}."""
        device_memory_gib: float | None = None
        """Memory of a rank; without it the hardware's."""
        picture: str | None = None
        """A file for a picture of all layouts, time against memory, as SVG."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if self.device_memory_gib is not None and not self.device_memory_gib > 0:
                yield "device_memory_gib", f"device_memory_gib {self.device_memory_gib:g} must be above 0"

        def places(self) -> dict[str, Any]:
            return super().places() | {name: absolute(getattr(self, name)) for name in ("bandwidth", "picture")}

    def __init__(self, config: Config) -> None:
        world = find_world() or World()
        settled, found = chosen(config, world.size, world.rank)
        if found is not None and world.rank == 0:
            show(str(found))
        super().__init__(settled)

    @staticmethod
    def plan(config: Trainer.Config, *, world_size: int | None, rank: int) -> Any:
        """What was searched, and the plan of the layout that would be chosen: a `core.plan.plan.Plan`."""
        world_size = world_size or config.parallelism.degrees(1).world
        settled, found = chosen(config, world_size, 0)
        planned = Trainer.plan(settled, world_size=world_size, rank=rank)
        return planned if found is None else SearchedPlan(**vars(planned), search=str(found))


@dataclass(kw_only=True)
class SearchedPlan(Plan):
    """The plan of a layout that was chosen among others."""

    search: str
    """The best of them, why others are not possible, and the command of the best."""

    def __str__(self) -> str:
        return f"{self.search}\n\n{super().__str__()}"


def chosen(config: Trainer.Config, world_size: int, rank: int) -> tuple[AutolayoutTrainer.Config, Found | None]:
    """The configuration in the layout that was found for so many ranks, which searches no more, and the search; the
    first rank draws the picture."""
    assert isinstance(config, AutolayoutTrainer.Config)
    if not config.autolayout:
        return config, None
    validate(config)
    ranks = hardware(config.hardware, config.bandwidth)
    if config.device_memory_gib is not None:
        ranks = replace(ranks, memory_gib=config.device_memory_gib)
    file = config.picture if rank == 0 else None
    if file is not None:
        check_picture(file)
    found = search(config, world_size, ranks)
    if file is not None:
        draw(file, found.estimates, found.best, ranks.memory_gib)
    settled = applied(config, found.best[0].layout, world_size)
    return derive(deepcopy(settled), AutolayoutTrainer.Config, autolayout=False), found
