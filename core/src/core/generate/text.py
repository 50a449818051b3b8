"""Token ids to text as they come."""

from collections.abc import Sequence

from core.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"
"""How a tokenizer decodes bytes that are no character yet."""


class Continuation:
    """The text that follows a prompt, in pieces: each token adds the characters that it completes.

    What a token means may hang on the one before, a space at its beginning above all. So a token is decoded behind
    those that gave the last piece, and what these alone give is taken off.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt)
        self.start, self.end = 0, len(self.ids)
        """The ids that gave the last piece."""

    def add(self, token: int) -> str:
        """The piece that this token completes, often none."""
        self.ids.append(token)
        return self._piece(complete=True)

    def finish(self) -> str:
        """What is left: characters that the text broke off in."""
        return self._piece(complete=False)

    def _piece(self, *, complete: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.end])
        text = self.tokenizer.decode(self.ids[self.start :])
        piece = text[len(before) :]
        if not piece or (complete and text.endswith(INCOMPLETE)):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return piece
