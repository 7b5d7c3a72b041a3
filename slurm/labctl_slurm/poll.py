"""How often a command that waits queries Slurm."""

from __future__ import annotations

import time
from collections.abc import Iterable

# Seconds between two queries without `poll_s`: most changes come soon after a submission.
AT_FIRST_S, LATER_S, FIRST_MINUTE_S = 1.0, 10.0, 60.0


class Poll:
    """The queries of one command. `poll_s` are the keys of its partitions: the longest counts, None is labctl's default. `asked`:
    the command has just queried Slurm."""

    def __init__(self, poll_s: Iterable[float | None], *, asked: bool = False) -> None:
        self._poll_s = max((least_s for least_s in poll_s if least_s is not None), default=None)
        self._began = time.monotonic()
        self._asked = self._began if asked else None

    def is_due(self) -> bool:
        """Whether the command may query Slurm now; the caller then does."""
        now = time.monotonic()
        default_s = AT_FIRST_S if now - self._began < FIRST_MINUTE_S else LATER_S
        least_s = default_s if self._poll_s is None else self._poll_s
        if self._asked is not None and now - self._asked < least_s:
            return False
        self._asked = now
        return True
