"""The part of the imitation of `deep_ep` that is V2: `ElasticBuffer` as of 2.0 and 2.1, rows in any order."""

from typing import Any

import torch
from fake_deep_ep import EventHandle, EventOverlap, agreed, check_choices, check_rows, everyone, noted, summed
from torch import Tensor
from torch.distributed import ProcessGroup

STATED = ["do_expand", "num_experts", "expert_alignment", "num_max_tokens_per_rank", "num_sms", "topk_idx"]
COUNTED = ["num_recv_tokens", "num_expanded_tokens", "num_recv_tokens_per_expert_list"]
SUMS = ["psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert"]
PLACES = ["recv_src_metadata", "dst_buffer_slot_idx", "token_metadata_at_forward", "channel_linked_list"]
ARGUMENTS = {
    "v2.0": [*STATED, *COUNTED, *SUMS, *PLACES],
    "v2.1": [*STATED, *COUNTED, *SUMS, "num_unaligned_recv_tokens_per_expert", *PLACES],
}


class EPHandle:
    arguments: list[str]

    def __init__(self, *values: Any) -> None:
        self.__dict__.update(zip(self.arguments, values, strict=True))
        self.cached_recv_src_metadata_before_sort = None


HANDLES = {name: type("EPHandle", (EPHandle,), {"arguments": ARGUMENTS[name]}) for name in ARGUMENTS}


class ElasticBuffer:
    flavour: str

    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int | None = None,
        *,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        deterministic: bool = False,
        explicitly_destroy: bool = False,
        **unknown: Any,
    ) -> None:
        assert not unknown, unknown
        agreed(group, "ElasticBuffer", num_max_tokens_per_rank, hidden, num_topk, deterministic)
        self.group, self.hidden, self.max, self.top_k = group, hidden, num_max_tokens_per_rank, num_topk
        self.deterministic, self.explicitly_destroy = deterministic, explicitly_destroy
        self.num_bytes = group.size() * num_max_tokens_per_rank * hidden * 2
        self.generator = torch.Generator().manual_seed(group.rank())
        self.tails = self.flavour == "v2.0"

    def destroy(self) -> None:
        assert self.explicitly_destroy
        agreed(self.group, "destroy")
        self.max = 0

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 24 if self.flavour == "v2.1" else 1 // 0  # a bandwidth that was read as 0

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def _event(self, previous: Any, asynchronous: bool, on_comm_stream: bool, *outputs: Any) -> EventOverlap:
        if previous is not None and not isinstance(previous, EventHandle):
            raise TypeError("an EventHandle, not what wraps it")
        assert previous is None or on_comm_stream, "an event wants allocate_on_comm_stream"
        return EventOverlap(EventHandle(*outputs) if asynchronous else None)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Any = None,
        topk_weights: Any = None,
        cumulative_local_expert_recv_stats: Any = None,
        num_experts: Any = None,
        num_max_tokens_per_rank: Any = None,
        expert_alignment: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Any = None,
        do_handle_copy: bool = True,
        do_cpu_sync: Any = None,
        do_expand: bool = False,
    ) -> tuple[Any, ...]:
        check_rows(x)
        assert self.max and 1 <= len(x) <= self.max and x.shape[1] == self.hidden, f"{x.shape}, room for {self.max}"
        after = (previous_event, async_with_compute_stream, allocate_on_comm_stream)
        if handle is not None:
            rows = self._again(x, topk_idx, topk_weights, num_sms, handle)
            noted(rows)
            return rows, None, None, handle, self._event(*after, rows)
        check_choices(x, topk_idx, topk_weights)
        assert topk_idx.shape[1] <= self.top_k and not do_expand
        most = num_max_tokens_per_rank or self.max
        agreed(self.group, "dispatch", most, num_experts, num_sms, topk_idx.shape[1])
        n_here = num_experts // self.group.size()
        sent = everyone(self.group, (x, topk_idx, topk_weights))
        ids = torch.cat([part[1] for part in sent])
        name = torch.cat([rank * most + torch.arange(len(part[0])) for rank, part in enumerate(sent)])
        mine = (ids >= 0) & (ids // n_here == self.group.rank())
        row = mine.any(1).nonzero().flatten()
        if not self.deterministic:
            row = row[torch.randperm(len(row), generator=self.generator)]
        rows = torch.cat([part[0] for part in sent])[row]
        local = (ids - self.group.rank() * n_here).masked_fill(~mine, -1)[row]
        weight = torch.cat([part[2] for part in sent]).masked_fill(~mine, torch.nan)[row]
        counts = [int((local == expert).sum()) for expert in range(n_here)]
        metadata = torch.zeros(len(row), ids.shape[1] + 2, dtype=torch.int32)
        metadata[:, 0] = name[row]
        stated = [False, num_experts, expert_alignment or 1, most, num_sms or 24, topk_idx.clone()]
        counted = [len(row), len(row), counts]
        sums = [torch.tensor([len(row)], dtype=torch.int32), torch.tensor(counts, dtype=torch.int32).cumsum(0).int()]
        sums += [torch.tensor(counts, dtype=torch.int32)] if self.flavour == "v2.1" else []
        places = [metadata, torch.arange(len(x), dtype=torch.int32), None, None]
        handle = HANDLES[self.flavour](*stated, *counted, *sums, *places)
        noted(rows, local, weight, handle, *(part for part in (*stated, *sums, *places)))
        return rows, local, weight, handle, self._event(*after, rows, local, weight)

    def _again(self, x: Tensor, topk_idx: Any, topk_weights: Any, num_sms: int, handle: Any) -> Tensor:
        assert type(handle) is HANDLES[self.flavour] and topk_idx is None and topk_weights is None
        if num_sms == 0:
            raise TypeError("unsupported operand type(s) for %: 'NoneType' and 'int'")
        assert num_sms == handle.num_sms and len(x) == len(handle.topk_idx)
        agreed(self.group, "cached dispatch", num_sms)
        rank, token = self._named(handle)
        sent = everyone(self.group, x)
        rows = [sent[r][t] for r, t in zip(rank.tolist(), token.tolist(), strict=True)]
        room = self.group.size() * handle.num_max_tokens_per_rank if self.tails else len(rows)
        whole = torch.full((room, x.shape[1]), torch.nan, dtype=x.dtype)
        if rows:
            whole[: len(rows)] = torch.stack(rows)
        return whole

    def _named(self, handle: Any) -> tuple[Tensor, Tensor]:
        name = handle.recv_src_metadata[:, 0].long()
        return name // handle.num_max_tokens_per_rank, name % handle.num_max_tokens_per_rank

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Any = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_rows(x)
        assert type(handle) is HANDLES[self.flavour] and handle.do_expand is False
        assert vars(handle).keys() == {*ARGUMENTS[self.flavour], "cached_recv_src_metadata_before_sort"}
        assert len(x) == len(handle.recv_src_metadata) == handle.num_recv_tokens and num_sms in (0, handle.num_sms)
        home, weight = summed(self.group, x, topk_weights, *self._named(handle), len(handle.topk_idx))
        noted(home, weight)
        after = (previous_event, async_with_compute_stream, allocate_on_comm_stream)
        return home, weight, self._event(*after, home, weight)


def buffer_class(flavour: str) -> type:
    return type("ElasticBuffer", (ElasticBuffer,), {"flavour": flavour})
