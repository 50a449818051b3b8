"""What the tests of core.data share: a tokenizer, a cache that is never the user's, and what was logged."""

import logging
from collections.abc import Iterator

import pytest

from core.data.tokenizer import Tokenizer
from core.runtime.log import log as LOGGER


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.Config().build()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages logged during the test, warnings marked by their level."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(f"{record.levelname}: {record.getMessage()}")

    handler, level = Keep(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield messages
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)
