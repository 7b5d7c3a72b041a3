"""Find the values of a partition's keys that a site accepts, with `sbatch --test-only`. Nothing is queued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from labctl_slurm import diagnose, site
from labctl_slurm.errors import SlurmError
from labctl_slurm.render import Script
from labctl_slurm.resources import ALL_OF_THE_NODE, NONE

# For all partitions of a site together, which spares its controller.
MOST_QUESTIONS = 40
LONGEST_REASON = 200  # characters of a comment
# Kinds of refusals that another form may avoid. An unknown kind may be a rule of the site.
KINDS = ("bad-gres", "memory-form", "no-such-node", "bad-option", diagnose.UNKNOWN)


@dataclass(frozen=True)
class Change:
    """A new value of a partition's key, the earlier one, and Slurm's reason against that."""

    key: str
    value: str
    before: str | int
    reason: str

    @property
    def assignment(self) -> str:
        return f"{self.key} = {json.dumps(self.value)}"


@dataclass(frozen=True)
class Form:
    """Whether Slurm accepts the job with these changes; `message` is its answer to the job without them."""

    accepted: bool
    changes: tuple[Change, ...] = ()
    message: str = ""


class Search:
    """A search for the forms of scripts. The form of one script is tried first for the next."""

    def __init__(self, questions: int = MOST_QUESTIONS) -> None:
        self.questions_left = questions
        self._found: tuple[Change, ...] = ()
        self._refusal = ""

    def of(self, script: Script) -> Form:
        """The form in which Slurm accepts a job of this script: with one change if that is enough. Raises SlurmError where the
        controller does not answer, WrongUseError for a broken template."""
        if self._accepts(script):
            return Form(True, message=self._refusal)
        message = self._refusal
        if diagnose.kind_of_refusal(message) not in KINDS or self._accepts(_smallest(script)):
            return Form(False, message=message)
        if self._found and self._accepts(_with(script, {change.key: change.value for change in self._found})):
            return Form(True, self._found, message)
        changes = self._one_change(script, message) or self._several_changes(script)
        self._found = changes or self._found
        return Form(bool(changes), changes, message)

    def _one_change(self, script: Script, message: str) -> tuple[Change, ...]:
        for key, values in alternatives(script).items():
            for value in values:
                if self._accepts(_with(script, {key: value})):
                    return (Change(key, value, getattr(script.partition, key), message),)
        return ()

    def _several_changes(self, script: Script) -> tuple[Change, ...]:
        """Request only GPUs, in each form; then add the keys one by one, each in the first form that Slurm accepts."""
        others = alternatives(script)
        values: dict[str, str | int] = dict.fromkeys(others, NONE)
        changes = []
        for key, ones in others.items():
            own, reason = getattr(script.partition, key), ""
            for value in (own, *ones):
                if (value == NONE and key != "gpu_request") or self._accepts(_with(script, {**values, key: value})):
                    values[key] = value
                    changes += [Change(key, str(value), own, reason)] if value != own else []
                    break
                reason = reason or self._refusal
            else:
                return ()
        return tuple(changes)

    def _accepts(self, script: Script) -> bool:
        if self.questions_left == 0:
            return False
        self.questions_left -= 1
        trial = site.try_script(replace(script, tasks=None).text("true"), script.partition.cluster)
        self._refusal = trial.message
        return trial.accepted


def alternatives(script: Script) -> dict[str, list[str]]:
    """Other values of the keys in which sites differ, the likeliest first."""
    resources = script.partition.resources(script.gpus)
    sizes = []
    if resources.memory_mib is not None:
        shares = {"gpu": resources.gpus, "cpu": resources.cpus}
        sizes = [f"{int(resources.memory_mib / share)}M per-{per}" for per, share in shares.items() if share]
    values = {
        "gpu_request": ["gres", "gpus-per-node", "gpus"],
        "mem": [NONE, *sizes],
        "cpus_per_task": [NONE],
        "tasks": [NONE],
        "export": ["NONE", NONE],
    }
    return {key: [one for one in ones if one != getattr(script.partition, key)] for key, ones in values.items()}


def _smallest(script: Script) -> Script:
    """The same form with small sizes: if Slurm accepts it, a size was the reason."""
    partition = script.partition
    sizes: dict[str, str | int] = {"cpus_per_task": 1} if isinstance(partition.cpus_per_task, int) else {}
    _, _, per = partition.mem.partition(" per-")
    if partition.mem not in (NONE, ALL_OF_THE_NODE):
        sizes["mem"] = f"100M per-{per}" if per else "100M"
    return replace(_with(script, sizes), gpus=1)


def _with(script: Script, values: Mapping[str, str | int]) -> Script:
    return replace(script, partition=msgspec.structs.replace(script.partition, **values))


# ---------------------------------------------------------------- remedies


def remedy(script: Script, message: str) -> str:
    """The keys to set after Slurm refused the script with this message; "" if no other form helps."""
    name = script.partition.name
    key = (name, script.gpus, message)
    if key not in _remedies:
        _remedies[key] = _remedy(script, message)
    return _remedies[key]


_remedies: dict[tuple[str, int, str], str] = {}  # one search for a thousand refused jobs


def _remedy(script: Script, message: str) -> str:
    if diagnose.kind_of_refusal(message) not in KINDS:
        return ""
    try:
        form = Search().of(script)
    except SlurmError:
        return ""
    if not form.changes:
        return ""
    values = " and ".join(change.assignment for change in form.changes)
    return f"set {values} in [partitions.{script.partition.name}]: Slurm accepts it"


def comments(changes: Sequence[Change]) -> Iterator[str]:
    """Lines of a labctl.toml: each changed key under Slurm's reason."""
    for change in changes:
        yield f"# Slurm refuses {change.key} = {json.dumps(change.before)}: {change.reason[:LONGEST_REASON]}"
        yield change.assignment
