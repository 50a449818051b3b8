"""What a run of graphs takes of one rank: core's plan, with what a step's graph holds, computes and sends."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core.data.packing import Batch
from core.nn.balance import routers
from core.nn.init import materialise
from core.parallel.fake import fake_ranks
from core.parallel.layout import RankView, SingleRank
from core.parallel.many_ranks import ManyRanks
from core.plan.fake_step import group_axes
from core.plan.plan import Plan, Traffic
from core.plan.plan import plan as plan_of_core
from core.plan.segments import MessageKind
from core.step.assemble import spread_models
from core.step.checks import Run
from graph_trainer.memory import GraphSize, messages, size_of
from graph_trainer.objective import GraphObjective
from graph_trainer.passes import prepare
from graph_trainer.settings import GraphCompile
from graph_trainer.wrapping import GraphWrapping, lets_go

OF_THE_UPDATE = ("all", "stage")
"""Axes of messages that a graph has none of: norms and counts over all ranks."""


def plan(run: Run, graphs: GraphCompile, *, world_size: int | None, rank: int) -> Plan:
    """What `run` takes of `rank`, with one graph per microbatch. Raises `UserError` as `core.plan.plan.plan` does."""
    found = plan_of_core(run, world_size=world_size, rank=rank)
    size, kinds = fake_graph(run, graphs, found)
    n = found.microbatches
    resting = found.weights_bytes + found.optimizer_bytes + found.inputs_bytes + found.gradients_bytes * (n > 1)
    traffic = [each for each in found.traffic if each.axis in OF_THE_UPDATE]
    for kind, (calls, n_bytes) in kinds.items():
        traffic.append(Traffic(axis=kind.axis, collective=kind.collective, calls=n * calls, bytes=n * n_bytes))
    notes = [each for each in found.notes if not each.startswith("activations are those")]
    on_host = [f"{size.on_host / 2**20:,.1f} MiB of them lie in the host's memory"] if size.on_host else []
    told = f"activations are those of a step's graph after {', '.join(graphs.passes)}, interpreted"
    return replace(
        found,
        activations_bytes=size.peak - found.gradients_bytes,
        peak_bytes=resting + size.peak,
        peak_at="a step's graph",
        flops=n * size.flops,
        traffic=sorted(traffic, key=lambda each: -each.bytes),
        notes=[*notes, told, *on_host],
    )


def fake_graph(run: Run, graphs: GraphCompile, known: Plan) -> tuple[GraphSize, dict[MessageKind, tuple[int, int]]]:
    """The graph of a microbatch after its passes in numbers, and of each kind of message how many it sends, and bytes;
    on fake tensors, among ranks that are not there."""
    cpu, training = torch.device("cpu"), run.training
    with nullcontext() if known.world_size == 1 else fake_ranks(known.world_size, known.rank):
        layout: RankView = SingleRank(cpu) if known.world_size == 1 else ManyRanks(run.parallelism, cpu)
        dtype = getattr(torch, known.compute_dtype)
        around = GraphWrapping(run.activation_checkpoint)
        models = spread_models(run.model, layout, around.wrapping(dtype), run.optimizer.groups, ())
        (model,) = models.values()
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialise(model, cpu, getattr(torch, training.dtype))
            settings = {"layout": layout, "dtype": dtype, "mask": training.mask_of(run.dataloader)}
            let_go = lets_go(run.parallelism)
            objective = GraphObjective(
                [model], run.loss.build(), graphs=graphs, policies=around.policies, let_go=let_go, **settings
            )
            n_tokens = (known.microbatch_rows, known.seq_len)
            zeros_BL = torch.zeros(n_tokens, dtype=torch.int64)
            batch = Batch(zeros_BL, zeros_BL.clone(), zeros_BL.clone(), zeros_BL.clone())
            n_labels = batch.labels_BL.numel()
            microbatch = layout.to_rank_tokens(batch, documents=objective.mask == "document", n_labels=n_labels)
            inputs = objective.inputs(microbatch, float(n_labels), None)
            module = objective.trace(microbatch, None, inputs)
            names = list(objective.slots.names.values())
            settings = replace(graphs, enable=False)
            prepared = prepare(module, settings, around.policies, names, let_go=let_go)
        axes = group_axes(layout, experts=bool(routers(model)))
        kinds: dict[MessageKind, tuple[int, int]] = {}
        for found in messages(prepared.module.graph):
            kind = MessageKind(axes[found.group.group_name], found.collective)
            calls, n_bytes = kinds.get(kind, (0, 0))
            kinds[kind] = calls + 1, n_bytes + found.n_bytes
        return size_of(prepared.module.graph), kinds
