"""The hash of a file, which several threads can work out side by side.

Of a file of at most 16 MiB it is the SHA-256. Of a larger one it is the SHA-256 of those of its stretches of 16 MiB,
one behind the other in bytes: what `sha256sum` says of such a file is another number.
"""

import hashlib
import os
from collections.abc import Sequence

LEAF_BYTES = 2**24
"""Bytes of a stretch; the last one may have fewer."""
MOST_THREADS = 4
"""So many threads read files side by side, if there are as many cores."""


class TreeHash:
    """The hash of bytes that come one after another."""

    def __init__(self) -> None:
        self._leaves: list[bytes] = []
        self._leaf, self._room = hashlib.sha256(), LEAF_BYTES

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            part, data = data[: self._room], data[self._room :]
            self._leaf.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._leaves.append(self._leaf.digest())
                self._leaf, self._room = hashlib.sha256(), LEAF_BYTES

    def hexdigest(self) -> str:
        open_leaf = [self._leaf.digest()] if self._room < LEAF_BYTES or not self._leaves else []
        return hash_of_leaves([*self._leaves, *open_leaf])


def hash_of_leaves(leaves: Sequence[bytes]) -> str:
    """The hash of a file whose stretches have these hashes; there is one at least."""
    return leaves[0].hex() if len(leaves) == 1 else hashlib.sha256(b"".join(leaves)).hexdigest()


def n_threads() -> int:
    """How many threads of this process read, or hash, files side by side."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))
