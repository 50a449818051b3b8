"""Completions on standard output: one as it comes, several in the order of their prompts, or lines of JSON."""

import json
import sys
from collections.abc import Sequence
from textwrap import shorten

from core.config.console import lost
from core.data.tokenizer import Tokenizer
from core.generate.text import Continuation


class PrintedText:
    """Hears of every token, and prints. Of several prompts the first streams while the others are kept; when it ends,
    the next one streams from where it is, and so on.

    Raises `OSError` or `UnicodeEncodeError` where standard output does not take the text: it is no message, and is
    printed as it is or not at all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        as_json: bool,
    ) -> None:
        """`prompts` are the ids of `texts`, each of which is followed by at most so many tokens as `limits` says."""
        self.texts, self.limits, self.as_json = texts, limits, as_json
        self._streams = [Continuation(tokenizer, ids) for ids in prompts]
        self._made = ["" for _ in texts]
        self._n_tokens, self._ended = [0 for _ in texts], [False for _ in texts]
        self._shown, self._n_shown = 0, 0
        """The prompt that streams, and how much of its text was printed."""
        self._heading()

    def __call__(self, row: int, token: int | None) -> None:
        """A token of a row, or its end."""
        stream = self._streams[row]
        self._made[row] += stream.finish() if token is None else stream.add(token)
        self._n_tokens[row] += token is not None
        self._ended[row] = token is None
        if self.as_json:
            if token is None:
                self._print(self._record(row) + "\n")
        elif row == self._shown:
            self._stream()

    def _stream(self) -> None:
        """Print what is new of the prompt that streams; behind one that ended, of the next one."""
        while self._shown < len(self.texts):
            text = self._made[self._shown][self._n_shown :]
            self._n_shown += len(text)
            if not self._ended[self._shown]:
                return self._print(text)
            self._print(text + ("\n" if len(self.texts) == 1 else "\n\n"))
            self._shown, self._n_shown = self._shown + 1, 0
            self._heading()

    def _heading(self) -> None:
        if len(self.texts) > 1 and self._shown < len(self.texts) and not self.as_json:
            self._print(f"[{self._shown + 1}] {shorten(self.texts[self._shown], 100)}\n")

    def _record(self, row: int) -> str:
        n_tokens = self._n_tokens[row]
        said = {"number": row + 1, "prompt": self.texts[row], "text": self._made[row], "tokens": n_tokens}
        return json.dumps(said | {"ended": n_tokens < self.limits[row]}, ensure_ascii=False)

    def _print(self, piece: str) -> None:
        if not piece:
            return
        piece.encode(sys.stdout.encoding or "utf-8")
        print(piece, end="", flush=True)
        if (error := lost(sys.stdout)) is not None:
            raise error
