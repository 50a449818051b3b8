"""Tensors that are spread over ranks, to and from one folder. torch.distributed.checkpoint plans who writes and reads
which piece; each rank's pieces are one safetensors file, and `core.checkpoint.index` says where they stand. Nothing is
pickled."""

import json
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from core.checkpoint.index import NAMES, StoredBox, StoredTensor, index_problems, index_text, key_of, memory, read_piece
from core.checkpoint.manifest import TENSORS, Written
from core.checkpoint.storage import Storage
from core.checkpoint.sums import n_threads
from core.config.errors import at_most
from core.runtime.activity import followed, waiting, working


class WrittenBox(NamedTuple):
    """Where a piece was put, and what the whole file was."""

    file: str
    at: int
    written: Written


def save_tensors(
    tensors: Mapping[str, Tensor], storage: Storage, folder: str, group: ProcessGroup | None
) -> dict[str, Written]:
    """Write tensors of any shape, each rank its pieces, into a folder that is there; returns all files on the first.

    Every rank of `group` must call. Raises the first rank's error of those that failed, on every rank.
    """
    writer = TensorWriter(storage, folder, dist.get_rank(group) if group else 0)
    with waiting(), _as_itself(), _quiet():
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    return writer.files


def load_tensors(
    tensors: Mapping[str, Tensor],
    storage: Storage,
    folder: str,
    index: Mapping[str, StoredTensor],
    group: ProcessGroup | None,
) -> None:
    """Fill tensors of any shape, each rank its pieces, from a folder with this index, whatever ranks wrote it.

    Names and shapes must be there."""
    with waiting(), _as_itself(), _quiet():
        dcp.load(
            dict(tensors),
            storage_reader=TensorReader(storage, folder, index),
            process_group=group,
            no_dist=group is None,
        )


class TensorWriter(StorageWriter):
    """Writes the pieces of a rank as `rank-<number>.safetensors`, and on the first rank `tensors.json`."""

    def __init__(self, storage: Storage, folder: str, rank: int) -> None:
        self.storage, self.folder, self.file = storage, folder, f"rank-{rank:05}.safetensors"
        self.files: dict[str, Written] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    @working("writing tensors")
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, one after another."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        tensors = [cast(Tensor, planner.resolve_data(item)).detach() for item in plan.items]
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + tensor.nbytes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for item, tensor, *offsets in zip(plan.items, tensors, ends[:-1], ends[1:], strict=True):
            index = item.index
            name = key_of(index.fqn, index.offset or ())
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.storage.create(f"{self.folder}/{self.file}") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for tensor in tensors:
                file.write(memory(tensor.cpu().contiguous()))
        written = Written(file.n_bytes, file.sums())
        begin = 8 + len(text)
        done.set_result(
            [
                WriteResult(item.index, tensor.nbytes, WrittenBox(self.file, begin + at, written))
                for item, tensor, at in zip(plan.items, tensors, ends[:-1], strict=True)
            ]
        )
        return done

    @working("writing the index of a checkpoint")
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of what all ranks wrote."""
        places = {result.index: cast(WrittenBox, result.storage_data) for rank in results for result in rank}
        index: dict[str, StoredTensor] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f"{name} is no tensor"
            pieces = []
            for chunk in tensor.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                pieces.append(StoredBox(place.file, place.at, tuple(chunk.offsets), tuple(chunk.sizes)))
            index[name] = StoredTensor(tensor.properties.dtype, tuple(tensor.size), tuple(pieces))
        wrong = index_problems(index, {place.file: place.written.n_bytes for place in places.values()})
        assert not wrong, f"an index that no reader takes: {at_most(5, wrong)}"
        with self.storage.create(f"{self.folder}/{TENSORS}") as file:
            file.write(index_text(index).encode())
        self.files = {place.file: place.written for place in places.values()}
        self.files[TENSORS] = Written(file.n_bytes, file.sums())


class TensorReader(StorageReader):
    """Reads pieces that `TensorWriter` wrote."""

    def __init__(self, storage: Storage, folder: str, index: Mapping[str, StoredTensor]) -> None:
        self.storage, self.folder, self.index = storage, folder, index

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in the words of torch.distributed.checkpoint."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [ChunkStorageMetadata(torch.Size(piece.start), torch.Size(piece.shape)) for piece in stored.pieces],
                )
                for name, stored in self.index.items()
            }
        )

    @working("reading tensors")
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs of each piece, several at a time where the files are on this machine."""
        pieces = {(name, piece.start): piece for name, stored in self.index.items() for piece in stored.pieces}
        items = sorted(plan.items, key=lambda item: (item.storage_index.fqn, item.storage_index.offset))
        targets = [planner.resolve_tensor(item).detach() for item in items]

        def fill(item: ReadItem, target: Tensor) -> None:
            name, start = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            self._fill(target, self.index[name].dtype, pieces[name, start], item)

        with ThreadPoolExecutor(n_threads() if self.storage.is_local else 1, "reading") as pool:
            filled = pool.map(fill, items, targets)
            for _ in followed(targets, lambda target: target.nbytes):
                next(filled)
        for item, target in zip(items, targets, strict=True):
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @torch.no_grad()
    def _fill(self, target: Tensor, dtype: torch.dtype, piece: StoredBox, item: ReadItem) -> None:
        """Copy a box of a piece into a tensor of any shape; a piece that it is goes straight into its memory."""
        same = not target.is_meta and target.device.type == "cpu" and target.is_contiguous() and target.dtype == dtype
        if same and tuple(item.lengths) == piece.shape and target.numel():
            return self.storage.read_into(memory(target), f"{self.folder}/{piece.file}", piece.at)
        values = read_piece(self.storage, self.folder, dtype, piece)
        for dim, (at, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            values = values.narrow(dim, at, length)
        target.copy_(values)


@contextmanager
def _as_itself() -> Iterator[None]:
    """Raise what went wrong on the first rank that failed, not what torch.distributed.checkpoint makes of it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if len(error.failures) > 1 or rank > 0:
            cause.add_note(f"on rank {rank}")
        raise cause from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that there is no process group (torch 2.13), which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
