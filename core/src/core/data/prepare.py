"""Tokenises a corpus ahead of a run: `python -m core.data.prepare --help`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.config import cli
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.validate import validate
from core.data.corpus import Corpus
from core.data.megatron import write_megatron
from core.data.sampling import SPLITS
from core.data.tokenizer import Tokenizer
from core.runtime.log import start_logging


class Preparation(Configurable):
    """Prepares the corpus of a run with the same settings, and says what it holds."""

    @dataclass(kw_only=True, slots=True)
    class Config(Corpus.Config):
        tokenizer: str | None = None
        """A SentencePiece `.model`, a Hugging Face `tokenizer.json` or a folder with one; None is the bundled model."""
        output_format: Literal["armature", "megatron"] = "armature"
        """armature is the cache that runs find; megatron writes each split as a .bin and an .idx, too."""
        output: str | None = None
        """Beginning of the names of Megatron's files: PLACE/corpus for PLACE/corpus-train.bin and so on."""

        def problems(self) -> Iterator[tuple[str, str]]:
            yield from super().problems()
            if self.output_format == "megatron" and self.output is None:
                yield "output", "says where Megatron's files go: give the beginning of their names"
            if self.output_format != "megatron" and self.output is not None:
                yield "output", "is of Megatron's files: set output_format to megatron, or leave it out"

    def __init__(self, config: Config) -> None:
        validate(config)
        self.config = config

    def run(self) -> None:
        """Prepare, unless the cache has it, and print where it is and how much."""
        tokenizer = Tokenizer(Tokenizer.Config(path=self.config.tokenizer))
        corpus = Corpus(self.config, tokenizer=tokenizer)
        print(f"{corpus.name} with {tokenizer.description}\n{corpus.folder}")
        for split in SPLITS:
            extent = corpus.manifest.splits[split]
            density = f", {extent.bytes / extent.tokens:.2f} bytes/token" if extent.tokens else ""
            print(f"{split:10}  {extent.documents:,} documents, {extent.tokens:,} tokens{density}")
        if self.config.output is not None:
            self._write_megatron(corpus, Path(os.path.expanduser(self.config.output)), tokenizer.vocab_size)

    @staticmethod
    def _write_megatron(corpus: Corpus, output: Path, vocab_size: int) -> None:
        for split in SPLITS:
            prefix = output.with_name(f"{output.name}-{split}")
            if corpus.manifest.splits[split].documents:
                try:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    write_megatron(corpus.split(split), prefix, vocab_size)
                except OSError as error:
                    raise UserError(f"cannot write {prefix}: {error.strerror}; choose another output") from error
                print(f"{prefix}.bin and .idx")


if __name__ == "__main__":
    start_logging()
    cli.run(Preparation.Config())
