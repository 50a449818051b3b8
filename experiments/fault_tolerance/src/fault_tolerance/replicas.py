"""The replica groups of a run: which are there for the next step, sums over them, and whether it counts."""

import hashlib
import logging
import math
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from core.config.configurable import Configurable, range_problems
from core.parallel.layout import RankView
from core.runtime.ranks import Ranks
from fault_tolerance.errors import NoQuorum, NotCommitted
from fault_tolerance.state import RunState

log = logging.getLogger("armature")

BUCKET_BYTES = 2**25
"""So many bytes of gradients are summed at once."""
PAUSE_S = 0.5
"""How long groups wait that are too few to go on, until they look again."""


class Words(NamedTuple):
    """What a group tells the others when they meet."""

    save: bool = False
    """It was asked for a checkpoint."""
    stop: bool = False
    """One of its observers ends the run."""


SILENT = Words()


class Replicas(Configurable):
    """One replica group among those that train a run: ranks that share one copy of the weights and may be lost
    together.

    Before a step, or a round of steps, the groups that are alive agree in a quorum on who they are (`begin`). One that
    comes late is handed the state of the run. What they sum is lost where one of them is, and `commit` says whether
    all of it arrived.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        lighthouse: str | None = None
        """Where torchft's lighthouse, which knows all groups, listens: http://HOST:PORT. None starts one in this
        process, for one group alone."""
        group: int = 0
        """Number of this group, counted from 0; its ranks are those of one launcher."""
        n_groups: int = 1
        """Groups that the run is planned for: each reads its share of the rows of a step, fewer read them all."""
        min_replicas: int = 1
        """Groups that must be there for a step; fewer wait."""
        method: Literal["every_step", "local_sgd", "diloco"] = "every_step"
        """every_step sums gradients in each step, so that the run is that of one group. Under the others groups train
        by themselves for sync_steps, then take the mean of their weights, or an outer step towards it."""
        sync_steps: int = 20
        """local_sgd and diloco: steps of a round."""
        outer_lr: float = 0.7
        """diloco: learning rate of the outer step, which is SGD with Nesterov momentum."""
        outer_momentum: float = 0.9
        """diloco: its momentum."""
        timeout_s: int = 60
        """How long a group waits for another that has stopped in a sum; that one is left out afterwards. Less than
        comm.train_timeout_seconds."""
        quorum_timeout_s: int = 1800
        """How long a group waits for the lighthouse and for other groups before a step."""

        def problems(self) -> Iterator[tuple[str, str]]:
            if find_spec("torchft") is None:
                yield "", "the package torchft is not installed: pip install torchft==0.2.0"
            yield from range_problems(self, n_groups=2**16, sync_steps=2**30, timeout_s=2**20, quorum_timeout_s=2**20)
            if not 0 <= self.group < max(self.n_groups, 1):
                yield "group", f"group {self.group} is none of n_groups {self.n_groups}: use 0 to {self.n_groups - 1}"
            if not 1 <= self.min_replicas <= max(self.n_groups, 1):
                yield (
                    "min_replicas",
                    f"min_replicas {self.min_replicas} must be from 1 to n_groups {self.n_groups}",
                )
            if self.lighthouse is None and self.n_groups > 1:
                yield (
                    "lighthouse",
                    f"n_groups {self.n_groups} need a lighthouse that outlives each of them: start one, "
                    "torchft_lighthouse --min_replicas 1 --bind [::]:29510, and set lighthouse http://HOST:29510",
                )
            if self.lighthouse is not None and not re.match(r"https?://.+:\d+/?$", self.lighthouse):
                yield "lighthouse", f"lighthouse {self.lighthouse} must be http://HOST:PORT"
            if not 0 < self.outer_lr < math.inf:
                yield "outer_lr", f"outer_lr {self.outer_lr} must be a finite number above 0"
            if not 0 <= self.outer_momentum < 1:
                yield "outer_momentum", f"outer_momentum {self.outer_momentum} must be in [0, 1)"

        def places(self) -> dict[str, Any]:
            return {"lighthouse": self.lighthouse}  # a run that goes on may find it elsewhere

        @property
        def steps_per_round(self) -> int:
            """Steps that groups take before they meet."""
            return 1 if self.method == "every_step" else self.sync_steps

    def __init__(self, config: Config, *, state: RunState, layout: RankView, ranks: Ranks) -> None:
        """Join the lighthouse; a collective of the group's ranks. Raises `UserError` where it does not answer."""
        os.environ.setdefault("RUST_LOG", "error")  # torchft tells of each quorum otherwise, from its import on
        from fault_tolerance.quorum import Membership  # loads torchft: seconds that a plan does without

        self.config, self.state, self.layout = config, state, layout
        self.number, self.n = 0, 0
        """The place of this group among those of the attempt, and how many there are."""
        self.heard = SILENT
        """What any of them said."""
        self._apart, self._torn, self._attempt = False, False, 0
        self._new, self._ranks = True, ranks
        self._random = random.Random(ranks.first(lambda: secrets.randbits(64)))  # on all ranks of the group the same
        state.history = self._random.getrandbits(62)
        self._membership = Membership(config, state, ranks, layout.device)
        self._manager = self._membership.manager

    @property
    def leads(self) -> bool:
        """Whether this group is the one that saves and validates."""
        return self.number == 0

    def begin(self, *, least: int | None = None, look: Callable[[], None] | None = None, words: Words = SILENT) -> None:
        """Agree on who takes part in the next attempt, with the state of the run on all of them; at `least` so many
        where that is fewer than `min_replicas`. `look` is called after each time in vain, and may raise; `words` are
        this group's, of which `heard` tells afterwards.

        A collective of all ranks of all groups. Raises `NoQuorum` where the lighthouse does not answer, or groups did
        not agree in `quorum_timeout_s`, and `UserError` for a group of other settings.
        """
        before, least = self.n, self.config.min_replicas if least is None else least
        deadline = time.monotonic() + self.config.quorum_timeout_s
        while not self._agreed(least, words):
            self._vote()  # not: it was reported
            if look is not None:
                look()
            if self._ranks.first(lambda: time.monotonic() > deadline):
                raise NoQuorum(
                    f"replica groups did not agree in quorum_timeout_s {self.config.quorum_timeout_s}: {self.n} are "
                    f"there, and at least {least} are needed; start the others"
                )
        if self.n != before:
            log.info(f"{self.n} of {self.config.n_groups} replica groups go on after step {self.state.step:,}")

    def _agreed(self, least: int, words: Words) -> bool:
        """Whether one attempt at a quorum made all of its groups equal; an error is reported where not."""
        state, manager = self.state, self._manager
        was_apart = self._apart
        announced = 0 if was_apart else 2 * (state.step + 1) - self._new  # whoever announces less is handed it
        manager.load_state_dict({"step": announced, "batches_committed": 0})
        received = self._membership.meet()
        self.number, self.n = manager.participating_rank() or 0, manager.num_participants()
        (lost,) = self.layout.sums(float(self.errored))
        if received is not None and not lost:  # on all ranks of this group, or on none
            state.load(received)
            most, least_of_all = self.layout.maxima(state.history, -state.history)
            self._torn, self._new = most != -least_of_all, False  # ranks may be handed the states of several groups
            log.info(f"took over the state of the run after step {state.step:,}")
        histories = self._exchanged(words) if not lost else [state.history]
        few = self.n < least
        alone = was_apart and received is None  # nobody had more than what was announced
        own = not lost and histories[self.number] != histories[0]
        found = map(float, (self.errored, few or alone or self._torn, len({*histories}) > 1, own))
        lost_too, wrong, unequal, apart = self.layout.sums(*found)
        self._apart = self._torn or (apart > 0 and not lost + lost_too)
        if not lost + lost_too + wrong + unequal:
            return True
        manager.report_error(RuntimeError("the groups of the quorum are not equal, or too few"))
        if few:
            time.sleep(PAUSE_S)
        return False

    def _exchanged(self, words: Words) -> list[int]:
        """What each group of the attempt remembers of the run; with what they say, and a number that no other attempt
        has."""
        own = torch.zeros(self.n, 4, dtype=torch.int64, device=self.layout.device)
        own[self.number] = torch.tensor([self.state.history, self._random.getrandbits(40), *words])
        self._sum(own)
        histories, numbers, *said = own.T.tolist()
        self._attempt, self.heard = sum(numbers), Words(*(any(each) for each in said))
        return histories

    @property
    def errored(self) -> bool:
        """Whether something of this attempt was lost, as far as this rank knows."""
        return self._manager.errored() is not None

    def check(self) -> None:
        """Raise `NotCommitted` on all ranks of the group where one lost something; a collective of them."""
        if self.layout.sums(float(self.errored))[0]:
            self._vote()
            raise NotCommitted

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the groups, in double precision; any numbers where that failed."""
        total = torch.tensor(values, dtype=torch.float64, device=self.layout.device)
        self._sum(total)
        return total.tolist()

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors of any shape over the groups, in place; with any result where that failed."""
        for bucket in buckets(tensors) if self.n > 1 else ():
            joined = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._sum(joined)
            for tensor, part in zip(bucket, joined.split([each.numel() for each in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _sum(self, tensor: Tensor) -> None:
        if self.n > 1:
            self._manager.allreduce(tensor, reduce_op=ReduceOp.SUM).wait()

    def commit(self, step: int) -> None:
        """Count the attempt as that of the steps up to `step`. Raises `NotCommitted` where it is to be done again."""
        if not self._vote():
            raise NotCommitted
        self.state.step, self._new = step, False
        text = f"{self.state.history} {self._attempt} {step}".encode()
        self.state.history = int.from_bytes(hashlib.sha256(text).digest()[:7])

    def _vote(self) -> bool:
        """Whether all ranks of the group have all of the attempt; one of them may come `timeout_s` after another."""
        return self._manager.should_commit(timeout=timedelta(seconds=2 * self.config.timeout_s))

    def close(self) -> None:
        """Leave the lighthouse."""
        self._membership.close()


def buckets(tensors: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The tensors, of any shape, in their order, as many of one type together as have `BUCKET_BYTES`."""
    found: list[Tensor] = []
    for tensor in tensors:
        if found and (tensor.dtype != found[0].dtype or sum(each.nbytes for each in found) >= BUCKET_BYTES):
            yield found
            found = []
        found.append(tensor)
    if found:
        yield found
