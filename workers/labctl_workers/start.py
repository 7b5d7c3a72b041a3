"""The entry point of a job: `python -m labctl_workers.start FOLDER`, with the log folder of its job array.

submitit runs a pickled call, and replaces the pickle before a requeue. The worker itself writes the first pickle, from its
JobSpec: a job that sbatch accepted can run even if labctl was killed right after.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from labctl_workers import requeue
from labctl_workers.job import RunJob, exit_by_errno, wait_for
from labctl_workers.record import JobSpec, read_json

MAX_TIMEOUTS = 3  # requeues at the time limit, which submitit counts


def make_pickle(folder: Path) -> None:
    """Write submitit's pickle of this job, unless a requeue already wrote one.

    Raises OSError or ValueError where the JobSpec is not readable.
    """
    from submitit.core.job_environment import JobEnvironment
    from submitit.core.utils import DelayedSubmission, temporary_save_path

    pickle = JobEnvironment().paths.submitted_pickle
    if pickle.exists():
        return
    path = folder.parent / f"{os.environ.get('SLURM_ARRAY_TASK_ID') or 0}.json"
    wait_for(path)
    call = DelayedSubmission(RunJob(), str(path))
    call.set_timeout(-(-JobSpec.from_json(read_json(path)).time_limit_s // 60), MAX_TIMEOUTS)  # in minutes
    with temporary_save_path(pickle) as temporary:
        call.dump(temporary)


def main(arguments: list[str]) -> None:
    from submitit.core.submission import submitit_main

    if len(arguments) != 1:
        sys.exit("usage: python -m labctl_workers.start LOG_FOLDER")
    requeue.find_scontrol()
    folder = Path(arguments[0])
    os.environ["SUBMITIT_FOLDER"] = str(folder)
    try:
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":  # labctl writes the pickle of a local job
            with exit_by_errno():
                make_pickle(folder)
    except FileNotFoundError as error:
        sys.exit(error.strerror)
    submitit_main()


if __name__ == "__main__":
    main(sys.argv[1:])
