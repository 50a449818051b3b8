"""torchft as this experiment uses it: its quorums, its votes, its process groups, and a transport of our own."""

import logging
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL
from torchft.checkpointing import CheckpointTransport
from torchft.coordination import LighthouseServer
from torchft.manager import MANAGER_PORT_ENV
from torchft.process_group import ProcessGroup

from core.config.errors import UserError
from core.runtime.launcher import World, find_world, meeting_point
from core.runtime.ranks import Ranks
from fault_tolerance.errors import NoQuorum
from fault_tolerance.state import RunState, Snapshot

GROUPS = {"cpu": ProcessGroupGloo, "cuda": ProcessGroupNCCL}
"""What carries the messages between groups, by the kind of device."""
JOIN_TIMEOUT_MS = 60_000
QUORUM_RETRIES = 1000
"""A lighthouse that is started again within `quorum_timeout_s` is found again."""
MOST_HEADER_BYTES = 2**30


class Settings(Protocol):
    """What a group needs to know to join others."""

    lighthouse: str | None
    group: int
    min_replicas: int
    timeout_s: int
    quorum_timeout_s: int


class Membership:
    """The membership of one rank of a group at a lighthouse; a collective of the group's ranks."""

    def __init__(self, settings: Settings, state: RunState, ranks: Ranks, device: torch.device) -> None:
        logging.getLogger("torchft").setLevel(logging.CRITICAL)  # a lost group is no error, and would be a traceback
        if device.type not in GROUPS:
            raise UserError(f"replica groups on {device.type} are not supported: use one of {', '.join(GROUPS)}")
        self.settings = settings
        self._servers: list[Any] = []
        self._received: Snapshot | None = None
        lighthouse, address, port = ranks.first(lambda: self._serve(settings))
        self.lighthouse = lighthouse
        timeout = timedelta(seconds=settings.timeout_s)
        self._group = GROUPS[device.type](timeout=timeout)
        self._transport = TensorTransport(self._group, state, device)
        try:
            self.manager = Manager(
                pg=self._group,
                load_state_dict=self._receive,
                state_dict=state.snapshot,
                min_replica_size=settings.min_replicas,
                use_async_quorum=False,
                init_sync=False,  # it would hand ranks of one group the states of several
                timeout=timeout,
                quorum_timeout=timedelta(seconds=settings.quorum_timeout_s),
                quorum_retries=QUORUM_RETRIES,
                connect_timeout=timeout,
                rank=ranks.rank,
                world_size=ranks.size,
                store_addr=address,
                store_port=port,
                lighthouse_addr=lighthouse,
                replica_id=f"group-{settings.group:06}",
                hostname=address,
                checkpoint_transport=self._transport,
            )
        except (RuntimeError, TimeoutError, OSError) as error:
            self._end_servers()
            if "in use" in str(error) and (taken := os.environ.get(MANAGER_PORT_ENV)):
                raise UserError(
                    f"{MANAGER_PORT_ENV} {taken} is a port that another process has: unset it for any that is free"
                ) from error
            raise UserError(f"no lighthouse answers at {lighthouse}: {first_line(error)}; start one there") from error

    def _serve(self, settings: Settings) -> tuple[str, str, int]:
        """On the first rank: the lighthouse, this machine's address as others reach it, and the port of a store."""
        lighthouse = settings.lighthouse
        if lighthouse is None:
            server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=JOIN_TIMEOUT_MS)
            self._servers.append(server)
            lighthouse = f"http://127.0.0.1:{urlsplit(server.address()).port}"
        address = own_address(lighthouse)
        world = find_world() or World()
        if world.local_size < world.size and is_loopback(address):
            if settings.lighthouse is not None:
                raise UserError(
                    f"fault_tolerance.lighthouse {lighthouse} has the address {address} here, by which ranks on other "
                    "machines cannot reach this one: use an address that all machines know"
                )
            address = meeting_point()[0]
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self._servers.append(store)
        return lighthouse, address, store.port

    def _receive(self, snapshot: Snapshot) -> None:
        self._received = snapshot

    def meet(self) -> Snapshot | None:
        """Wait for a quorum; returns the state of the run, for this rank, where the group is behind. Raises
        `NoQuorum`, and `UserError` where that is the state of another run."""
        self._received = None
        try:
            self.manager.start_quorum()
        except (RuntimeError, TimeoutError) as error:
            raise NoQuorum(
                f"the lighthouse at {self.lighthouse} made no quorum in quorum_timeout_s "
                f"{self.settings.quorum_timeout_s}: {first_line(error)}"
            ) from error
        if self._transport.refused is not None:
            raise self._transport.refused
        return self._received

    def close(self) -> None:
        """Leave, and end what was started here."""
        self.manager.shutdown()
        self._group.abort(errored=False)  # others hear of it at once, and wait no longer
        self._end_servers()

    def _end_servers(self) -> None:
        for server in self._servers:
            if isinstance(server, LighthouseServer):
                server.shutdown()
        self._servers.clear()


class TensorTransport(CheckpointTransport[Any]):
    """Sends the state of a run as its bytes, in the order that both sides know: nothing is pickled.

    A length, a header in JSON, an answer, the tensors. The receiver allocates them by its own shapes, and refuses a
    header that announces others, or a run of other settings (`refused`).
    """

    def __init__(self, group: ProcessGroup, state: RunState, device: torch.device) -> None:
        self.group, self.state, self.device = group, state, device
        self.refused: UserError | None = None

    def metadata(self) -> str:
        return ""

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        snapshot: Snapshot = state_dict["user"]["default"]
        header = torch.frombuffer(bytearray(snapshot.header), dtype=torch.uint8)
        for rank in dst_ranks:
            self._send([torch.tensor([len(header)]), header], rank, timeout)
            answer = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._receive(answer, rank, timeout)
            if not answer.item():
                raise RuntimeError("a replica group of other settings came, and was refused")
            self._send(map(as_bytes, snapshot.tensors), rank, timeout)

    def _send(self, parts: Iterable[Tensor], rank: int, timeout: timedelta) -> None:
        for part in parts:
            if part.numel():
                self.group.send([part.to(self.device)], rank, tag=0).wait(timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._receive(length, src_rank, timeout)
        if not 0 < length.item() <= MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length.item()} bytes")
        header = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        self._receive(header, src_rank, timeout)
        text = header.cpu().numpy().tobytes()
        try:
            self.state.check(text)
        except UserError as error:
            self.refused = error
            self._send([torch.tensor([0])], src_rank, timeout)
            raise
        self._send([torch.tensor([1])], src_rank, timeout)
        own = self.state.tensors().values()
        tensors = [torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device) for tensor in own]
        for tensor in tensors:
            if tensor.numel():
                self._receive(as_bytes(tensor), src_rank, timeout)
        snapshot = Snapshot(text, tensors)
        return {"user": {"default": snapshot}, "torchft": {"step": step, "batches_committed": 0}}

    def _receive(self, tensor: Tensor, rank: int, timeout: timedelta) -> None:
        self.group.recv([tensor], rank, tag=0).wait(timeout)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes (n,) of a tensor of any shape; its own where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def own_address(lighthouse: str) -> str:
    """The address of this machine that a lighthouse sees. Raises `UserError` where its name has no address."""
    parts = urlsplit(lighthouse)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing: it chooses the way there
            address = probe.getsockname()[0]
    except (OSError, ValueError) as error:
        raise UserError(f"fault_tolerance.lighthouse {lighthouse} cannot be reached: {error}") from error
    if is_loopback(address) and not is_loopback(parts.hostname or ""):
        raise UserError(
            f"fault_tolerance.lighthouse {lighthouse} has the address {address} here, by which no other machine can "
            "reach this one: state its address, or 127.0.0.1 where all groups are on one machine"
        )
    return address


def is_loopback(address: str) -> bool:
    """Whether an address, or a name, means this machine on each."""
    return address.startswith("127.") or address in ("::1", "localhost")


def first_line(error: Exception) -> str:
    """What an error says, without the rest."""
    return str(error).partition("\n")[0]
