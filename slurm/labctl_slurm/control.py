"""Telling Slurm about jobs in its queue, many in one call: cancel them, let held ones go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from labctl_slurm import command
from labctl_slurm.command import Cluster, NoAnswerError
from labctl_slurm.errors import SlurmError
from labctl_slurm.queue import in_calls

# A job that ended in the meantime is as it should be.
HARMLESS = ("already completing or completed", "invalid job id")


def cancel(slurm_ids: Iterable[str], cluster: Cluster | None = None) -> None:
    """Cancel these jobs of a cluster ("123", a whole array too, or "123_4"). Raises SlurmError where Slurm does not answer or
    refuses."""
    for words in in_calls(compressed(slurm_ids)):
        _run(["scancel", *words], "cancel", cluster)


def release(slurm_ids: Iterable[str], cluster: Cluster | None = None) -> None:
    """Let held jobs of a cluster wait for their turn again. Raises SlurmError where Slurm does not answer or refuses."""
    for words in in_calls(compressed(slurm_ids)):
        _run(["scontrol", "release", ",".join(words)], "release", cluster)


def _run(arguments: list[str], what: str, cluster: Cluster | None) -> None:
    try:
        done = command.run(arguments, command.CHANGE_WITHIN_S, cluster)
    except NoAnswerError as error:
        raise SlurmError(error.message, AGAIN) from None
    said = [line for line in done.stderr.splitlines() if not any(words in line.lower() for words in HARMLESS)]
    if said and done.returncode != 0:
        raise SlurmError(f"Slurm did not {what}: {' '.join(' '.join(said).split())}", AGAIN)


AGAIN = "try again; labctl status tells what is left"


def compressed(slurm_ids: Iterable[str]) -> list[str]:
    """The ids with the tasks of each array together: 4_1, 4_2, 4_3 and 4_7 are "4_[1-3,7]"."""
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
