"""The sums of a file, by which a change to it is found, and which several threads can work out side by side.

They are the CRC-32 of each of its stretches of 16 MiB, in order, as eight hexadecimal digits each: `zlib.crc32`.
Layouts 1 and 2 of a checkpoint had a SHA-256 (docs/decisions/0020).
"""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from core.runtime.cores import n_cores

SUM_BYTES = 2**24
"""Bytes of a stretch; the last one may have fewer."""
MOST_THREADS = 4
"""So many threads read files side by side, if there are as many cores."""


class Sum(Protocol):
    """The sum of bytes that come one after another, as `hashlib` has it."""

    def update(self, data: memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


class Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


class Algorithm(NamedTuple):
    """How the sums of a file are worked out."""

    name: str
    """Its name in a manifest."""
    begin: Callable[[], Sum]
    """The sum of a stretch, to be updated."""
    stretch_bytes: int
    hashed: bool
    """Whether the sums of several stretches are stated as the SHA-256 of them all."""

    def stated(self, stretches: Sequence[bytes]) -> str:
        """What a manifest says of a file whose stretches, at least one, have these sums."""
        whole = b"".join(stretches)
        return hashlib.sha256(whole).hexdigest() if self.hashed and len(stretches) > 1 else whole.hex()

    def n_digits(self, n_bytes: int) -> int:
        """Digits of what a manifest says of a file of so many bytes."""
        n_stated = 1 if self.hashed else max(1, -(-n_bytes // self.stretch_bytes))
        return 2 * len(self.begin().digest()) * n_stated


CRC32 = Algorithm("crc32", Crc32, SUM_BYTES, hashed=False)
OF_LAYOUT = {
    1: Algorithm("sha256", hashlib.sha256, 2**63, hashed=True),
    2: Algorithm("sha256", hashlib.sha256, SUM_BYTES, hashed=True),
    3: CRC32,
}
"""The algorithm of each layout of a checkpoint."""


class RunningSums:
    """The sums of bytes that come one after another."""

    def __init__(self, algorithm: Algorithm = CRC32) -> None:
        self._algorithm, self._done = algorithm, list[bytes]()
        self._open, self._room = algorithm.begin(), algorithm.stretch_bytes

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            part, data = data[: self._room], data[self._room :]
            self._open.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._done.append(self._open.digest())
                self._open, self._room = self._algorithm.begin(), self._algorithm.stretch_bytes

    def stated(self) -> str:
        """What a manifest says of them."""
        begun = self._room < self._algorithm.stretch_bytes or not self._done
        return self._algorithm.stated([*self._done, self._open.digest()] if begun else self._done)


def n_threads() -> int:
    """How many threads of this process read, or sum up, files side by side."""
    return min(MOST_THREADS, n_cores())
