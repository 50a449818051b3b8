"""A preparation that is killed in the middle of what it writes: `python killed_preparation.py SETTINGS PLACE`.

SETTINGS is the JSON of a `Corpus.Config`; PLACE says at which write, flush or move this process kills itself, after
half of what it was to write.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

from core.data import preparation, sections, shards
from core.data.corpus import Corpus
from core.data.split_writer import HashedFile
from core.data.tokenizer import Tokenizer


def main(settings: str, place: int) -> None:
    sections._BATCH_CHARACTERS = 2000
    shards.SHARD_TOKENS, preparation.JOURNAL_BYTES = 3000, 6000
    numbers = count(1)

    def killed(call: Callable[..., Any], *, halves: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if next(numbers) != place:
                return call(*args, **more)
            if halves:
                call(args[0], args[1][: len(args[1]) // 2])
                args[0]._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    HashedFile.write = killed(HashedFile.write, halves=True)
    for name in ("fsync", "replace", "rename"):
        setattr(os, name, killed(getattr(os, name)))
    Corpus.Config(**json.loads(settings)).build(tokenizer=Tokenizer.Config().build())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
