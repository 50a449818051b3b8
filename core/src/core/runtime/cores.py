"""How many cores there are to work on."""

import os


def n_cores() -> int:
    """Cores that this process may use; not every system can restrict a process to some of its cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
