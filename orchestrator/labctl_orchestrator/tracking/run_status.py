"""Where one run stands: the states, and what is told of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DONE, FAILED, CANCELLED, TIMEOUT, REFUSED = "done", "failed", "cancelled", "timeout", "refused"
PENDING, RUNNING, SUBMITTING, UNKNOWN = "pending", "running", "submitting", "unknown"
SUSPENDED = "suspended"
INTERRUPTED, MISSING = "interrupted", "missing"
FAILURE_STATES = {"cancelled": CANCELLED, "time-limit": TIMEOUT}
ENDED = frozenset({DONE, FAILED, CANCELLED, TIMEOUT, REFUSED, INTERRUPTED, MISSING})
UNSUCCESSFUL = ENDED - {DONE}
RETRY = "labctl retry submits it"


@dataclass
class RunStatus:
    """One run: `state` is one of this module's, `detail` why or what phase, `remedy` what to do where it failed, or waits for
    what never comes; `kind` is the reason for programs (labctl_slurm/reasons.toml, or the worker's own), `last_lines` the log's
    where it is not known; `requeues` is how often Slurm started its job again; a run that is `lost` is unknown, and nothing more
    is to come of its job; the job of one that is `held` waits until it is released. `loads_measured`,
    `loads_to_come` and `loads_unmeasured` are engine loads: with a result, still expected of `jobs_to_come`, and missing from the
    jobs that ended or were lost (`unmeasured`: their ids with their states); `lost_turns` are the Slurm ids of jobs that the run
    was taken from."""

    run_id: str
    partition: str
    backend: str
    model: str
    dtype: str
    max_new_tokens: int
    batch_size: int
    sampling: str
    state: str
    detail: str = ""
    remedy: str = ""
    kind: str = ""
    last_lines: tuple[str, ...] = ()
    slurm_id: str | None = None
    node: str | None = None
    since: str | None = None
    job_id: str | None = None
    requeues: int = 0
    lost: bool = False
    held: bool = False
    loads_measured: int = 0
    loads_to_come: int = 0
    loads_unmeasured: int = 0
    jobs_to_come: tuple[str, ...] = ()
    unmeasured: dict[str, str] = field(default_factory=dict)
    lost_turns: tuple[str, ...] = ()
    gpus: int = 0
    request_rate: float | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def may_come(self) -> bool:
        """Whether a result may yet come without anything being done."""
        return self.state not in ENDED and not self.lost

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summary(found: Sequence[RunStatus]) -> str:
    """ "3 runs: 2 done, 1 running"."""
    return summary_of(Counter(run.state for run in found))


def summary_of(counts: Counter[str]) -> str:
    """`summary`, of how many runs are in each state."""
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{counts.total()} run{'s' if counts.total() != 1 else ''}: {told or 'none'}"
