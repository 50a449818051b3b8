"""Find the layout of a run that takes the least time of those that fit: python -m autolayout.search.

All layouts are estimated from blocks that were measured once; the best of them are planned in full, and their memory is
the plan's.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import ModuleType

from autolayout.estimate import Estimate, Estimator
from autolayout.hardware import Hardware, hardware
from autolayout.layout import Layout, applied, candidates, possible
from autolayout.picture import check_picture, draw
from core.config import cli
from core.config.errors import UserError
from core.config.exit import exit_plainly
from core.config.help import CONFIG_OPTION, HELP, OwnOption, show, usage
from core.config.recipe import load_config, recipe_module, recipes
from core.config.record import diff
from core.plan.plan import plan
from core.train.trainer import Trainer

OPTIONS = {
    "config": CONFIG_OPTION,
    "world_size": OwnOption("N", "the number of ranks"),
    "device_memory_gib": OwnOption("GIB", "memory of a rank; without it the hardware's"),
    "hardware": OwnOption("NAME|FILE.json", "h100, or a file with figures of your own"),
    "bandwidth": OwnOption("FILE.json", "figures that differ from those of --hardware"),
    "picture": OwnOption("FILE.svg", "a picture of all layouts: time against memory"),
    "help": HELP,
}
PLANNED = 5
"""So many of the best are planned in full."""
OF_SEARCH = ("autolayout", "hardware", "bandwidth", "device_memory_gib", "picture")
"""Settings of `AutolayoutTrainer` that a run which searches no more has no use for."""
ROOM = 1.12
"""How far above the room an estimate may lie to be planned all the same: estimates of memory are so far off."""


@dataclass(kw_only=True)
class Found:
    """A search of one run on so many ranks."""

    config: Trainer.Config
    world_size: int
    hardware: Hardware
    best: list[Estimate]
    """Those that were planned and fit, the fastest first."""
    estimates: list[Estimate]
    refused: dict[str, list[Layout]] = field(default_factory=dict)
    """Layouts by the reason against them."""

    def __str__(self) -> str:
        shown = best_of_degrees(self.best)
        width = max((len(str(each.layout)) for each in shown), default=10)
        lines = [f"{len(self.estimates):,} layouts of {self.config.recipe or 'the run'} on {self.world_size:,} ranks"]
        lines += ["", f"{'layout':{width}}  s/step  tokens/s/rank     GiB  where the time goes"]
        for each in shown:
            rate = self.tokens(each) / self.world_size
            parts = sorted(each.parts.items(), key=lambda item: -item[1])
            spent = ", ".join(f"{name} {seconds / each.seconds:.0%}" for name, seconds in parts[:4])
            lines.append(f"{each.layout!s:{width}}  {each.seconds:6.2f}  {rate:13,.0f}  {each.peak_gib:6.1f}  {spent}")
        lines += ["", "not possible:"] * bool(self.refused)
        lines += [f"  {n:5,}  {words}" for words, n in self.reasons().items()]
        ranks = self.hardware.ranks_per_host
        trains = command(self.config, self.best[0].layout, self.world_size, ranks)
        return "\n".join([*lines, "", trains])

    def reasons(self) -> dict[str, int]:
        """How many layouts are refused for what setting, with the first one's reason."""
        grouped: dict[str, tuple[str, int]] = {}
        for words, layouts in self.refused.items():
            setting = words.partition(":")[0]
            first, n = grouped.get(setting, (words, 0))
            grouped[setting] = first, n + len(layouts)
        return dict(grouped.values())

    def tokens(self, each: Estimate) -> float:
        """Tokens in a second of all ranks."""
        run = applied(self.config, each.layout, self.world_size)
        return run.training.global_batch_size * run.training.seq_len / each.seconds


def search(
    config: Trainer.Config, world_size: int, found: Hardware, say: Callable[[str], object] = lambda line: None
) -> Found:
    """The layouts of a run that fit, best first. Raises `UserError` where none does, with the nearest."""
    layouts, refused = possible(config, world_size, candidates(config, world_size, found.ranks_per_host))
    if not layouts:
        raise UserError("\n".join([f"no layout of {world_size} ranks is possible:", *refused]))
    estimate = Estimator(config, world_size, found)
    estimates = []
    for number, layout in enumerate(layouts):
        estimates.append(estimate(layout))
        if number % 500 == 499:
            say(f"{number + 1:,} of {len(layouts):,} layouts estimated")
    best: list[Estimate] = []
    for each in sorted(estimates, key=lambda each: each.seconds):
        if each.peak_gib > found.memory_gib * ROOM:
            continue
        resting, peak = planned_bytes(config, each.layout, world_size)
        planned = replace(each, resting_bytes=resting, peak_bytes=peak)
        say(f"{planned.layout}: {planned.seconds:.2f} s, planned {planned.peak_gib:.1f} GiB")
        if planned.peak_gib <= found.memory_gib:
            best.append(planned)
        else:
            refused.setdefault(f"planned above {found.memory_gib:g} GiB", []).append(each.layout)
        if len(best) == PLANNED:
            break
    too_large = [each.layout for each in estimates if each.peak_gib > found.memory_gib * ROOM]
    if too_large:
        refused[f"estimated above {found.memory_gib:g} GiB"] = too_large
    if not best:
        least = min(estimates, key=lambda each: each.peak_gib)
        raise UserError(
            f"none of {len(estimates):,} layouts fits {found.memory_gib:g} GiB; the least is {least.layout} with "
            f"{least.peak_gib:.1f} GiB: more ranks, a lower training.seq_len, or more --device-memory-gib"
        )
    return Found(
        config=config,
        world_size=world_size,
        hardware=found,
        best=best,
        estimates=estimates,
        refused=refused,
    )


def planned_bytes(config: Trainer.Config, layout: Layout, world_size: int) -> tuple[int, int]:
    """Bytes that lie on the fullest rank between steps, and those at its fullest, by the plans of the first and the
    last rank of a pipeline."""
    run = applied(config, layout, world_size)
    ranks = {0, world_size - 1} if layout.pipeline > 1 else {0}
    found = max((plan(run, world_size=world_size, rank=rank) for rank in ranks), key=lambda each: each.peak_bytes)
    resting = 0 if layout.offload else found.weights_bytes + found.gradients_bytes + found.optimizer_bytes
    return resting, found.peak_bytes


def best_of_degrees(found: Sequence[Estimate]) -> list[Estimate]:
    """The first of each combination of degrees, in their order."""
    first: dict[tuple, Estimate] = {}
    for each in found:
        first.setdefault(each.layout.degrees, each)
    return list(first.values())


def command(config: Trainer.Config, layout: Layout, world_size: int, ranks_per_host: int) -> str:
    """The command line that trains in this layout, with equally many ranks on each host: the run's recipe with all
    that differs from it."""
    trainer, model = (type(each).__module__.partition(".")[0] for each in (config, config.model))
    package = model if trainer == "core" else trainer
    changes = diff(applied(config, layout, world_size), recipe_of(config, package))
    settings = [f"--{path} {shlex.quote(str(value))}" for path, _, value in changes if path not in OF_SEARCH]
    searches_no_more = ["--no-autolayout"] if hasattr(config, "autolayout") else []
    ranks = math.gcd(world_size, ranks_per_host)
    hosts = world_size // ranks
    nodes = f" --nnodes {hosts}" if hosts > 1 else ""
    head = f"torchrun{nodes} --nproc-per-node {ranks} -m {package}.train --config {config.recipe}"
    return " \\\n    ".join([head, *searches_no_more, *settings])


def recipe_of(config: Trainer.Config, package: str) -> Trainer.Config:
    """The recipe of a package that a run came from as it was made; the run itself where there is none of its name."""
    configs = recipe_module(f"{package}.configs")
    if config.recipe not in recipes(configs):
        return config
    found = load_config([config.recipe], configs)
    assert isinstance(found, Trainer.Config)
    return found


def main(configs: str | ModuleType, argv: Sequence[str] | None = None) -> None:
    """Search for the run of the command line, and print what was found."""
    with exit_plainly():
        own, settings = cli.own_flags(cli.split_flags(argv), OPTIONS)
        configs = recipe_module(configs)
        title = f"{usage('--config NAME --world-size N [--section.field VALUE ...]', OPTIONS)}"
        if "config" not in own or "help" in own:
            show(f"{title}\n\nrecipes: {', '.join(recipes(configs))}, and any package.configs:recipe")
            if "help" not in own:
                raise UserError("choose a run: --config NAME, such as qwen3.configs:qwen3_8b")
            return
        config = load_config(own["config"], configs)
        if not isinstance(config, Trainer.Config):
            raise UserError(f"{own['config'][0]} is no training run")
        cli.override(config, settings)
        world_size = cli.number("--world-size", *own.get("world_size", ["1"]))
        if world_size < 1:
            raise UserError("--world-size 0 must be at least 1")
        if "picture" in own:
            check_picture(own["picture"][0])
        ranks = hardware(*own.get("hardware", ["h100"]), *own.get("bandwidth", []))
        if "device_memory_gib" in own:
            ranks = replace(ranks, memory_gib=float(cli.number("--device-memory-gib", *own["device_memory_gib"])))
            if not ranks.memory_gib:
                raise UserError("--device-memory-gib 0 must be at least 1")
        found = search(deepcopy(config), world_size, ranks, show)
        show(str(found))
        if "picture" in own:
            draw(own["picture"][0], found.estimates, found.best, ranks.memory_gib)
            show(f"picture in {own['picture'][0]}")


if __name__ == "__main__":
    main("autolayout.configs")
