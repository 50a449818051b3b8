"""Groups of weights by name, with settings of their own: the first whose pattern fits a weight is its group."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf

from torch import nn

from core.config.configurable import Configurable
from core.config.errors import at_most
from core.optim.patterns import pattern_problems


@dataclass(kw_only=True, slots=True)
class Group(Configurable.Config):
    """What is different for the weights of a group."""

    pattern: str = "*"
    """Names of weights (a glob). Those that an earlier group has are not in this one."""
    lr_factor: float = 1.0
    """Factor on the learning rate, that of Muon's companion as well."""
    weight_decay: float | None = None
    """Shrinkage per step, times the learning rate, whatever `no_decay` names; without it as all other weights."""
    betas: tuple[float, float] | None = None
    """The optimizer's beta1 and beta2, where it has these."""
    max_norm: float | None = None
    """Scale the gradients of the group down to this joint norm of their own, instead of together with all others."""
    frozen: bool = False
    """Leave the weights as they are: they get no gradient and no state."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("lr_factor", "weight_decay"):
            if (value := getattr(self, name)) is not None and not 0 <= value < inf:
                yield name, f"{name} {value} must be a finite number, not negative"
        if self.max_norm is not None and not self.max_norm > 0:
            yield "max_norm", f"max_norm {self.max_norm} must be above 0; inf leaves gradients as they are"
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", f"betas {self.betas} must be in [0, 1)"
        if self.frozen and self != Group(pattern=self.pattern, frozen=True):
            yield "frozen", "frozen weights are not updated: leave out the other settings of the group, or frozen"


EVERYTHING = Group()
"""The group of weights that no other one has."""


def weight_group(groups: Sequence[Group], name: str) -> Group:
    """The first of the groups whose pattern fits the name of a weight."""
    return next((group for group in groups if fnmatchcase(name, group.pattern)), EVERYTHING)


def freeze(weights: Iterable[tuple[str, nn.Parameter]], groups: Sequence[Group]) -> None:
    """Have backward make no gradient of weights, of any shape, whose group is frozen."""
    for name, weight in weights:
        if weight_group(groups, name).frozen:
            weight.requires_grad_(False)


def group_problems(groups: Sequence[Group], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Patterns that fit no weight of these names, or none that earlier groups leave; and models without a rest."""
    members = [weight_group(groups, name) for name in names]
    for i, group in enumerate(groups):
        if any(member is group for member in members):
            continue
        fitting = [member for name, member in zip(names, members, strict=True) if fnmatchcase(name, group.pattern)]
        if fitting:
            earlier = at_most(3, list(dict.fromkeys(member.pattern for member in fitting)))
            yield (
                f"groups.{i}.pattern",
                f"every weight called {group.pattern} is in an earlier group, {', '.join(earlier)}: the first match "
                "counts, put this group in front of it or remove it",
            )
        else:
            yield from pattern_problems(f"groups.{i}.pattern", [group.pattern], names)
    if members and all(member.frozen for member in members):
        yield "groups", f"all {len(names):,} weights are frozen: leave some to train"
