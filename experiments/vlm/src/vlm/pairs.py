"""Images with a caption each: in Parquet files, in folders, or drawn.

Letters: S pixels of a side, C channels.
"""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.config.errors import UserError
from core.config.json_file import parse_json
from core.config.links import file_in
from core.data.tables import ParquetRows
from vlm.shapes import drawn_pair

SHAPES = "shapes"
METADATA = "metadata.jsonl"


class Pairs(ABC):
    """Pairs of a picture and a text by their numbers, in the order of the files and of what is in them."""

    fingerprint: str
    """Differs wherever a pair may."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pair(self, number: int, size: int) -> tuple[np.ndarray, str]:
        """The picture (S, S, C) uint8 with `size` pixels on each side, and the text."""


class Shapes(Pairs):
    """So many drawn pairs."""

    def __init__(self, n: int) -> None:
        self.n, self.fingerprint = n, hashlib.sha256(f"shapes {n}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.n

    def pair(self, number: int, size: int) -> tuple[np.ndarray, str]:
        return drawn_pair(number, size)


class Parquet(Pairs):
    """The rows of a Parquet file: an image as bytes, or as `datasets` keeps it ({"bytes": ...}), and a text."""

    def __init__(self, path: Path, image: str, text: str) -> None:
        self.rows, self.image, self.text = ParquetRows(path, [image, text]), image, text
        with path.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, number: int, size: int) -> tuple[np.ndarray, str]:
        row, place = self.rows[number], f"{self.rows.path}, row {number + 1}"
        image = row[self.image]
        return decoded(image.get("bytes") if isinstance(image, dict) else image, size, place), text_of(
            row[self.text], place
        )


class Folder(Pairs):
    """The lines of a folder's metadata.jsonl: {"file_name": ..., "text": ...}, as `datasets` has folders of images."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        lines = (folder / METADATA).read_bytes().splitlines()
        self.lines = [parse_json(line, f"{folder / METADATA}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        found = hashlib.sha256()
        for number in range(len(self.lines)):
            found.update(hashlib.sha256(self._image(number).read_bytes()).digest())
        self.fingerprint = hashlib.sha256(found.digest() + b"\n".join(lines)).hexdigest()

    def __len__(self) -> int:
        return len(self.lines)

    def _image(self, number: int) -> Path:
        name = self.lines[number].get("file_name")
        inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        image = file_in(self.folder, name) if inside else None
        if image is None:
            raise UserError(f"{self.folder / METADATA}:{number + 1}: there is no file {name!r} in the folder")
        return image

    def pair(self, number: int, size: int) -> tuple[np.ndarray, str]:
        place = f"{self.folder / METADATA}:{number + 1}"
        image = self._image(number)
        return decoded(image.read_bytes(), size, image), text_of(self.lines[number].get(self.text), place)


class Several(Pairs):
    """Pairs one behind the other."""

    def __init__(self, parts: Sequence[Pairs]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pair(self, number: int, size: int) -> tuple[np.ndarray, str]:
        place = int(np.searchsorted(self.starts, number, "right")) - 1
        return self.parts[place].pair(number - int(self.starts[place]), size)


def open_pairs(words: Sequence[str], image: str, text: str, n_shapes: int) -> Pairs:
    """What these words stand for: "shapes", .parquet files, folders of such, folders with a metadata.jsonl; files of a
    folder in the order of their names. Raises `UserError` for anything else."""
    parts: list[Pairs] = []
    for word in words:
        path = Path(word).expanduser()
        if word == SHAPES:
            parts.append(Shapes(n_shapes))
        elif path.suffix == ".parquet" and path.is_file():
            parts.append(Parquet(path, image, text))
        elif (path / METADATA).is_file():
            parts.append(Folder(path, text))
        elif files := sorted(path.rglob("*.parquet")) if path.is_dir() else []:
            parts += [Parquet(file, image, text) for file in files]
        else:
            raise UserError(f"{word} is no .parquet file, and no folder with such or with a {METADATA}")
    return parts[0] if len(parts) == 1 else Several(parts)


def decoded(content: Any, size: int, place: object) -> np.ndarray:
    """The picture (S, S, C) in the bytes of an image file, resized."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except (UnidentifiedImageError, OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: not an image ({error})") from error


def text_of(value: Any, place: object) -> str:
    """A caption as it stands. Raises `UserError` for what is no text."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: the caption is no text")
    return value
