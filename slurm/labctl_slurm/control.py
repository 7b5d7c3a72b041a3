"""Cancel and release jobs, many in one call of scancel or scontrol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from labctl_slurm import command
from labctl_slurm.command import Cluster, NoAnswerError
from labctl_slurm.errors import SlurmError
from labctl_slurm.queue import in_calls

# Errors about jobs that have ended in the meantime.
HARMLESS = ("already completing or completed", "invalid job id")


def cancel(slurm_ids: Iterable[str], cluster: Cluster | None = None) -> None:
    """Cancel these jobs of a cluster ("123" is a job or an array, "123_4" a task). Raises SlurmError."""
    for words in in_calls(compressed(slurm_ids)):
        _run(["scancel", *words], cluster)


def release(slurm_ids: Iterable[str], cluster: Cluster | None = None) -> None:
    """Release held jobs of a cluster. Raises SlurmError."""
    for words in in_calls(compressed(slurm_ids)):
        _run(["scontrol", "release", ",".join(words)], cluster)


def _run(arguments: list[str], cluster: Cluster | None) -> None:
    try:
        done = command.run(arguments, command.CHANGE_WITHIN_S, cluster)
    except NoAnswerError as error:
        raise SlurmError(error.message, AGAIN) from None
    errors = [line for line in done.stderr.splitlines() if not any(words in line.lower() for words in HARMLESS)]
    if errors and done.returncode != 0:
        message = command.error_text("\n".join(errors))
        raise SlurmError(f"{arguments[0]} failed: {message}", AGAIN)


AGAIN = "try again; labctl status shows the jobs that are left"


def compressed(slurm_ids: Iterable[str]) -> list[str]:
    """The ids, with the tasks of each array as one: 4_1, 4_2, 4_3 and 4_7 become "4_[1-3,7]"."""
    tasks: dict[str, list[int]] = {}
    words = []
    for slurm_id in dict.fromkeys(slurm_ids):
        parent, _, task = slurm_id.partition("_")
        if task.isdigit():
            tasks.setdefault(parent, []).append(int(task))
        else:
            words.append(slurm_id)
    return words + [f"{parent}_[{','.join(_ranges(sorted(numbers)))}]" for parent, numbers in tasks.items()]


def _ranges(numbers: list[int]) -> Iterator[str]:
    first = last = numbers[0]
    for number in [*numbers[1:], None]:
        if number == last + 1:
            last = number
            continue
        yield str(first) if first == last else f"{first}-{last}"
        if number is not None:
            first = last = number
