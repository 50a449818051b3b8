"""The key table of a model family: our names of weights, and where Hugging Face keeps their values. Read both ways.

An entry `"layers.{i}.attention.wq.weight": PLACE` is for all blocks, `{i}` is the number of the block. The place is

    "model.layers.{i}.self_attn.q_proj.weight"      a tensor
    "model.layers.{i}.mlp.experts.{e}.down.weight"  a tensor for each of our rows, which is an expert
    Stacked("model.layers.{i}.mlp.experts.down")    one for all experts, which need not have our order of axes
    (PLACE, ANOTHER)                                either when it is read; the first when it is written
    None                                            none: what Hugging Face does not know
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Half = Literal["first", "second", "even", "odd"]
"""Which rows of a tensor: those of one half, or every other one."""


class Stacked(NamedTuple):
    """A tensor that holds all experts of one of our weights, along axis 0.

    What stands there for one expert is `transposed`, or not, to (rows, columns); a bias is just rows. Of these rows our
    weight is a `half`, or all.
    """

    key: str
    half: Half | None = None
    transposed: bool = False


KeyPlace = str | Stacked
KeyTable = Mapping[str, KeyPlace | tuple[KeyPlace, ...] | None]


def places_of(entry: KeyPlace | tuple[KeyPlace, ...] | None) -> list[KeyPlace]:
    """The places that an entry of a key table names."""
    if entry is None:
        return []
    return [entry] if isinstance(entry, str | Stacked) else list(entry)


def below(ours: str, theirs: str, table: KeyTable) -> KeyTable:
    """The table with both sides one level deeper: `below("layers.{i}", "model.layers.{i}", BLOCK)`."""

    def deeper(place: KeyPlace) -> KeyPlace:
        return f"{theirs}.{place}" if isinstance(place, str) else place._replace(key=f"{theirs}.{place.key}")

    moved = {name: entry and tuple(map(deeper, places_of(entry))) for name, entry in table.items()}
    return {f"{ours}.{name}": entry for name, entry in moved.items()}
