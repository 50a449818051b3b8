"""Tokenises a corpus ahead of a run: `python -m core.data.prepare --help`."""

from dataclasses import dataclass

from core.config import cli
from core.config.configurable import Configurable
from core.config.validate import validate
from core.data.corpus import Corpus
from core.data.sampling import SPLITS
from core.data.tokenizer import Tokenizer
from core.runtime.log import start_logging


class Preparation(Configurable):
    """Prepares the corpus of a run with the same settings, and says what it holds."""

    @dataclass(kw_only=True, slots=True)
    class Config(Corpus.Config):
        tokenizer: str | None = None
        """A SentencePiece `.model`, a Hugging Face `tokenizer.json` or a folder with one; None is the bundled model."""

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


if __name__ == "__main__":
    start_logging()
    cli.run(Preparation.Config())
