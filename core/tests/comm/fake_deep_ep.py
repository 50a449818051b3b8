"""An imitation of `deep_ep` on the CPU, over gloo: our reading of its interface, no evidence of what GPUs do.

Stricter than the library: it refuses what that only expects, hands out what that leaves undefined as NaN, and changes
what that may change. Rows are those of `WIRE`, bfloat16 as in the library, which a test may set to float32 to look for
small differences.
"""

import sys
import weakref
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

WIRE = [torch.bfloat16]
GIVEN: list[weakref.ref] = []
"""All tensors and handles that were handed out."""
CALLS: list[str] = []


def install(flavour: str) -> ModuleType:
    """Let `import deep_ep` find an imitation: v1, v2.0, v2.1, hybrid-9 or hybrid-11."""
    import fake_elastic
    import fake_hybrid

    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    module.__version__ = {"v1": "1.2.1", "v2.0": "2.0.0", "v2.1": "2.1.0"}.get(flavour, "1.2.1+94a9f8f")
    module.Buffer, module.EventOverlap, module.Config = Buffer, EventOverlap, Config
    if flavour.startswith("v2"):
        module.ElasticBuffer = fake_elastic.buffer_class(flavour)
        module.EPHandle = fake_elastic.HANDLES[flavour]
        module.EventHandle, module.topk_idx_t = EventHandle, torch.int64
    if flavour.startswith("hybrid"):
        module.HybridEPBuffer = fake_hybrid.buffer_class(flavour)
    sys.modules["deep_ep"] = module
    return module


def alive() -> int:
    """How many of the things handed out are still there."""
    return sum(thing() is not None for thing in GIVEN)


def noted(*things: Any) -> Any:
    """Remembers what is handed out; returns it back."""
    for thing in things:
        if isinstance(thing, tuple):
            noted(*thing)
        elif thing is not None and not isinstance(thing, int | list):
            GIVEN.append(weakref.ref(thing))
    return things


def everyone(group: ProcessGroup, value: Any) -> list[Any]:
    """What each rank has; a collective, in the same order on all."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def agreed(group: ProcessGroup, call: str, *value: Any) -> None:
    CALLS.append(call)
    values = everyone(group, (call, *value))
    assert all(other == values[0] for other in values), f"ranks differ: {values}"


def check_rows(x: Tensor) -> None:
    assert x.dim() == 2 and x.is_contiguous(), f"rows of shape {x.shape}, contiguous {x.is_contiguous()}"
    assert x.dtype == WIRE[0], f"rows are {x.dtype}, not {WIRE[0]}"
    assert x.shape[1] * x.element_size() % 32 == 0, f"rows of {x.shape[1]} numbers"
    deterministic, module = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    assert not (deterministic and module.fill_uninitialized_memory), "new memory would be filled meanwhile"


def check_choices(x: Tensor, ids: Tensor, weight: Tensor) -> None:
    assert ids.dtype == torch.int64 and ids.dim() == 2 and ids.is_contiguous() and len(ids) == len(x), ids.shape
    assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == ids.shape, weight.dtype
    assert 1 <= ids.shape[1] <= 32 and len(x) >= 1, f"{len(x)} tokens of {ids.shape[1]} choices"


class EventHandle:
    """A moment of a stream. What is written by then is NaN until somebody waits."""

    def __init__(self, *outputs: Tensor | None) -> None:
        self.results = [(tensor, tensor.clone()) for tensor in outputs if tensor is not None]
        for tensor, _ in self.results:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -(10**6))

    def current_stream_wait(self) -> None:
        for tensor, result in self.results:
            tensor.copy_(result)


class EventOverlap:
    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None, "nothing to wait for"
        self.event.current_stream_wait()


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks * 100

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        raise AssertionError("built without NVSHMEM")


class Buffer:
    """DeepEP V1 within a node."""

    num_sms = 20

    def __init__(
        self,
        group: ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm: Any = None,
    ) -> None:
        assert group.size() in (2, 4, 8), f"no kernels for {group.size()} ranks"
        agreed(group, "Buffer", num_nvl_bytes, num_rdma_bytes)
        self.group, self.num_nvl_bytes, self.explicitly_destroy = group, num_nvl_bytes, explicitly_destroy

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        return Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    def destroy(self) -> None:
        assert self.explicitly_destroy
        agreed(self.group, "destroy")
        self.num_nvl_bytes = 0

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        size = self.group.size()
        rank = torch.arange(size).view(-1, 1, 1)
        in_rank = (topk_idx // (num_experts // size) == rank).any(2).T.contiguous()
        counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        event = self._event(previous_event, async_finish, allocate_on_comm_stream)
        return (*noted(in_rank.sum(0).int(), None, counts, in_rank), event)

    def _event(self, previous: Any, asynchronous: bool, on_comm_stream: bool, *outputs: Tensor | None) -> EventOverlap:
        assert self.num_nvl_bytes, "the buffer was destroyed, or has no room"
        assert previous is None or isinstance(previous, EventOverlap), "a raw event would be ignored"
        assert not on_comm_stream or (previous is not None and asynchronous), "wants an event, and to be waited for"
        return EventOverlap(EventHandle(*outputs) if asynchronous else None)

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_rows(x)
        me, after = self.group.rank(), (previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            assert topk_idx is None and topk_weights is None, "no weights with a handle"
            in_rank = self._checked(handle)[4]
            assert len(in_rank) == len(x)
            agreed(self.group, "cached dispatch")
            sent = everyone(self.group, (x, in_rank))
            rows = torch.cat([theirs[goes[:, me]] for theirs, goes in sent])
            noted(rows)
            return rows, None, None, None, None, self._event(*after, rows)
        check_choices(x, topk_idx, topk_weights)
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert num_tokens_per_rdma_rank is None and is_token_in_rank.dtype == torch.bool
        n_here = len(num_tokens_per_expert) // self.group.size()
        agreed(self.group, "dispatch", topk_idx.shape[1], self.num_sms)
        sent = everyone(self.group, (x, topk_idx, topk_weights, is_token_in_rank))
        rows, ids, weight = (torch.cat([part[i][part[3][:, me]] for part in sent]) for i in range(3))
        local = ids - me * n_here
        outside = (ids < 0) | (local < 0) | (local >= n_here)
        local, weight = local.masked_fill(outside, -1), weight.masked_fill(outside, 0)
        counts = [int((local == expert).sum()) for expert in range(n_here)]
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        handle = self._handle(is_token_in_rank, [part[3] for part in sent])
        noted(rows, local, weight, handle)
        return rows, local, weight, counts, handle, self._event(*after, rows, local, weight)

    def _handle(self, in_rank: Tensor, goes: list[Tensor]) -> tuple[Tensor, ...]:
        size, me = self.group.size(), self.group.rank()
        prefix = torch.stack([part.sum(0) for part in goes]).cumsum(0).int()
        channels = [torch.zeros(size, self.num_sms // 2, dtype=torch.int32) for _ in range(2)]
        source = torch.cat([part[:, me].nonzero().flatten() for part in goes]).int()
        head = torch.where(in_rank, in_rank.cumsum(0), -1).int()
        return prefix, *channels, source, in_rank.clone(), head

    def _checked(self, handle: Any) -> Any:
        assert isinstance(handle, tuple) and len(handle) == 6, type(handle)
        prefix, first, second, source, in_rank, head = handle
        assert in_rank.dtype == torch.bool and all(part.dtype == torch.int32 for part in (prefix, source, head))
        assert first.shape == second.shape == (self.group.size(), self.num_sms // 2), "another number of SMs"
        assert torch.equal(in_rank, head >= 0), "not the handle of a dispatch"
        return handle

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Any = None,
        bias: Any = None,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_rows(x)
        prefix, _, _, source, in_rank, head = self._checked(handle)
        arrived = prefix[:, self.group.rank()].diff(prepend=torch.zeros(1, dtype=torch.int32))
        assert len(x) == len(source) == arrived.sum(), f"{len(x)} rows, {len(source)} came"
        rank = torch.arange(self.group.size()).repeat_interleave(arrived)
        home, weight = summed(self.group, x, topk_weights, rank, source.long(), len(in_rank))
        negative = head.numpy()  # no version counter sees this
        negative[negative < 0] -= 1
        noted(home, weight)
        after = (previous_event, async_finish, allocate_on_comm_stream)
        return home, weight, self._event(*after, home, weight)


def summed(
    group: ProcessGroup, rows: Tensor, weight: Tensor | None, rank: Tensor, token: Tensor, n_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """For each token of ours the sum of its rows on all ranks, ranks ascending, in fp32; the same of weights."""
    assert weight is None or (weight.dtype == torch.float32 and weight.is_contiguous() and len(weight) == len(rows))
    agreed(group, "combine", weight is None)
    total = torch.zeros(n_tokens, rows.shape[1])
    total_weight = None if weight is None else torch.zeros(n_tokens, *weight.shape[1:])
    for theirs, their_weight, their_rank, their_token in everyone(group, (rows, weight, rank, token)):
        mine = their_rank == group.rank()
        total.index_add_(0, their_token[mine], theirs[mine].float())
        if total_weight is not None:
            total_weight.index_add_(0, their_token[mine], their_weight[mine])
    return total.to(rows.dtype), total_weight
