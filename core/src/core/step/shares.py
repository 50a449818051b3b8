"""Whether ranks can share a model: what its parts say of their axes, against the degrees."""

from collections.abc import Iterator
from operator import attrgetter

from core.config.configurable import owner_of
from core.config.errors import joined
from core.config.fields import Problem, walk
from core.nn.decoder import Decoder
from core.nn.weights import weights
from core.parallel.rules import EVENLY, RULES
from core.parallel.settings import Parallelism


def ranks_that_share(axis: str, parallelism: Parallelism) -> tuple[int, str]:
    """How many ranks share what lies on an axis of weights, and the settings that say so."""
    mesh_axis = RULES.get(axis)
    if mesh_axis is None:
        return 1, ""
    n = getattr(parallelism, f"{mesh_axis}_parallel_degree")
    words = f"{mesh_axis}_parallel_degree {n}"
    context = parallelism.context_parallel_degree
    if axis != "heads" or context == 1 or parallelism.context_parallel_rotate_method != "alltoall":
        return n, words
    return n * context, f"{words} x context_parallel_degree {context} (rotate method alltoall)"


def share_problems(model: Decoder.Config, parallelism: Parallelism) -> Iterator[Problem]:
    """The settings of a model whose numbers its ranks cannot share, as the parts' SIZED_BY name them."""
    for path, config in walk(model, "model"):
        for axis, names in getattr(owner_of(type(config)), "SIZED_BY", {}).items():
            for name in names:
                yield from share_problem(f"{path}.{name}", attrgetter(name)(config), axis, parallelism)


def share_problem(path: str, size: int, axis: str, parallelism: Parallelism) -> Iterator[Problem]:
    """What keeps `size` on an axis from being shared: evenly, by heads and experts; else so that each rank has some."""
    (n, by_degree), name = ranks_that_share(axis, parallelism), path.rpartition(".")[2]
    if axis in EVENLY:
        if size % n:
            fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            yield path, f"{by_degree} must divide {name} {size}: use {fits}"
        return
    each = -(-size // n)
    if each * (n - 1) >= size:
        yield (
            path,
            f"{by_degree} gives {each} of {name} {size} to a rank until none is left, and a rank without any is not "
            "supported: lower the degree",
        )


def check_shares(model: Decoder, parallelism: Parallelism) -> None:
    """Raise `UserError` for weights of a model, without memory still, whose axes its ranks cannot share.

    Parts that state SIZED_BY are told better by their settings, so that nothing is told here beside those.
    """
    if any(share_problems(model.config, parallelism)):
        return
    found: dict[str, Problem] = {}
    for weight in weights(model):
        for axis, size in zip(weight.axes, weight.value.shape, strict=True):
            for path, message in share_problem(f"{weight.name}.{axis}", size, axis, parallelism):
                found.setdefault(message, (path, message))
    if found:
        raise joined(found.values())
