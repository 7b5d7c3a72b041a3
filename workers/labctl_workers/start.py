"""What a job runs: `python -m labctl_workers.start FOLDER`, where FOLDER is its batch's folder of logs.

submitit runs a pickled call and, when the job is to be requeued, writes the call that goes on in its place. The first pickle
is made here, from the job's own JobSpec: what sbatch has taken can run, whatever became of the labctl that submitted it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from labctl_workers.job import RunJob, files_fail_by_name, wait_for
from labctl_workers.record import JobSpec, read_json

MOST_TIMEOUTS = 3  # how often a job may meet its time limit and be requeued; submitit counts


def spec_of(folder: Path) -> Path:
    """The JobSpec of this job: its task of the array, or 0, in the batch that the logs belong to."""
    return folder.parent / f"{os.environ.get('SLURM_ARRAY_TASK_ID') or 0}.json"


def make_pickle(folder: Path) -> None:
    """Write submitit's pickle of this job, unless there is one: then the job was requeued, and goes on with what that says.

    Raises OSError or ValueError where the JobSpec cannot be read.
    """
    from submitit.core.job_environment import JobEnvironment
    from submitit.core.utils import DelayedSubmission, temporary_save_path

    pickle = JobEnvironment().paths.submitted_pickle
    if pickle.exists():
        return
    path = spec_of(folder)
    wait_for(path)
    call = DelayedSubmission(RunJob(), str(path))
    call.set_timeout(-(-JobSpec.from_json(read_json(path)).time_limit_s // 60), MOST_TIMEOUTS)  # in minutes
    with temporary_save_path(pickle) as temporary:
        call.dump(temporary)


def main(arguments: list[str]) -> None:
    from submitit.core.submission import submitit_main

    if len(arguments) != 1:
        sys.exit("usage: python -m labctl_workers.start FOLDER_OF_THE_BATCHS_LOGS")
    folder = Path(arguments[0])
    os.environ["SUBMITIT_FOLDER"] = str(folder)
    try:
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":  # a local job's comes from labctl
            with files_fail_by_name():
                make_pickle(folder)
    except FileNotFoundError as error:
        sys.exit(error.strerror)
    submitit_main()


if __name__ == "__main__":
    main(sys.argv[1:])
