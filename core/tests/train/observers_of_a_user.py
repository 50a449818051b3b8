"""Observers as somebody writes them outside of core."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import torch

from core.step.update import StepInfo
from core.train.observers import Observer


class Perplexity(Observer):
    """Records how many tokens the model is torn between, smoothed; stops where that is low enough."""

    @dataclass(kw_only=True, slots=True)
    class Config(Observer.Config):
        decay: float = 0.9
        """Share of the mean that a step keeps."""
        enough: float = 0.0
        """Stop below this perplexity."""

    config: Config

    def after_step(self, info: StepInfo) -> dict[str, float]:
        if info.updated:
            mean = self.state.get("mean", info.loss)
            self.state["mean"] = self.config.decay * mean + (1 - self.config.decay) * info.loss
        perplexity = exp(self.state.get("mean", info.loss))
        if perplexity < self.config.enough:
            self.stop(f"perplexity {perplexity:.1f} is below {self.config.enough}")
        return {"perplexity": perplexity}


class Patience(Observer):
    """Stops when the loss on held-out text has not fallen for some validations."""

    @dataclass(kw_only=True, slots=True)
    class Config(Observer.Config):
        patience: int = 2
        """Validations without a new best."""

    config: Config

    def after_step(self, info: StepInfo) -> None:
        if info.validation_loss is None:
            return
        if info.validation_loss < self.state.get("best", float("inf")):
            self.state.update(best=info.validation_loss, since=0)
        else:
            self.state["since"] += 1
        if self.state["since"] >= self.config.patience:
            self.stop(f"no better than {self.state['best']:.4f} for {self.config.patience} validations")


class Scripted(Observer):
    """Does on one rank, at one step, what a test asks for."""

    @dataclass(kw_only=True, slots=True)
    class Config(Observer.Config):
        name: str = "seen"
        """Of the number that it returns: that of the step."""
        only_step: int | None = None
        """Return it after this step alone."""
        stop_on: tuple[int, int] | None = None
        """Rank and step at which it asks to stop."""
        fault: str = ""
        """What it returns instead: tensor, bool, text, list, key."""

    config: Config

    def after_step(self, info: StepInfo) -> Any:
        c = self.config
        with (self.folder / f"seen-{self.rank}").open("a") as file:
            file.write(f"{info.step} {info.loss!r} {info.grad_norm!r}\n")
        if c.stop_on == (self.rank, info.step):
            self.stop("the script says so")
        if c.fault:
            return faulty(c.name)[c.fault]
        return {c.name: info.step} if c.only_step in (None, info.step) else None


def faulty(name: str) -> Mapping[str, Any]:
    return {
        "tensor": {name: torch.tensor(1.0)},
        "bool": {name: True},
        "text": {name: "1"},
        "list": [1],
        "key": {3: 1.0},
    }
