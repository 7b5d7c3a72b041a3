"""Wait until runs have ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking.refresh import poll_of, refresh
from labctl_orchestrator.tracking.run_status import summary
from labctl_orchestrator.tracking.status import statuses

LOOK_AT_FIRST_EVERY_S, LOOK_AT_LAST_EVERY_S = 0.5, 15.0


def wait(workspace: Workspace, store: Store, run_ids: Sequence[str]) -> set[str]:
    """Wait until every run has ended, and return the set of their states. Prints each change to standard error. The caller has
    just refreshed or submitted the runs."""
    if not run_ids:
        return set()
    shown = ""
    pause_s = LOOK_AT_FIRST_EVERY_S
    queries = poll_of(workspace, store, run_ids, asked=True)
    while True:
        refresh(workspace, store, run_ids, slurm=queries.is_due())
        found = statuses(workspace, store, run_ids)
        now = summary(found)
        if now != shown:
            print(now, file=sys.stderr, flush=True)
            shown, pause_s = now, LOOK_AT_FIRST_EVERY_S
        if not any(run.may_come for run in found):
            return {run.state for run in found}
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, LOOK_AT_LAST_EVERY_S)
