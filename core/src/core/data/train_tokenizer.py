"""Trains a SentencePiece tokenizer on any source: `python -m core.data.train_tokenizer --help`.

The bundled model was made, with Python 3.11 and SentencePiece 0.2.3, from the root of the checkout by

    python -m core.data.train_tokenizer --dataset stdlib --vocab-size 2048 --output core/src/core/data/tokenizer.model
"""

import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.config import cli
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.validate import validate
from core.data.bad_lines import OnBadLine
from core.data.dataset import open_source
from core.data.library import library_errors
from core.runtime.log import start_logging

log = logging.getLogger("armature")

_PIECE_CHARACTERS = 4000


class TokenizerTraining(Configurable):
    """Trains a byte-pair model that gives every text back exactly: no normalisation, byte fallback."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dataset: str | list[str] = "stdlib"
        """What to train on: stdlib, files, folders, glob patterns or hf:NAME, as for `--dataloader.dataset`."""
        text_field: str = "text"
        """The field of a .jsonl line or dataset row that holds the text."""
        on_bad_line: OnBadLine = "error"
        """Whether an unreadable line ends the training or is left out."""
        vocab_size: int = 2048
        """Number of tokens, of which 256 are the bytes and 3 the unknown token, bos and eos."""
        text_mb: int = 256
        """Text to train on at most, in millions of characters; it is held in memory. Reading stops there."""
        output: str = "tokenizer.model"
        """The file to write."""

        def problems(self) -> Iterator[tuple[str, str]]:
            """Sizes that give no tokenizer, and a name that the tokenizer would not be known by."""
            if self.vocab_size < 300:
                yield "vocab_size", f"{self.vocab_size} leaves no room beside the 256 bytes: use 300 or more"
            if self.text_mb < 1:
                yield "text_mb", f"must be at least 1, not {self.text_mb}"
            if not self.output.endswith(".model"):
                yield "output", f"{self.output} must end in .model, by which a SentencePiece tokenizer is known"

    def __init__(self, config: Config) -> None:
        validate(config)
        self.config = config
        self.output = Path(os.path.expanduser(config.output))
        if not self.output.parent.is_dir():
            raise UserError(f"cannot write {self.output}: there is no folder {self.output.parent}")
        self.source = open_source(config.dataset, config.text_field, config.on_bad_line)

    def run(self) -> None:
        """Train, and write the model in one piece."""
        model = self._train()
        unfinished = self.output.with_name(f"{self.output.name}.{os.getpid()}")
        try:
            unfinished.write_bytes(model)
            unfinished.replace(self.output)
        except OSError as error:
            raise UserError(f"cannot write {self.output}: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        log.info("%s: %s bytes, %s tokens", self.output, f"{len(model):,}", f"{self.config.vocab_size:,}")

    def _train(self) -> bytes:
        import sentencepiece

        model = io.BytesIO()
        with library_errors(f"{self.source.name} gives no tokenizer of {self.config.vocab_size} tokens"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=self._pieces(),
                model_writer=model,
                model_type="bpe",
                vocab_size=self.config.vocab_size,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                max_sentence_length=4 * _PIECE_CHARACTERS,
                minloglevel=2,
            )
        return model.getvalue()

    def _pieces(self) -> Iterator[str]:
        """The text in pieces that end with a line, so that line ends become part of tokens."""
        room = self.config.text_mb * 1_000_000
        for text, _, _ in self.source.sections():
            start, end = 0, 0
            while end < len(text):
                limit = start + _PIECE_CHARACTERS
                end = limit if limit >= len(text) else text.rfind("\n", start, limit) + 1 or limit
                yield text[start:end]
                start = end
            room -= len(text)
            if room <= 0:
                log.info("%s: trained on its first %s million characters", self.source.name, self.config.text_mb)
                return


if __name__ == "__main__":
    start_logging()
    cli.run(TokenizerTraining.Config())
