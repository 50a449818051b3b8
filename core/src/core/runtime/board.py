"""Messages that every rank reads in the same order, and their answers, kept in a store that all ranks reach."""

import json
import uuid
from typing import Any

import torch.distributed as dist


class Board:
    """Numbered messages, from 1. Every method raises a `RuntimeError` when the store cannot be reached."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def post(self, **message: Any) -> int:
        """Add a message, and return its number."""
        text, number = json.dumps({**message, "id": uuid.uuid4().hex}), 1
        while self.store.compare_set(f"message {number}", "", text).decode() != text:
            number += 1
        return number

    def read(self, number: int) -> dict[str, Any] | None:
        """A message, or None when there is none yet. (To wait for it in the store would print warnings.)"""
        key = f"message {number}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def answer(self, number: int, **answer: Any) -> None:
        """Answer a message."""
        text = json.dumps(answer) + "\n"
        self.store.append(f"answers to {number}", text)  # pyrefly: ignore[missing-attribute] - not in torch's stubs

    def answers(self, number: int) -> list[dict[str, Any]]:
        """All answers that came so far."""
        if not self.store.check([f"answers to {number}"]):
            return []
        return [json.loads(line) for line in self.store.get(f"answers to {number}").decode().splitlines()]
