"""What a rank of a pipeline does in a step, action by action: a plan does a few of each kind, and counts all.

Letters: B rows, L length, D width.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import P2POp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, ScheduleGPipe
from torch.distributed.pipelining.stage import PipelineStage

from core.nn.decoder import HeadReader
from core.parallel.pipeline import Microbatch, Pipeline
from core.plan.traffic import n_bytes_of

IDLE = ("SEND_F", "SEND_B", "WAIT_REDUCE_GRAD")
"""Actions of a schedule that are done as a part of those before them."""

RELEASES = hasattr(PipelineStage, "release_fwd_send_outputs")
"""Whether a stage lets go of outputs as soon as they have been sent, and makes room for what it receives when it asks
for it (torch 2.15); or else keeps both for the whole step."""


class Action(NamedTuple):
    """One step of a schedule in torch.distributed.pipelining's words: F forward, B backward, its halves I (inputs) and
    W (weights), RECV_F, RECV_B, WAIT_SEND_F, WAIT_SEND_B, UNSHARD, RESHARD, REDUCE_GRAD."""

    kind: str
    stage: int
    microbatch: int | None = None


def actions(pipeline: Pipeline) -> list[Action]:
    """What this rank does in a step, in order."""
    schedule, n = pipeline.schedule, pipeline.n_microbatches
    if isinstance(schedule, PipelineScheduleMulti):
        steps = vars(schedule)["pipeline_order_with_comms"][schedule.rank]  # all of this kind have it
        found = [part for step in steps for part in step.sub_actions or [step]]
        named = [Action(step.computation_type.value, step.stage_index, step.microbatch_index) for step in found]
        return [action for action in named if action.kind not in IDLE]
    (stage,) = pipeline.stages
    number = stage.stage_index
    if isinstance(schedule, ScheduleGPipe):
        return _with_messages(stage, "F" * n + "B" * n, waits_at_once=False)
    n_warmup = min(n, stage.num_stages - number)
    return _with_messages(stage, "F" * n_warmup + "BF" * (n - n_warmup) + "B" * n_warmup, waits_at_once=True)


def _with_messages(stage: PipelineStage, passes: str, *, waits_at_once: bool) -> list[Action]:
    """The actions of a single stage: its passes, what it receives before them, and waits for what it has sent.

    It waits for an output after the next forward (`waits_at_once`), and before a backward for all.
    """
    number = stage.stage_index
    order: list[Action] = []
    sent: list[Action] = []
    counts = Counter[str]()
    for kind in passes:
        i, arrives = counts[kind], not (stage.is_first if kind == "F" else stage.is_last)
        counts[kind] += 1
        if kind == "B":
            order, sent = order + sent, []
        order += [Action(f"RECV_{kind}", number, i)] * arrives + [Action(kind, number, i)]
        if kind == "F" and RELEASES and not stage.is_last:
            if waits_at_once:
                order, sent = order + sent, []
            sent.append(Action("WAIT_SEND_F", number, i))
    return [*order, Action("REDUCE_GRAD", number)]


class PipelinePasses:
    """Does actions of a pipeline on this rank alone, with one microbatch in the place of all.

    What other ranks send is there from the start. `residual_BLD` is what travels between stages; `order` is the whole
    step.
    """

    def __init__(self, pipeline: Pipeline, microbatch: Microbatch, read: HeadReader, residual_BLD: Tensor) -> None:
        self.microbatch, self.read = microbatch, read
        self.order, self.n_microbatches = actions(pipeline), pipeline.n_microbatches
        self.stages = {stage.stage_index: stage for stage in pipeline.stages}
        self.keeps_sent = isinstance(pipeline.schedule, PipelineScheduleMulti)
        self.losses: dict[int, Tensor] = {}
        self.output: Any = None
        self.sent: dict[Action, list[Tensor]] = {}
        """What a schedule has in hand, by the pass: until the next, or until it waits for what it has sent."""
        for stage in self.stages.values():
            enters = microbatch.tokens_BL if stage.is_first else residual_BLD
            leaves = residual_BLD.new_zeros((), dtype=torch.float32) if stage.is_last else residual_BLD
            stage.know_shapes(pipeline.n_microbatches, enters, leaves)

    def run(self, action: Action) -> int:
        """Do it; returns the bytes that other stages are sent."""
        stage = self.stages[action.stage]
        match action:
            case Action("F", _, int(i)):
                return self._forward(stage, i)
            case Action("B" | "I", _, int(i)):
                stage.backward_one_chunk(i, loss=self.losses.pop(i, None), full_backward=action.kind == "B")
                return self._pass_back(stage, i)
            case Action("W", _, int(i)):
                stage.backward_weight_one_chunk(i)
            case Action("RECV_F", _, int(i)):
                stage.get_fwd_recv_ops(i)
            case Action("RECV_B", _, int(i)):
                stage.get_bwd_recv_ops(i)
            case Action("WAIT_SEND_F" | "WAIT_SEND_B", number, int(i)):
                self.sent.pop(Action(action.kind[-1], number, i), None)
                if action.kind == "WAIT_SEND_F":
                    stage.release_fwd_send_outputs(i)  # pyrefly: ignore[missing-attribute] - of torch 2.15
            case Action("REDUCE_GRAD"):
                stage.perform_reduce_grad(1)
            case Action("UNSHARD" | "RESHARD"):
                for part in stage.submod.modules():
                    if isinstance(part, FSDPModule):
                        part.unshard() if action.kind == "UNSHARD" else part.reshard()
            case _:
                raise AssertionError(f"{action} is an action that nobody has heard of")
        return 0

    def end(self) -> None:
        """Let go of what a schedule holds until the step's last pass."""
        self.output, self.sent = None, {}
        for stage in self.stages.values():
            stage.clear_runtime_states()

    def _forward(self, stage: PipelineStage, i: int) -> int:
        batch = self.microbatch
        rows = (batch.tokens_BL,) if stage.is_first else ()
        others = {"positions": batch.positions, "read": self.read}
        output = stage.forward_one_chunk(i, rows, others, save_forward_output=False)
        if not self.keeps_sent and not RELEASES:
            self.output = output
        if stage.is_last:
            self.losses[i] = output
        elif following := self.stages.get(stage.stage_index + 1):
            following.set_local_fwd_input(output, i)
        else:
            return self._send(Action("F", stage.stage_index, i), stage.get_fwd_send_ops(i))
        return 0

    def _pass_back(self, stage: PipelineStage, i: int) -> int:
        if stage.is_first:
            return 0
        if before := self.stages.get(stage.stage_index - 1):
            before.set_local_bwd_input(stage.get_local_bwd_output(i), i)
            return 0
        return self._send(Action("B", stage.stage_index, i), stage.get_bwd_send_ops(i))

    def _send(self, what: Action, ops: list[P2POp]) -> int:
        tensors = [op.tensor.detach() for op in ops]
        self.sent = (self.sent if self.keeps_sent else {}) | {what: tensors}
        return n_bytes_of(tensors)
