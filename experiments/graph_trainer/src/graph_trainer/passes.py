"""The passes over a step's graph, by their names, and what each of them did."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from core.activation_checkpoint.policy import Policy
from core.runtime.device import MIB
from graph_trainer.collectives import WAIT_OP, merge, prefetch
from graph_trainer.compiled import compiled
from graph_trainer.memory import GraphSize, size_of
from graph_trainer.offload import offload
from graph_trainer.save_set import Decision, is_effect, products_of, recompute, tag
from graph_trainer.settings import GraphCompile, PassName

log = logging.getLogger("armature")


@dataclass(kw_only=True)
class Given:
    """What passes are told besides the graph."""

    policies: Mapping[str, Policy]
    let_go: bool
    weights: list[str]
    """The names of the first inputs; their gradients are the outputs after the two losses."""
    decided: dict[str, list[Decision]] | None = None
    """What the save set's policy said of the operations of each block."""


@dataclass(kw_only=True)
class Prepared:
    """A graph that is ready to run."""

    module: GraphModule
    call: Callable[..., list[Any]]
    sizes: dict[str, tuple[GraphSize, GraphSize]]
    """The graph before and after each pass, by the pass."""
    given: Given


def dead_code(module: GraphModule, given: Given) -> str:
    """Drop what nobody reads, gathers included, and operations that are another name for their input."""
    names = 0
    for node in list(module.graph.nodes):
        again = node.target is WAIT_OP and node.args[0].target is WAIT_OP
        if again or node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            names += 1
    n_before = len(module.graph.nodes)
    module.graph.eliminate_dead_code(is_effect)
    return f"{names} second names, {n_before - len(module.graph.nodes) - names} that nobody reads"


def save_set(module: GraphModule, given: Given) -> str:
    """Compute again in backward what the policy does not save."""
    given.decided = tag(module.graph, given.policies, let_go=given.let_go)
    n_again = recompute(module)
    products = [each for found in products_of(given.decided).values() for each in found]
    saved = sum(each.saved for each in products)
    return f"{saved} of {len(products)} products saved, {n_again} nodes computed again"


PASSES: dict[PassName, Callable[[GraphModule, Given], str]] = {
    "dead_code": dead_code,
    "save_set": save_set,
    "offload": lambda module, _: offload(module),
    "merge_collectives": lambda module, _: merge(module),
    "prefetch": lambda module, _: prefetch(module),
}
"""All passes in the order in which they run."""


def prepare(
    module: GraphModule, settings: GraphCompile, policies: Mapping[str, Policy], weights: Sequence[str], *, let_go: bool
) -> Prepared:
    """The graph of a step, changed by the passes of `settings` and compiled where these ask for it."""
    given = Given(policies=policies, let_go=let_go, weights=list(weights))
    sizes: dict[str, tuple[GraphSize, GraphSize]] = {}
    before = size_of(module.graph)
    log.info(f"graph: {described(before)}")
    for name, change in PASSES.items():
        if name in settings.passes:
            what = change(module, given)
            module.graph.lint()
            module.recompile()
            after = size_of(module.graph)
            sizes[name] = before, after
            log.info(f"graph pass {name}: {compared(before, after)}; {what}")
            before = after
    call = compiled(module, settings.regions) if settings.enable else module
    return Prepared(module=module, call=call, sizes=sizes, given=given)


def described(size: GraphSize) -> str:
    """A graph in numbers, for people."""
    parts = [
        f"{size.nodes:,} nodes",
        f"kept for backward {size.kept / MIB:,.1f} MiB",
        f"peak {size.peak / MIB:,.1f} MiB",
    ]
    return ", ".join(parts + [f"{n} {kind} {size.sent[kind] / MIB:,.2f} MiB sent" for kind, n in size.calls.items()])


def compared(before: GraphSize, after: GraphSize) -> str:
    """Two graphs in numbers, before and after a pass."""
    parts = [
        f"{before.nodes:,} -> {after.nodes:,} nodes",
        f"kept {before.kept / MIB:,.1f} -> {after.kept / MIB:,.1f} MiB",
        f"peak {before.peak / MIB:,.1f} -> {after.peak / MIB:,.1f} MiB",
    ]
    if after.on_host:
        parts.append(f"on the host {after.on_host / MIB:,.1f} MiB")
    for kind in before.calls | after.calls:
        n_bytes = f"{before.sent[kind] / MIB:,.2f} -> {after.sent[kind] / MIB:,.2f} MiB"
        parts.append(f"{kind} {before.calls[kind]} -> {after.calls[kind]}, {n_bytes} sent")
    return ", ".join(parts)
