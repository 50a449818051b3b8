"""Options that only an older version had, as `Config.upgrade` reads them."""

from collections.abc import Sequence
from typing import Any

from core.config.configurable import Configurable
from core.config.decode import ConfigDecoder
from core.config.errors import joined
from core.config.fields import field_types, walk
from core.config.options import comparable


def apply_older(config: Configurable.Config, flags: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Set what those of the options say that an older version had and this one has not; the others are returned.

    Raises `UserError` for a value that does not fit.
    """
    others = []
    for flag, words in flags:
        section, _, name = comparable(flag).rpartition(".")
        node = dict(walk(config)).get(section)
        data: dict[str, Any] = {name: words[0] if len(words) == 1 else words}
        if node is None or name in field_types(type(node)) or node.upgrade(data, node) == data:
            others.append((flag, words))
            continue
        for part in reversed(section.split(".")) if section else ():
            data = {part: data}
        decoder = ConfigDecoder()
        decoder.onto(config, data)
        if decoder.problems:
            raise joined(decoder.problems)
    return others
