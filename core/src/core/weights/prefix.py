"""The keys of a folder whose model stands one level higher or deeper than in the published ones.

A model that was saved without its head (an embedding model) has no "model." in front of its keys; one that was saved
inside another has that one's name there: "module.model.layers.0...", "model.language_model.layers.0...".
"""

import re
from collections.abc import Iterable

from core.config.errors import UserError, at_most

FIRST_BLOCK = re.compile(r"\w+\.0\.")


def renamed(stored: Iterable[str], known: set[str], place: object) -> dict[str, str]:
    """The known key of every stored key, where all of a model's keys have another beginning than those that are known;
    nothing where they have not.

    Raises `UserError` that names the beginning where other keys stand beside those that have it.
    """
    stored = list(stored)
    wanted = next((key for key in sorted(known) if FIRST_BLOCK.search(key)), None)
    if wanted is None or wanted in stored:
        return {}
    found = FIRST_BLOCK.search(wanted)
    assert found is not None
    ours, tail = wanted[: found.start()], wanted[found.start() :]
    theirs = next((key.removesuffix(tail) for key in sorted(stored) if f".{key}".endswith(f".{tail}")), None)
    if theirs is None or theirs == ours:
        return {}
    if f".{theirs}".endswith(f".{ours}"):
        theirs, ours = theirs.removesuffix(ours), ""
    names = {key: key if key in known else ours + key.removeprefix(theirs) for key in stored}
    others = sorted(key for key in stored if not key.startswith(theirs) and key not in known)
    if others:
        raise UserError(
            f"{place} holds this model inside another: its keys begin with {theirs!r}, and beside them stand "
            f"{', '.join(at_most(2, others))}: save that part alone as a folder"
        )
    return names
