"""A step of a `core.testing.parity.Case` by a graph: what tests and the benchmark compare with eager training."""

from typing import NamedTuple

import torch

from core.activation_checkpoint.apply import ActivationCheckpoint
from core.parallel.layout import RankView, SingleRank
from core.parallel.many_ranks import ManyRanks
from core.step.assemble import BuiltModel
from core.testing.parity import Case, StepResult, build_case, step_result
from graph_trainer.objective import GraphObjective
from graph_trainer.passes import Prepared
from graph_trainer.settings import GraphCompile
from graph_trainer.wrapping import GraphWrapping, lets_go


class GraphStep(NamedTuple):
    """What a step by a graph did, and the graph of its first microbatch."""

    result: StepResult
    prepared: Prepared


def built_for_graphs(case: Case, graphs: GraphCompile) -> tuple[BuiltModel, GraphObjective]:
    """This rank's part of the model of `case`, and what traces its steps."""
    device = torch.device("cpu")
    layout: RankView = SingleRank(device) if case.world_size == 1 else ManyRanks(case.parallelism, device)
    around = GraphWrapping(ActivationCheckpoint.Config(mode=case.checkpoint))
    built = build_case(case, layout, lambda wrapping: around.wrapping(wrapping.compute_dtype))
    settings = {"layout": layout, "dtype": case.compute_dtype, "mask": case.mask}
    policies, let_go = around.policies, lets_go(case.parallelism)
    objective = GraphObjective(
        built.models, case.loss.build(), graphs=graphs, policies=policies, let_go=let_go, **settings
    )
    return built, objective


def graph_step(case: Case, graphs: GraphCompile) -> GraphStep:
    """One step of `case` on this rank by a graph, and the loss of a second one; every rank gets whole tensors."""
    built, objective = built_for_graphs(case, graphs)
    result = step_result(case, built, objective)
    return GraphStep(result, next(iter(objective.prepared.values())))


def drop_policy(prepared: Prepared) -> None:
    """Forget what other processes cannot be sent."""
    prepared.given.policies = {}
