"""The part of the imitation of `deep_ep` that is HybridEP, with handles of 9 and of 11 members."""

from typing import Any

import torch
from fake_deep_ep import agreed, check_rows, everyone, noted, summed
from torch import Tensor
from torch.distributed import ProcessGroup


class Settings:
    """What the library makes of a dispatch: no tensor."""

    def __init__(self, n_tokens: int, n_experts: int) -> None:
        self.n_tokens, self.n_experts = n_tokens, n_experts


class HybridEPBuffer:
    members: int

    def __init__(
        self,
        group: ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        load_cached_kernels: bool = False,
        use_shared_buffer: bool = True,
        enable_custom_allgather: bool = True,
    ) -> None:
        assert group.size() > 1 and hidden_dim % 16 == 0 and num_local_experts * group.size() % 4 == 0
        assert not enable_custom_allgather, "gives wrong counts"
        agreed(group, "HybridEPBuffer", hidden_dim, max_num_of_tokens_per_rank, num_local_experts)
        self.group, self.dim, self.n_here = group, hidden_dim, num_local_experts
        self.max = max(max_num_of_tokens_per_rank, 512)

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Any = None,
        topk_weights: Any = None,
        num_of_experts_per_rank: Any = None,
        num_of_experts: Any = None,
        use_fp8: Any = None,
        routing_map: Any = None,
        probs: Any = None,
        scaling_factor: Any = None,
        num_permuted_tokens: Any = None,
        pad_multiple: Any = None,
        handle: Any = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Any, ...]:
        check_rows(hidden)
        n = len(hidden)
        assert 1 <= n <= self.max and hidden.shape[1] == self.dim
        assert n % 64 * self.group.size() % 4 == 0, f"a last chunk of {n % 64} tokens hangs"
        assert topk_idx is None, "reads -1 as a place outside of the map"
        assert pad_multiple is None or pad_multiple > 1
        agreed(self.group, "dispatch", n, handle is None, num_permuted_tokens is None, pad_multiple, non_blocking)
        if handle is not None:
            return self._again(hidden, num_permuted_tokens, pad_multiple or 1, handle, routing_map, probs)
        assert routing_map.dtype == torch.bool and routing_map.is_contiguous()
        assert probs.dtype == torch.float32 and probs.is_contiguous() and probs.shape == routing_map.shape
        assert routing_map.shape == (n, self.n_here * self.group.size()) and not probs[~routing_map].any()
        assert not non_blocking or type(num_permuted_tokens) is int
        sent = everyone(self.group, (hidden, routing_map, probs))
        places, counts = self._places([part[1] for part in sent], pad_multiple or 1)
        rows, weight = self._filled(places, [part[0] for part in sent], [part[2] for part in sent])
        overflow = torch.zeros(1, dtype=torch.int32)
        if non_blocking:
            overflow += len(places) > num_permuted_tokens
            rows, weight, places = (cut(part, num_permuted_tokens) for part in (rows, weight, places))
        handle = self._handle(places, counts, pad_multiple or 1, n, overflow)
        noted(rows, weight, counts, *(part for part in handle if isinstance(part, Tensor)))
        return rows, weight, None, counts, handle

    def _places(self, maps: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
        """(source rank, token, expert) of each row, -1 for pads; rows of each expert with its pads."""
        places, counts = [], []
        for expert in range(self.group.rank() * self.n_here, (self.group.rank() + 1) * self.n_here):
            chosen = [
                (r, t, expert) for r, part in enumerate(maps) for t in part[:, expert].nonzero().flatten().tolist()
            ]
            chosen += [(-1, -1, -1)] * (-len(chosen) % pad)
            counts.append(len(chosen))
            places += chosen
        return torch.tensor(places, dtype=torch.int32).view(-1, 3), torch.tensor(counts)

    def _filled(self, places: Tensor, x: list[Tensor], probs: list[Tensor] | None) -> tuple[Tensor, Tensor | None]:
        rows = torch.zeros(len(places), self.dim, dtype=x[0].dtype)
        weight = None if probs is None else torch.zeros(len(places))
        for row, (rank, token, expert) in enumerate(places.tolist()):
            if rank == -2:
                rows[row] = torch.nan
            elif rank >= 0:
                rows[row] = x[rank][token]
                if weight is not None and probs is not None:
                    weight[row] = probs[rank][token, expert]
        return rows, weight

    def _handle(self, places: Tensor, counts: Tensor, pad: int, n: int, overflow: Tensor) -> tuple[Any, ...]:
        settings = Settings(n, self.n_here * self.group.size())
        start = [torch.tensor([[pad]], dtype=torch.int32), torch.zeros(0, dtype=torch.bool), None]
        start += [torch.tensor([len(places)], dtype=torch.int32), torch.zeros(n, self.n_here, dtype=torch.bool)]
        if self.members == 9:
            return (*start, places, n, settings, overflow)
        return (*start, torch.zeros(3, dtype=torch.int32), places, counts, n, settings, overflow)

    def _opened(self, handle: Any) -> tuple[Tensor, int, Settings, int]:
        assert isinstance(handle, tuple) and len(handle) == self.members
        *start, n, settings, overflow = handle
        places, pad = start[5 if self.members == 9 else 6], int(start[0])
        assert isinstance(settings, Settings) and overflow.shape == (1,) and n == settings.n_tokens
        return places, n, settings, pad

    def _again(self, x: Tensor, n_rows: Any, pad: int, handle: Any, routing_map: Any, probs: Any) -> tuple[Any, ...]:
        places, n, _, its_pad = self._opened(handle)
        assert routing_map is None and probs is None
        assert type(n_rows) is int and n_rows == len(places), f"{n_rows} rows, not {len(places)}"
        assert n == len(x) and pad == its_pad, f"pads to {pad}, not {its_pad}"
        rows, _ = self._filled(places, everyone(self.group, x), None)
        noted(rows)
        return rows, None, None, torch.zeros(0), handle

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Any = None,
        handle: Any = None,
        pad_multiple: Any = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Any, ...]:
        check_rows(hidden)
        places, n, settings, _ = self._opened(handle)
        assert len(hidden) == len(places) and (probs is None or probs.shape == (len(places),))
        real = (places[:, 0] >= 0).nonzero().flatten()
        rank, token, expert = places[real].long().T
        dense = None
        if probs is not None:
            assert probs.dtype == torch.float32 and probs.is_contiguous()
            dense = torch.zeros(len(real), settings.n_experts).scatter(1, expert.view(-1, 1), probs[real].view(-1, 1))
        home, weight = summed(self.group, hidden[real], dense, rank, token, n)
        noted(home, weight)
        return home, weight


def cut(part: Tensor, n: int) -> Tensor:
    """`n` rows, more than there are with what nobody wrote."""
    garbage = -2 if part.dtype == torch.int32 else torch.nan
    return torch.cat((part[:n], part.new_full((max(n - len(part), 0), *part.shape[1:]), garbage)))


def buffer_class(flavour: str) -> type:
    return type("HybridEPBuffer", (HybridEPBuffer,), {"members": int(flavour.removeprefix("hybrid-"))})
