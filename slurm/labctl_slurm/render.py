"""A job and its partition -> the text of the Slurm script."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

import labctl_templates
from labctl_slurm.errors import WrongUseError, nearest
from labctl_slurm.partitions import Partition, seconds
from labctl_slurm.resources import sbatch_quoted
from labctl_workers.environment import is_secret, without_secrets
from labctl_workers.record import ScriptSettings


@dataclass(frozen=True)
class Script:
    """All that a script needs to know. `tasks` is None for a single job, else the number of tasks of the array, of which
    `at_once` may run at the same time;
    `logs` is the folder of the job's output, `code` that of the worker's code."""

    partition: Partition
    job_name: str
    gpus: int
    tasks: int | None
    logs: Path
    code: Path
    own_templates: Path
    at_once: int | None = None

    def text(self, command: str) -> str:
        """The script that runs `command`. Raises WrongUseError for a template that is missing, broken or incomplete."""
        environment = self._environment()
        name = self._template_name(environment)
        try:
            template = environment.get_template(name + labctl_templates.SUFFIX)
            text = template.render(
                partition=self.partition,
                job_name=self.job_name,
                gpus=self.gpus,
                resources=self.partition.resources(self.gpus).lines(),
                cpus=self.partition.resources(self.gpus).cpus,
                inherited=self._inherited(),
                array=self._array(),
                output=self._log("out"),
                error=self._log("err"),
                code=str(self.code),
                command=command,
                setup_check=SETUP_CHECK,
            )
        except jinja2.TemplateSyntaxError as error:
            raise WrongUseError(
                f"template {error.filename}, line {error.lineno}: {error.message}", "correct it"
            ) from None
        except jinja2.TemplateNotFound as error:
            raise WrongUseError(
                f"template {self._file(name)} uses {error}, which does not exist", "correct its name"
            ) from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            said = f"{type(error).__name__}: {error}" if not isinstance(error, jinja2.UndefinedError) else error
            raise WrongUseError(
                f"template {self._file(name)}: {said}", "see docs/templates.md for what it may use"
            ) from None
        self._check(text, command, self._file(name))
        return text

    def without_slurm(self, command: str) -> tuple[str, dict[str, str]]:
        """The shell lines and the environment in which `command` runs on this machine as the script would run it."""
        environment = {
            **os.environ,
            **self.partition.env,
            "PYTHONPATH": os.pathsep.join(
                filter(None, (self.partition.env.get("PYTHONPATH", os.environ.get("PYTHONPATH")), str(self.code)))
            ),
            "PYTHONUNBUFFERED": "1",
        }
        setup = [SETUP_CHECK, *self.partition.setup, "trap - ERR"] if self.partition.setup else []
        return "\n".join([*setup, f"exec {command}"]), environment

    def settings(self) -> ScriptSettings:
        """What the script sets around the worker, for the record."""
        partition = self.partition
        settings = ScriptSettings(
            env={name: without_secrets(value) for name, value in sorted(partition.env.items()) if not is_secret(name)},
            setup=list(map(without_secrets, partition.setup)),
        )
        if partition.executor == "local":
            return settings
        environment = self._environment()
        name = self._template_name(environment)
        return replace(
            settings,
            cpus_per_task=partition.resources(self.gpus).cpus,
            mem=partition.mem,
            sbatch={key: value for key, value in sorted(partition.sbatch.items()) if key not in WITHOUT_EFFECT},
            template=name,
            template_sha256=_source_sha256(
                _OwnThenShipped(self.own_templates), environment, name + labctl_templates.SUFFIX
            ),
        )

    def _inherited(self) -> dict[str, str]:
        """What a job that gets nothing of the submitting shell's environment needs of it all the same."""
        if self.partition.export != "NONE":
            return {}
        return {name: os.environ[name] for name in OF_THE_HUB if name in os.environ and name not in self.partition.env}

    def _array(self) -> str | None:
        if self.tasks is None:
            return None
        return f"0-{self.tasks - 1}" + (f"%{self.at_once}" if self.at_once else "")

    def _log(self, kind: str) -> str:
        # submitit's names for them: %j is the job's id, %A_%a those of an array and its task, 0 the one Slurm task.
        # A % of the folder's own is doubled, or Slurm would read it as a pattern.
        identity = "%j" if self.tasks is None else "%A_%a"
        return f"{str(self.logs).replace('%', '%%')}/{identity}_0_log.{kind}"

    def _environment(self) -> jinja2.Environment:
        # A workspace's templates may be a colleague's: they make a text, and reach nothing of this process.
        environment = ImmutableSandboxedEnvironment(
            loader=_OwnThenShipped(self.own_templates),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,
        )
        environment.filters["q"] = lambda value: shlex.quote(str(value))
        environment.filters["slurm"] = sbatch_quoted
        return environment

    def _file(self, name: str) -> str:
        own = self.own_templates / f"{name}{labctl_templates.SUFFIX}"
        return str(own if own.is_file() else labctl_templates.FOLDER / own.name)

    def _template_name(self, environment: jinja2.Environment) -> str:
        known = [
            t.removesuffix(labctl_templates.SUFFIX)
            for t in environment.list_templates()
            if t.endswith(labctl_templates.SUFFIX)
        ]
        wanted = self.partition.template
        if wanted and wanted not in known:
            raise WrongUseError(
                f"partition {self.partition.name!r} wants template {wanted!r}, which does not exist",
                nearest(wanted, known),
            )
        return wanted or (self.partition.name if self.partition.name in known else "base")

    def _check(self, text: str, command: str, file: str) -> None:
        """What a template of one's own may forget, and would be noticed only on the node."""
        needed = {
            command: "{{ command }}",
            shlex.quote(str(self.code)): "{{ code|q }}",
            sbatch_quoted(self._log("out")): "{{ output|slurm }}",
        }
        if self.tasks is not None:
            needed["#SBATCH --array="] = "#SBATCH --array={{ array }}"
        for part, how in needed.items():
            if part not in text:
                raise WrongUseError(f"template {file} leaves out {how}", "extend base.sbatch.j2, or put it in")


# Where the hub's client keeps models and asks for them: labctl looks there before it submits. No secret is among them.
OF_THE_HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")

# Bash runs this where a command fails that is no condition. Functions do not inherit it, and what a line sources is left alone:
# the line itself counts.
SETUP_CHECK = (
    'setup_source="${BASH_SOURCE[*]}"; '
    'trap \'setup_status=$?; [ "${BASH_SOURCE[*]}" != "$setup_source" ] || '
    '{ echo "labctl: setup failed (exit code $setup_status): $BASH_COMMAND" >&2; exit $setup_status; }'
    "' ERR"
)


# Options of sbatch that tell who is asked, when, and who is told: no figure depends on them.
WITHOUT_EFFECT = frozenset((
    "begin", "comment", "deadline", "delay-boot", "dependency", "hold", "kill-on-invalid-dep", "mail-type", "mail-user", "nice",
    "priority", "quiet", "requeue", "no-requeue", "time-min", "verbose", "wckey",
))  # fmt: skip


def _source_sha256(loader: jinja2.BaseLoader, environment: jinja2.Environment, name: str) -> str:
    """SHA-256 of the source of a template and of those that it extends or includes."""
    digest, waiting, seen = hashlib.sha256(), [name], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        source = loader.get_source(environment, one)[0]
        digest.update(f"{one}\0{source}\0".encode())
        waiting += filter(None, jinja2.meta.find_referenced_templates(environment.parse(source)))
    return digest.hexdigest()


def time_asked_for_s(text: str) -> int | None:
    """The time limit that a script asks Slurm for, in seconds: a template of one's own may write another than the partition's.
    None where it asks for none."""
    found = _TIME_LINE.findall(text)
    try:
        return seconds(found[-1]) if found else None  # the last one counts
    except ValueError:
        return None


_TIME_LINE = re.compile(r"^#SBATCH\s+(?:--time[=\s]|-t)\s*\"?([^\s\"]+)", re.MULTILINE)


class _OwnThenShipped(jinja2.BaseLoader):
    """The workspace's templates win over the shipped ones; one that extends its own name means the shipped one."""

    def __init__(self, own: Path) -> None:
        self.own = jinja2.FileSystemLoader(own)
        self.shipped = jinja2.FileSystemLoader(labctl_templates.FOLDER)

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, Callable[[], bool] | None]:
        if template.startswith(_SHIPPED):
            return self.shipped.get_source(environment, template.removeprefix(_SHIPPED))
        try:
            source, file, fresh = self.own.get_source(environment, template)
        except jinja2.TemplateNotFound:
            return self.shipped.get_source(environment, template)
        itself = re.compile(r"(\{%-?\s*extends\s+[\"'])" + re.escape(template))
        return itself.sub(lambda found: f"{found[1]}{_SHIPPED}{template}", source), file, fresh

    def list_templates(self) -> list[str]:
        return sorted({*self.own.list_templates(), *self.shipped.list_templates()})


_SHIPPED = "shipped:"
