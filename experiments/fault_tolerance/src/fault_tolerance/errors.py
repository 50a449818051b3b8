"""What ends an attempt at a step, or a group's part in the run."""

from core.config.errors import UserError


class NotCommitted(Exception):
    """An attempt at a step that a group did not finish: it changed nothing, and is done again."""


class NoQuorum(UserError):
    """Groups did not agree, or their lighthouse did not answer, in `quorum_timeout_s`."""


class RunIsOver(Exception):
    """Nothing is left to train for this group; the message says who ended the run, and is empty where the group itself
    was asked to stop."""
