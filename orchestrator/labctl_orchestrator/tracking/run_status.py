"""The status of one run: its state, and the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from labctl_slurm.errors import LabctlError, NoResultsError, NotYetError

DONE, FAILED, CANCELLED, TIMEOUT, REFUSED = "done", "failed", "cancelled", "timeout", "refused"
PENDING, RUNNING, SUBMITTING, UNKNOWN = "pending", "running", "submitting", "unknown"
SUSPENDED = "suspended"
LOST = "lost"  # Slurm lost the job: it will bring no result
SKIPPED = "skipped"  # a load that a search did not need
INTERRUPTED, MISSING = "interrupted", "missing"
FAILURE_STATES = {"cancelled": CANCELLED, "time-limit": TIMEOUT, "not-needed": SKIPPED}
ENDED = frozenset({DONE, FAILED, CANCELLED, TIMEOUT, REFUSED, INTERRUPTED, MISSING, LOST, SKIPPED})
UNSUCCESSFUL = ENDED - {DONE, SKIPPED}
RETRY = "resubmit with labctl retry"
NEWER_RECORD = "newer-record"  # the kind of a run in state UNKNOWN whose record only a newer labctl can read


@dataclass
class RunStatus:
    """One run. `state` is one of this module's, `detail` the reason or the phase in at most 100 characters of labctl's own words,
    `remedy` what to do about a failure or a wait without end. `kind` is the reason for programs (of reasons.toml or of the
    worker), `last_lines` the end of the log where it is unknown.

    `requeues` counts the later starts of the job. A `held` run's job
    waits for its release. `loads_measured`, `loads_to_come` and `loads_unmeasured` count engine loads: with a result, expected
    from `jobs_to_come`, and missing from jobs that ended or were lost (`unmeasured`: their states by id). `lost_turns` are the
    Slurm ids of jobs from which the run was taken."""

    run_id: str
    partition: str
    backend: str
    model: str
    dtype: str
    max_new_tokens: int | None
    batch_size: int | None
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
    held: bool = False
    loads_measured: int = 0
    loads_to_come: int = 0
    loads_unmeasured: int = 0
    jobs_to_come: tuple[str, ...] = ()
    unmeasured: dict[str, str] = field(default_factory=dict)
    lost_turns: tuple[str, ...] = ()
    gpus: int = 0
    parallel: str = ""
    request_rate: float | None = None
    served: bool = False
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    input_len: int | str | None = None
    output_len: int | str | None = None
    prefix_len: int | None = None
    dataset: str | None = None

    @property
    def may_come(self) -> bool:
        """Whether a result may still come without a resubmission."""
        return self.state not in ENDED and self.kind != NEWER_RECORD

    @property
    def sentence(self) -> str:
        """The state and its reason: "cancelled by you (ada)", "failed: no GPU memory left"."""
        if self.detail.startswith(self.state):
            return self.detail
        return f"{self.state}: {self.detail}" if self.detail else self.state

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summary(found: Sequence[RunStatus]) -> str:
    """ "3 runs: 2 done, 1 running"."""
    return summary_of(Counter(run.state for run in found))


def no_results(title: str, missing: Sequence[RunStatus]) -> LabctlError:
    """The error for runs without a result. `missing` is not empty."""
    states = states_of(Counter(run.state for run in missing))
    if any(run.may_come for run in missing):
        return NotYetError(
            f"{title}: no results yet ({states})",
            "follow the runs with labctl status -w, or compare earlier runs with labctl compare --all",
        )
    return NoResultsError(
        f"{title}: all runs ended without a result ({states})", "labctl status shows why; labctl retry resubmits them"
    )


def summary_of(counts: Counter[str]) -> str:
    """`summary` of the number of runs in each state."""
    return f"{counts.total()} run{'s' if counts.total() != 1 else ''}: {states_of(counts) or 'none'}"


def states_of(counts: Counter[str]) -> str:
    """ "2 done, 1 running"."""
    return ", ".join(f"{count} {state}" for state, count in counts.items())
