"""Which document is held out and which window is sample i: choices by hash, equal in every process, no list needed."""

from typing import Literal

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_ROUNDS = 6
_WORD = 2**64 - 1


def mix(words: np.ndarray) -> np.ndarray:
    """The words (uint64) scrambled one to one: the output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def held_out(first: int, count: int, fraction: float) -> np.ndarray:
    """Whether each of the documents first, ..., first + count - 1 belongs to validation (bool array).

    A pure function of the document's number. The first document always trains and the second is always held out, so
    that two documents are enough for both splits; all others are held out with probability `fraction`. A fraction of
    0 holds nothing out.
    """
    numbers = np.arange(first, first + count, dtype=np.uint64)
    chosen = (mix(numbers) >> np.uint64(11)) * 2.0**-53 < fraction
    if fraction > 0:
        chosen = (chosen & (numbers != 0)) | (numbers == 1)
    return chosen


def shuffled(index: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The places of `index` (integers in [0, size)) in the order of this seed and epoch: a bijection of [0, size).

    A Feistel network on the smallest even number of bits that holds `size`; a result outside is sent through again
    until it falls inside ("cycle walking", Black and Rogaway 2002), fewer than four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    key = mix(mix(np.array([seed & _WORD], dtype=np.uint64)) + np.uint64(epoch))
    keys = mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64))

    def network(words: np.ndarray) -> np.ndarray:
        left, right = words >> shift, words & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << shift) | right

    places = network(index.astype(np.uint64))
    while (outside := places >= size).any():
        places[outside] = network(places[outside])
    return places.astype(np.int64)
