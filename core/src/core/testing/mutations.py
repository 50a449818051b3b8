"""Files that went wrong: bytes that were flipped, cut, doubled or moved, and JSON whose values are others'."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = [0, -1, 1, 2, 2**31, 2**62, 2**63, 2**64, 10**99, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf]
TEXTS = ["", "x", "..", "../x", "/etc/hostname", "\0", "\u0660", "a" * 300, "F32", "I64", "toy", "1", "\n", "{}"]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [{}], {"": None}, [-1], [2**62, 2**62], [0, 2**63], [1.5], ["x"]]
"""Values that stand where another is expected."""


def mutated_bytes(data: bytes, draw: Random) -> bytes:
    """The bytes with one to three things wrong."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at, length = draw.randrange(len(changed) + 1), draw.choice([1, 1, 2, 8, 100])
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = draw.randbytes(length)
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + length] = bytes(length)
    return bytes(changed)


def mutated_json(data: bytes, draw: Random) -> bytes:
    """A JSON text with one to three values, keys or items that are others, or with other bytes."""
    if draw.random() < 0.15:
        return mutated_bytes(data, draw)
    value = json.loads(data)
    for _ in range(draw.randrange(1, 4)):
        places = list(containers(value))
        if not places:
            break
        place = draw.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        kind = draw.randrange(8)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[draw.choice(TEXTS)] = place.pop(key)
        elif kind == 2:
            other = draw.choice(keys)
            place[key], place[other] = place[other], place[key]
        elif kind == 3 and isinstance(place, list):
            place.append(deepcopy(place[key]))
        else:
            place[key] = deepcopy(draw.choice([draw.choice(NUMBERS), draw.choice(TEXTS), draw.choice(OTHERS)]))
    text = json.dumps(value)
    if draw.random() < 0.03:
        text = text.replace(":", ": " + "[" * 2000 + "]" * 2000 + ",", 1)
    return text.encode()


def containers(value: Any) -> Iterator[Any]:
    """The objects and lists in a JSON value that hold something, itself among them."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)
