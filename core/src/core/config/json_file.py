"""JSON that somebody else may have written: read with bounds, and checked before anything relies on it.

Every JSON file that a run reads goes through here, so that a damaged or forged one is one line that names the file.
"""

import json
import re
from pathlib import Path
from typing import Any

from core.config.errors import UserError, at_most
from core.config.fields import members, type_problems
from core.config.text_file import decode_utf8, read_bytes, too_long

MOST_JSON_MIB = 64
"""So large may a file be, unless its reader says otherwise."""
DEEPEST = 100
"""So deep may objects and lists be nested."""
MOST_NUMBER_DIGITS = 100
"""So many digits may a whole number have. Hugging Face's tokenizers state 10^30 where they mean no bound."""
MOST_ERROR_LINES = 10
"""So many misfits are listed."""
SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
"""The escape of half a character, which is none unless the other half is beside it."""


def read_json(path: str | Path, most_mib: int = MOST_JSON_MIB) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError`, which names the file, when it cannot be read or holds none."""
    return parse_json(read_bytes(path, most_mib), path, most_mib)


def parse_json(data: bytes | str, name: object, most_mib: int = MOST_JSON_MIB) -> dict[str, Any]:
    """The JSON object that this text, which errors call `name`, stands for.

    Raises `UserError` for anything else: a text that is too long, not UTF-8 (a byte order mark is allowed), not JSON or
    nested too deep, a key that stands twice in one object, a number with too many digits, or half a character.
    """
    if len(data) > most_mib * 2**20:
        raise too_long(name, most_mib)
    text = decode_utf8(data, name) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_int)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(_too_deep(name)) from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    _check(value, name, halves=SURROGATE.search(text) is not None)
    if not isinstance(value, dict):
        raise UserError(f"{name} is no JSON object")
    return value


def typed(value: Any, annotation: Any, name: object) -> Any:
    """The value, which must be of this type, as in `typed(stated, dict[str, list[int]], file)`; `Any` fits all.

    Raises one `UserError` that names all that does not fit.
    """
    if problems := list(type_problems(value, annotation, "")):
        lines = [f"{name}: {path}: {message}" if path else f"{name}: {message}" for path, message in problems]
        raise UserError("\n".join(at_most(MOST_ERROR_LINES, lines)))
    return value


def _check(value: Any, name: object, halves: bool) -> None:
    """Raise a `UserError` where the value is nested too deep, or has half a character in it."""
    level = [value]
    for _ in range(DEEPEST + 1):
        if halves and any(_is_broken(text) for part in level for text in _texts(part)):
            raise UserError(f"{name} has half a character (an escape \\ud800 to \\udfff alone)")
        level = [part for whole in level if isinstance(whole, dict | list) for part in members(whole).values()]
        if not level:
            return
    raise UserError(_too_deep(name))


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _too_deep(name: object) -> str:
    return f"{name} is nested more than {DEEPEST} deep: it is not what it should be"


def _int(digits: str) -> int:
    if len(digits) > MOST_NUMBER_DIGITS:
        raise UserError(
            f"a number has {len(digits):,} digits, at most {MOST_NUMBER_DIGITS} are allowed: {digits[:9]}..."
        )
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the same key twice is a mistake that Python would hide."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"the key {max(keys, key=keys.count)!r} stands twice in one JSON object")
    return data
