"""Where each weight of a model stands in a folder, piece by piece: as Hugging Face has it, or under our own names."""

import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from core.weights.hf_model import StoredModel, with_hf
from core.weights.keys import Half, Joined, KeyForm, KeyPlace, Stacked, places_of


class KeyPart(NamedTuple):
    """A part of one of our weights, and the part of a stored tensor that has its values."""

    key: str
    row: int | None = None
    """Which row of our weight; None is all of it."""
    stored_row: int | None = None
    """Which row of the stored tensor; None is all of it."""
    half: Half | None = None
    transposed: bool = False
    head_dim: int | None = None
    """Our rows, head by head, are pairs (0, 1), (2, 3), ... and those there are halves."""
    band: "Band | None" = None
    """Our rows are these of the stored ones."""
    n_stored: int | None = None
    """How many rows the stored tensor has of which ours is the `stored_row`; as many as our weight where None."""
    experts: bool = False
    """Both are all experts, of each of which ours is the `half`."""

    def view(self, stored: Tensor) -> Tensor:
        """A view of the stored part, of any shape, that has our values in our order, if not in our shape."""
        if self.transposed:
            stored = stored.mT
        if self.band is not None:
            groups = stored.unflatten(0, (self.band.n_groups, -1))
            stored = groups[:, self.band.first : self.band.last].flatten(0, 1)
        if self.half is not None:
            axis = int(self.experts)
            middle = stored.shape[axis] // 2
            rows = {"first": slice(middle), "second": slice(middle, None), "even": slice(0, None, 2)}
            stored = stored[(*[slice(None)] * axis, rows.get(self.half, slice(1, None, 2)))]
        if self.head_dim is not None:
            stored = stored.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2)
        return stored

    def stored_shape(self, shape: Sequence[int]) -> list[int]:
        """The shape of the stored tensor, for one of our weights of this shape."""
        part = list(shape if self.row is None else shape[1:])
        if self.half is not None:
            part[int(self.experts)] *= 2
        if self.band is not None:
            part[0] = self.band.n_groups * self.band.size
        if self.transposed:
            part.reverse()
        return part if self.stored_row is None else [self.n_stored or shape[0], *part]


class Band(NamedTuple):
    """Of each of so many groups of `size` rows those from `first` to before `last`."""

    n_groups: int
    size: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMap:
    """Where the weights of one model stand in a folder."""

    owner: str
    """Name of the model's class, for messages."""
    weights: dict[str, Tensor]
    """Our weights by name; of those that are one and the same only the first."""
    places: dict[str, list[list[KeyPart]]]
    """The pieces of each weight, in every place that it may have; the first is where it is written."""
    optional: frozenset[str] = frozenset()
    """Our weights that need not be there."""
    repeats: dict[str, str] = field(default_factory=dict)
    """Stored keys, with our weight whose values they must have if they are there."""
    copies: dict[str, str] = field(default_factory=dict)
    """The same for keys that are written, too."""
    ignored: re.Pattern[str] | None = None
    """Stored keys that are passed over, unless a weight has them."""

    def keys(self) -> set[str]:
        """All keys that may be stored."""
        known = {piece.key for places in self.places.values() for pieces in places for piece in pieces}
        return known | self.repeats.keys() | self.copies.keys()

    def without(self, names: Set[str]) -> "KeyMap":
        """The same for a model that does not have these weights."""
        return replace(
            self,
            weights={name: weight for name, weight in self.weights.items() if name not in names},
            places={name: places for name, places in self.places.items() if name not in names},
        )

    def ignores(self, key: str) -> bool:
        """Whether a stored key is passed over."""
        return self.ignored is not None and self.ignored.fullmatch(key) is not None


def own_key_map(model: StoredModel) -> KeyMap:
    """Under our own names; a weight without a place at Hugging Face may be missing."""
    weights, tied = untied(model)
    keys = with_hf(model).hf_form().keys if hasattr(model, "hf_form") else {}
    return KeyMap(
        owner=type(model).__name__,
        weights=weights,
        places={name: [[KeyPart(name)]] for name in weights},
        optional=frozenset(name for name in weights if keys.get(pattern_of(name)[0], "") is None),
        repeats=tied,
    )


def hf_key_map(model: StoredModel) -> KeyMap:
    """As Hugging Face has it, by the key table of the model; raises `KeyError` for a weight that is not in it."""
    return form_key_map(model, with_hf(model).hf_form())


def form_key_map(model: StoredModel, form: KeyForm) -> KeyMap:
    """As folders of this form have it; raises `KeyError` for a weight that is not in its table."""
    weights, tied = untied(model)
    places = {}
    for name, weight in weights.items():
        pattern, number = pattern_of(name)
        head_dim = model.rope_dim() if pattern in form.halves else None
        if found := places_of(form.keys[pattern]):
            n_layers = model.config.n_layers
            fitting = [place for place in found if not number or fits(place, int(number) - n_layers)]
            places[name] = [key_parts(place, number, len(weight), head_dim, model.config) for place in fitting]
    numbers = sorted({pattern_of(found[0][0].key)[1] for found in places.values()} - {""})
    behind = [number for number in numbers if int(number) >= model.config.n_layers]
    return KeyMap(
        owner=type(model).__name__,
        weights={name: weights[name] for name in places},
        places=places,
        repeats={str(place): source for name, source in tied.items() for place in places_of(form.keys[name])},
        copies={k.replace("{n_layers+i}", i): tied.get(name, name) for k, name in form.copies.items() for i in behind},
        ignored=re.compile("|".join(ignored(template, numbers) for template in form.ignored)),
    )


def untied(model: StoredModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a model by name, and the further names of a tied weight with its first name."""
    first: dict[Tensor, str] = {}
    names = ((name, first.setdefault(weight, name)) for name, weight in model.named_parameters(remove_duplicate=False))
    tied = {name: source for name, source in names if name != source}
    return {name: weight for name, weight in model.state_dict().items() if name not in tied}, tied


def pattern_of(name: str) -> tuple[str, str]:
    """A name as a key table has it, with `{i}` for the number of the block, and that number; "" where there is none."""
    number = re.search(r"\.(\d+)\.", name)
    return (name, "") if number is None else (name[: number.start(1)] + "{i}" + name[number.end(1) :], number[1])


def mtp_weights(names: Iterable[str], n_layers: int) -> frozenset[str]:
    """Those of the names of weights that only multi-token prediction has: of the blocks behind the last one."""
    return frozenset(name for name in names if (number := pattern_of(name)[1]) and int(number) >= n_layers)


def fits(place: KeyPlace, ahead: int) -> bool:
    """Whether a weight of a block may be in this place; `ahead` is the number of a block of multi-token prediction
    among those, negative for any other."""
    if "{i-n_layers}" in (place if isinstance(place, str) else place.key):
        return ahead >= 0
    return ahead < 0 or not (isinstance(place, Joined) and place.of_blocks)


def key_parts(
    place: KeyPlace, number: str, n_rows: int, head_dim: int | None = None, config: Any = None
) -> list[KeyPart]:
    """The pieces of one of our weights in this place; `config` is that of the model, which joined weights need."""
    key = (place if isinstance(place, str) else place.key).replace("{i}", number)
    if "{i-n_layers}" in key:
        key = key.replace("{i-n_layers}", str(int(number) - config.n_layers))
    if isinstance(place, Stacked):
        return [KeyPart(key, row, row, place.half, place.transposed) for row in range(n_rows)]
    if isinstance(place, Joined):
        row, n_blocks = (int(number), config.n_layers) if place.of_blocks else (None, None)
        band = heads_band(place, config.attention) if place.heads else None
        rows: Any = {"half": place.half, "experts": place.experts, "head_dim": head_dim, "band": band}
        return [KeyPart(key, stored_row=row, n_stored=n_blocks, **rows)]
    if "{e}" in key:
        return [KeyPart(key.replace("{e}", str(row)), row) for row in range(n_rows)]
    return [KeyPart(key, head_dim=head_dim)]


def heads_band(place: Joined, attention: Any) -> Band:
    """The rows of queries, keys or values of an attention in a tensor that holds all three."""
    n_groups = attention.n_kv_heads if place.grouped else 1
    q, kv = (n // n_groups * attention.head_dim for n in (attention.n_heads, attention.n_kv_heads))
    first, last = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[str(place.heads)]
    return Band(n_groups, q + 2 * kv, first, last)


def ignored(template: str, numbers: list[str]) -> str:
    """The regular expression of keys that a model passes over: `*` is anything, `{i}` the number of a block,
    `{n_layers+i}` that of a block that the model, which has these `numbers`, does not have."""
    meanings = {"{i}": r"\d+", "{n_layers+i}": rf"(?!(?:{'|'.join(numbers)})\.)\d+", "*": ".*"}
    return "".join(meanings.get(part) or re.escape(part) for part in re.split(r"(\{[^}]*\}|\*)", template))
