"""Activation checkpointing put on a decoder: none, full, selective, or a memory budget."""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.activation_checkpoint.ops import absent_ops, user_op
from core.activation_checkpoint.policy import Policy, Shape, default_activation_checkpoint_policy
from core.activation_checkpoint.region import recomputed
from core.activation_checkpoint.replay import SAVED, name_modules
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.runtime.disk import OptionalFile

log = logging.getLogger("armature")


PICTURES = "memory_budget_pareto"
"""Folder of the pictures, below the run's."""
FORCED = "per_op_sac_force_recompute_mm_shapes_by_fqns"
DEFAULT_FORCED = ("moe.router.gate",)
"""A small product that is not worth keeping, and that dense models do not have."""


class Layered(Protocol):
    """What can be checkpointed: a model with blocks."""

    layers: nn.ModuleDict


class ActivationCheckpoint(Configurable):
    """Trades memory for a second forward of parts of each block."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        mode: Literal["none", "full", "selective", "memory_budget"] = "selective"
        """none saves all that backward needs; full saves the input of each block; selective also the outputs of dear
        operations, every second matrix product left out; memory_budget lets torch.compile choose."""
        per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: list(DEFAULT_FORCED))
        """selective: linear layers whose name contains one of these are recomputed, and with them every matrix product
        of the same shape in the block."""
        force_recompute: list[str] = field(default_factory=list)
        """Modules of a block that are recomputed by exact name, such as attention.wq, and nothing else with them."""
        save_ops: list[str] = field(default_factory=list)
        """selective: further operations to save, such as aten.silu.default."""
        early_stop: bool = False
        """Stop recomputing a block as soon as backward has what it needs."""
        memory_budget: float = 0.5
        """memory_budget: from 0, recompute all, to 1, save all."""
        visualize_memory_budget_pareto: bool = False
        """memory_budget: draw memory against recomputation into the run folder (needs matplotlib)."""
        preserve_rng_state: bool = True
        """Draw the same random numbers the second time."""
        determinism_check: Literal["default", "none"] = "default"
        """Compare shape, type and device of what is recomputed with what forward had."""
        debug: bool = False
        """Name the module of an operation that differs, and report after the first step what was saved how often."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if not 0 <= self.memory_budget <= 1:
                yield "memory_budget", f"memory_budget {self.memory_budget} must be between 0 and 1"
            if self.visualize_memory_budget_pareto and find_spec("matplotlib") is None:
                yield "visualize_memory_budget_pareto", "matplotlib is not installed: pip install matplotlib"
            for name, modes in (("save_ops", ("selective",)), ("force_recompute", ("selective", "full"))):
                if getattr(self, name) and self.mode not in modes:
                    yield name, f"{name} has no effect in mode {self.mode}: use {' or '.join(modes)}, or leave it out"
            for name in self.save_ops:
                try:
                    user_op(name)
                except UserError as error:
                    yield "save_ops", str(error)

    def __init__(self, config: Config, *, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._pictures: Path | None = None
        self._kept = OptionalFile(folder / PICTURES)

    def apply(self, model: Layered) -> None:
        """Checkpoint every block of `model` in place; names of weights stay as they are.

        Comes after the model is cut for tensor parallelism, before torch.compile and FSDP. Raises `UserError` as
        `check_names` does, which a run asks earlier; warns of a part of a name that no module has.
        """
        c = self.config
        if c.mode == "memory_budget":
            self._set_budget()
        for number, policy in self.policies(model).items():
            block = model.layers[number]
            block.forward = partial(checkpointed, block.forward, self._settings(policy))

    def policies(self, model: Layered) -> dict[str, Policy]:
        """The policy of each block by its number, none where nothing is computed again; modules that are recomputed by
        name have their mark from then on. For who reads the policy and does not put it on: `apply` does both."""
        c, found = self.config, {}
        if c.mode not in ("full", "selective"):
            return found
        SAVED.clear()
        check_names(c, model)
        for part in unmatched(c, model):  # a stage of a pipeline may lack what the whole model has
            log.warning(f"activation_checkpoint.{FORCED}: {part} names no module")
        for number, block in model.layers.items():
            for name in c.force_recompute:
                if has_module(block, name):
                    part = block.get_submodule(name)
                    part.forward = under(recomputed, part.forward)
            if c.debug:
                name_modules(block, f"layers.{number}")
            found[number] = default_activation_checkpoint_policy(
                mode=c.mode,
                save_ops=tuple(c.save_ops),
                recompute_shapes=forced_shapes(c, f"layers.{number}", block),
                debug=c.debug,
            )
        return found

    def report(self) -> None:
        """Keep the pictures that compiling the first step drew; say in debug how often each operation was saved so far,
        which never, and which are not there at all."""
        self._keep_pictures()
        if not self.config.debug or self.config.mode != "selective":
            return
        for op, count in SAVED.most_common():
            if count:
                log.info(f"activation checkpoint: {op} saved {count} times")
        for name in self.config.save_ops:
            if not SAVED[user_op(name)]:
                log.warning(f"activation_checkpoint.save_ops: {name} was never dispatched in a block")
        if absent := absent_ops():
            log.info(f"activation checkpoint: not in this process: {', '.join(absent)}")

    def _settings(self, policy: Policy) -> dict[str, Any]:
        c = self.config
        return {
            "use_reentrant": False,
            "context_fn": policy,
            "preserve_rng_state": c.preserve_rng_state,
            "determinism_check": c.determinism_check,
            "early_stop": c.early_stop,
        }

    def _set_budget(self) -> None:
        from torch._functorch import config as functorch

        functorch.activation_memory_budget = self.config.memory_budget
        functorch.visualize_memory_budget_pareto = self.config.visualize_memory_budget_pareto
        if self.config.visualize_memory_budget_pareto:
            # Drawn in the middle of compiling, which a full disk would end: so elsewhere, and moved afterwards.
            self._pictures = Path(tempfile.mkdtemp(prefix="memory_budget_pareto-"))
            weakref.finalize(self, shutil.rmtree, self._pictures, ignore_errors=True)
            functorch.memory_budget_pareto_dir = str(self._pictures)

    def _keep_pictures(self) -> None:
        place = self.folder / PICTURES
        for picture in sorted(self._pictures.iterdir()) if self._pictures else ():
            with self._kept.attempt():
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, place / picture.name)


def check_parts(config: ActivationCheckpoint.Config, model: Layered) -> None:
    """Raise `UserError` for a part of a name in the configuration that no module of the whole model has."""
    if parts := unmatched(config, model):
        known = product_names(next(iter(model.layers.values())))
        raise UserError(
            f"activation_checkpoint.{FORCED}: no module has {', '.join(parts)} in its name; there is {known}"
        )


def unmatched(config: ActivationCheckpoint.Config, model: Layered) -> list[str]:
    """Parts of names that no module has; those of the default are for models of several kinds."""
    names = [f"layers.{i}.{name}" for i, block in model.layers.items() for name, _ in block.named_modules()]
    parts = [part for part in getattr(config, FORCED) if part not in DEFAULT_FORCED]
    return [part for part in parts if not any(part in name for name in names)]


def check_names(config: ActivationCheckpoint.Config, model: Layered) -> None:
    """Raise `UserError` for a name in the configuration that no block of `model` can follow."""
    blocks = model.layers.items()
    missing = [name for name in config.force_recompute if not any(has_module(block, name) for _, block in blocks)]
    if missing:
        known = product_names(next(iter(model.layers.values())))
        raise UserError(f"activation_checkpoint.force_recompute: no block has {', '.join(missing)}; it has {known}")
    for number, block in blocks:
        forced_shapes(config, f"layers.{number}", block)


def forced_shapes(config: ActivationCheckpoint.Config, path: str, block: nn.Module) -> frozenset[Shape]:
    """(in, out) of the linear layers of a block that the configuration names by a part of their name."""
    shapes: set[Shape] = set()
    for name, module in block.named_modules():
        for part in config.per_op_sac_force_recompute_mm_shapes_by_fqns:
            if part in f"{path}.{name}":
                if (shape := product_shape(module)) is None:
                    raise UserError(
                        f"activation_checkpoint.{FORCED}: {part} names "
                        f"{path}.{name}, a {type(module).__name__}, which has no matrix product of one shape; "
                        f"the block has {product_names(block)}"
                    )
                shapes.add(shape)
    return frozenset(shapes)


def checkpointed(forward: Callable, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block's own forward under `torch.utils.checkpoint`."""
    return checkpoint(forward, *args, **settings, **kwargs)


def under(region: Callable, forward: Callable) -> Callable:
    """The same forward, inside a region."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with region():
            return forward(*args, **kwargs)

    return inside


def has_module(block: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in block.named_modules())


def product_names(block: nn.Module) -> str:
    """The linear layers of a block, for people."""
    return ", ".join(name for name, module in block.named_modules() if product_shape(module) is not None)


def product_shape(module: nn.Module) -> Shape | None:
    """(in, out) of a module that is one matrix product with one weight; None for any other. Of a weight that is spread
    over ranks, the product has the shape of the piece."""
    weight = getattr(module, "weight", None)
    weight = getattr(weight, "to_local", lambda: weight)()
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    return weight.shape[1], weight.shape[0]
