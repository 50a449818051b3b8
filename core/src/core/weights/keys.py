"""The key table of a model family: our names of weights, and where Hugging Face keeps their values. Read both ways.

An entry `"layers.{i}.attention.wq.weight": PLACE` is for all blocks, `{i}` is the number of the block; a place with
`{i-n_layers}` is for those of multi-token prediction alone, which are counted there from 0. The place is

    "model.layers.{i}.self_attn.q_proj.weight"      a tensor
    "model.layers.{i}.mlp.experts.{e}.down.weight"  a tensor for each of our rows, which is an expert
    Stacked("model.layers.{i}.mlp.experts.down")    one for all experts, which need not have our order of axes
    Joined("decoder.layers.linear_qkv", heads="q")  rows of one that holds several of our weights, or all blocks
    (PLACE, ANOTHER)                                either when it is read; the first when it is written
    None                                            none: what Hugging Face does not know
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Half = Literal["first", "second", "even", "odd"]
"""Which rows of a tensor: those of one half, or every other one."""
Heads = Literal["q", "k", "v"]
"""Which rows of a tensor: those of queries, keys or values."""


class Stacked(NamedTuple):
    """A tensor that holds all experts of one of our weights, along axis 0.

    What stands there for one expert is `transposed`, or not, to (rows, columns); a bias is just rows. Of these rows our
    weight is a `half`, or all.
    """

    key: str
    half: Half | None = None
    transposed: bool = False


class Joined(NamedTuple):
    """A tensor that holds the rows of several of our weights, as other programs keep them. It is read, not written."""

    key: str
    heads: Heads | None = None
    """Our rows are those of queries, keys or values, which lie behind one another."""
    grouped: bool = False
    """They do so for each key/value head anew, its queries first."""
    half: Half | None = None
    """Our rows are a half."""
    of_blocks: bool = False
    """All blocks lie along axis 0, and ours is one of them."""
    experts: bool = False
    """Of a block it is all experts, along an axis of their own, and the rows are those of each."""


KeyPlace = str | Stacked | Joined
KeyTable = Mapping[str, KeyPlace | tuple[KeyPlace, ...] | None]


@dataclass(frozen=True, kw_only=True)
class KeyForm:
    """Where each weight of a family is kept in folders of one kind."""

    keys: KeyTable
    """Where each weight is kept."""
    halves: frozenset[str] = frozenset()
    """Those of our names whose rows, head by head, are pairs (0, 1), (2, 3), ... here and halves there."""
    ignored: tuple[str, ...] = ("*rotary_emb.inv_freq",)
    """Keys that are passed over: `*` is anything, `{n_layers+i}` the number of a block that the model does not have."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Keys that repeat the named weight of ours in each block behind the last one, `{n_layers+i}`."""


def places_of(entry: KeyPlace | tuple[KeyPlace, ...] | None) -> list[KeyPlace]:
    """The places that an entry of a key table names."""
    if entry is None:
        return []
    return [entry] if isinstance(entry, str | Stacked | Joined) else list(entry)


def below(ours: str, theirs: str, table: KeyTable) -> KeyTable:
    """The table with both sides one level deeper: `below("layers.{i}", "model.layers.{i}", BLOCK)`."""

    def deeper(place: KeyPlace) -> KeyPlace:
        return f"{theirs}.{place}" if isinstance(place, str) else place._replace(key=f"{theirs}.{place.key}")

    moved = {name: entry and tuple(map(deeper, places_of(entry))) for name, entry in table.items()}
    return {f"{ours}.{name}": entry for name, entry in moved.items()}
