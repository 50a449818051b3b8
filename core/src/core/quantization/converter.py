"""Converters: what changes layers of a model before it has memory, by pattern and by rule.

A converter leaves a layer in its place, with its weight, the weight's name and axes, so that layouts, optimizers,
checkpoints and exports know the model as before. It gives it a `Product`, or adds weights beside the weight that
the layer's class says the axes of (`Module.beside`). docs/add-a-converter.md makes one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from core.config.configurable import Configurable, owner_of
from core.config.errors import UserError, at_most, did_you_mean
from core.nn.adapter import Adapted
from core.nn.decoder import Decoder
from core.nn.grouped import GroupedLinear
from core.nn.layers import Head, Linear
from core.nn.moe import Gate
from core.nn.product import ByProduct
from core.nn.weights import weights
from core.runtime.meta import meta_model

PLAIN = (Linear.forward, GroupedLinear.forward, ByProduct.forward)
"""The forwards that a product of one's own may take the place of."""


class Layer(NamedTuple):
    """A layer of matrix products, and the axes of its weight (..., O, I)."""

    name: str
    module: Linear | GroupedLinear
    axes: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Output and input width."""
        return self.module.weight.shape[-2], self.module.weight.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a converter did to a model."""

    label: str
    names: list[str]
    """The layers that it changed."""
    left: dict[str, str]
    """Those that it left as they are, each with the reason."""

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        left = "; ".join(f"{', '.join(at_most(6, kinds(names)))} ({reason})" for reason, names in reasons.items())
        said = f"{self.label}: {len(self.names)} of {len(self.names) + len(self.left)} layers"
        return f"{said}, {', '.join(at_most(12, kinds(self.names)))}" + (f"; left out: {left}" if left else "")


class Converter(Configurable, ABC):
    """Changes the linear layers of a model, those of experts too, that its patterns name and its rules allow."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        patterns: list[str] = field(default_factory=lambda: ["*"])
        """Names of layers (globs) that are converted, such as layers.*.feed_forward.*."""
        filter_fqns: list[str] = field(default_factory=list)
        """Layers with one of these in their name are left out."""
        min_dim: int = 0
        """Layers with fewer inputs or outputs are left out: scaling would cost more than the product saves."""

    label: str = ""
    """What the head of a run calls it; without it the name of the class."""
    multiple: int = 1
    """Inputs and outputs of a layer must be multiples of this, or it is left out."""
    adapts: bool = False
    """Weights are added, which alone are trained and saved: the others are those that the run begins with."""
    trains_weights: bool = False
    """It changes how weights are trained, and nothing else: beside adapters it would do nothing."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def convert(self, layer: Layer) -> str:
        """Change a layer, which has no memory yet, in place; or leave it and return the reason, else ""."""

    def after(self, model: Decoder) -> None:
        """Change what else of the model there is to change, when its layers have been."""

    def device_problem(self, device: torch.device) -> str:
        """Why what it makes cannot be computed on `device`; empty where it can."""
        del device
        return ""

    def apply(self, model: Decoder) -> Conversion:
        """Convert a model in place. Raises `UserError` for a pattern that names no layer, and where none is left."""
        config = self.config
        axes = {weight.name: weight.axes for weight in weights(model)}
        found = {name: part for name, part in model.named_modules() if isinstance(part, Linear | GroupedLinear | Gate)}
        label = self.label or type(self).__name__
        check_patterns(config, label, found)
        done, left = [], {}
        for name, part in found.items():
            if not any(fnmatchcase(name, pattern) for pattern in config.patterns):
                continue
            if not (reason := self._reason(name, part)):
                assert isinstance(part, Linear | GroupedLinear)
                reason = self.convert(Layer(name, part, axes[f"{name}.weight"]))
            if reason:
                left[name] = reason
            else:
                done.append(name)
        if not done:
            words = "; ".join(at_most(3, [f"{name}: {reason}" for name, reason in left.items()]))
            raise UserError(f"converters: {label} leaves out every layer that its patterns name: {words}")
        self.after(model)
        return Conversion(label=label, names=done, left=left)

    def _reason(self, name: str, part: Any) -> str:
        """Why a layer that the patterns name is left out; empty where it is not."""
        config, (n_out, n_in) = self.config, part.weight.shape[-2:]
        if isinstance(part, Head):
            return "the head, whose product is the loss's"
        if isinstance(part, Gate):
            return "a gate, which computes in fp32"
        if named := [word for word in config.filter_fqns if word in name]:
            return f"filter_fqns {named[0]}"
        if isinstance(part, Adapted if self.adapts else ByProduct):
            return "it has been converted before"
        if isinstance(part, Adapted):
            return "it has an adapter: put this converter in front of that one"
        if type(part).forward not in PLAIN or "forward" in vars(part):
            return "a forward of its own"
        if min(n_out, n_in) < config.min_dim:
            return f"{n_out:,} x {n_in:,} is below min_dim {config.min_dim:,}"
        if n_out % self.multiple or n_in % self.multiple:
            return f"{n_out:,} x {n_in:,} is no multiple of {self.multiple}"
        return ""


def converted_model(config: Decoder.Config, converters: Sequence[Converter.Config]) -> tuple[Decoder, list[Conversion]]:
    """A model without memory, converted, and what was done to it.

    Raises `UserError` as `Converter.apply` does, and for what trains weights beside adapters, in any order.
    """
    model, built = meta_model(config), [each.build() for each in converters]
    if idle := [each for each in built if each.trains_weights and adapts(converters)]:
        label = idle[0].label or type(idle[0]).__name__
        raise UserError(f"converters: {label} changes how weights are trained, and beside adapters none is: use one")
    return model, [converter.apply(model) for converter in built]


def adapts(converters: Iterable[Converter.Config]) -> bool:
    """Whether a run of these trains adapters alone."""
    return any(getattr(owner_of(type(config)), "adapts", False) for config in converters)


def check_patterns(config: Converter.Config, label: str, names: Iterable[str]) -> None:
    """Raise `UserError` for a pattern, or a part of a name, that no layer has, and where there is no pattern."""
    if not config.patterns:
        raise UserError(f"converters: {label}: patterns is empty: name layers, or leave it out for all")
    names = list(names)
    lost = [glob for glob in config.patterns if not any(fnmatchcase(name, glob) for name in names)]
    lost += [part for part in config.filter_fqns if not any(part in name for name in names)]
    if lost:
        near = (
            did_you_mean(lost[0], kinds(names), n=3, cutoff=0.4) or f"there are {', '.join(at_most(8, kinds(names)))}"
        )
        raise UserError(f"converters: {label}: no layer is called {', '.join(lost)}; {near}")


def kinds(names: Iterable[str]) -> list[str]:
    """Names of layers, those of all blocks as one."""
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))
