"""Render Slurm scripts from templates."""

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
    """The values of a script. `tasks` is the number of tasks of an array (None: a single job), `at_once` how many of them may run
    at a time, `logs` the folder of the job's output, `code` that of the worker's code. A container sees the `folders`."""

    partition: Partition
    job_name: str
    gpus: int
    tasks: int | None
    logs: Path
    code: Path
    own_templates: Path
    at_once: int | None = None
    folders: tuple[Path, ...] = ()

    def worker_command(self, *arguments: str) -> str:
        """The shell command that runs the partition's Python with these arguments, in its container if it has one."""
        variables = {"PYTHONPATH": self._python_path(self.partition.env.get("PYTHONPATH")), "PYTHONUNBUFFERED": "1"}
        words = self.partition.command(arguments, [*self.folders, self.code], variables)
        if self.partition.image is not None:
            words = ["bash", f"{self.code}/labctl_workers/container.sh", self.partition.image.image, *words]
        return shlex.join(words)

    def _python_path(self, before: str | None) -> str:
        return os.pathsep.join(filter(None, (before, str(self.code))))

    def text(self, command: str) -> str:
        """The script that runs `command`. Raises WrongUseError for a missing, invalid or incomplete template."""
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
            where = f"template {error.filename}, line {error.lineno}"
            raise WrongUseError(f"{where}: {error.message}", "correct the line") from None
        except jinja2.TemplateNotFound as error:
            problem = f"template {self._file(name)} uses an unknown template: {error}"
            raise WrongUseError(problem, "correct its name") from None
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            kind = "" if isinstance(error, jinja2.UndefinedError) else f"{type(error).__name__}: "
            problem = f"template {self._file(name)}: {kind}{error}"
            raise WrongUseError(problem, "use the values that docs/templates.md lists") from None
        self._check(text, command, self._file(name))
        return text

    def without_slurm(self, command: str) -> tuple[str, dict[str, str]]:
        """The shell lines and the environment that run `command` on this machine as the script does."""
        environment = {
            **os.environ,
            **self.partition.env,
            "PYTHONUNBUFFERED": "1",
        }
        environment["PYTHONPATH"] = self._python_path(environment.get("PYTHONPATH"))
        setup = [SETUP_CHECK, *self.partition.setup, "trap - ERR"] if self.partition.setup else []
        return "\n".join([*setup, f"exec {command}"]), environment

    def settings(self) -> ScriptSettings:
        """The settings of the script around the worker, for the record."""
        partition = self.partition
        settings = ScriptSettings(
            env={name: without_secrets(value) for name, value in sorted(partition.env.items()) if not is_secret(name)},
            setup=list(map(without_secrets, partition.setup)),
        )
        if partition.executor == "local":
            return settings
        environment = self._environment()
        name = self._template_name(environment)
        resources = partition.resources(self.gpus)
        return replace(
            settings,
            cpus_per_task=resources.cpus,
            mem=partition.mem,
            gpu_option=resources.gpu_words,
            export=partition.export,
            sbatch={key: value for key, value in sorted(partition.sbatch.items()) if key not in WITHOUT_EFFECT},
            template=name,
            template_sha256=_source_sha256(
                _OwnThenShipped(self.own_templates), environment, name + labctl_templates.SUFFIX
            ),
        )

    def _inherited(self) -> dict[str, str]:
        """Variables of the submitting shell that a job with `export = "NONE"` needs."""
        if self.partition.export != "NONE":
            return {}
        return {
            name: os.environ[name] for name in HUB_VARIABLES if name in os.environ and name not in self.partition.env
        }

    def _array(self) -> str | None:
        if self.tasks is None:
            return None
        return f"0-{self.tasks - 1}" + (f"%{self.at_once}" if self.at_once else "")

    def _log(self, kind: str) -> str:
        # submitit's names: %j is the job's id, %A_%a the array's and the task's, 0 the one Slurm task. Slurm reads %% as %.
        identity = "%j" if self.tasks is None else "%A_%a"
        return f"{str(self.logs).replace('%', '%%')}/{identity}_0_log.{kind}"

    def _environment(self) -> jinja2.Environment:
        # Sandboxed: a workspace's templates may come from another user.
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
                f"unknown template of partition {self.partition.name}: {wanted}",
                nearest(wanted, known),
            )
        return wanted or (self.partition.name if self.partition.name in known else "base")

    def _check(self, text: str, command: str, file: str) -> None:
        """Raises WrongUseError for a workspace's template without a part that the job needs on the node."""
        needed = {
            command: "{{ command }}",
            shlex.quote(str(self.code)): "{{ code|q }}",
            sbatch_quoted(self._log("out")): "{{ output|slurm }}",
        }
        if self.tasks is not None:
            needed["#SBATCH --array="] = "#SBATCH --array={{ array }}"
        for part, how in needed.items():
            if part not in text:
                raise WrongUseError(f"template {file} lacks {how}", "add it, or extend base.sbatch.j2")


# Variables of the Hub's client that locate models, none of them a secret: labctl uses them before it submits.
HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")

# Bash runs this trap where a command fails outside a condition. Functions do not inherit it, and it ignores sourced files: the
# line that sources them counts.
SETUP_CHECK = (
    'setup_source="${BASH_SOURCE[*]}"; '
    'trap \'setup_status=$?; [ "${BASH_SOURCE[*]}" != "$setup_source" ] || '
    '{ echo "labctl: setup failed (exit code $setup_status): $BASH_COMMAND" >&2; exit $setup_status; }'
    "' ERR"
)


# Options of sbatch without an effect on measurements: times, mail, priority, accounting keys.
WITHOUT_EFFECT = frozenset((
    "begin", "comment", "deadline", "delay-boot", "dependency", "hold", "kill-on-invalid-dep", "mail-type", "mail-user", "nice",
    "priority", "quiet", "requeue", "no-requeue", "time-min", "verbose", "wckey",
))  # fmt: skip


def _source_sha256(loader: jinja2.BaseLoader, environment: jinja2.Environment, name: str) -> str:
    """SHA-256 of the sources of a template and of all that it extends or includes."""
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


def time_limit_of_script_s(text: str) -> int | None:
    """The time limit in a script, in seconds: a workspace's template may set another one than the partition's. None without."""
    found = _TIME_LINE.findall(text)
    try:
        return seconds(found[-1]) if found else None  # the last one counts
    except ValueError:
        return None


_TIME_LINE = re.compile(r"^#SBATCH\s+(?:--time[=\s]|-t)\s*\"?([^\s\"]+)", re.MULTILINE)


class _OwnThenShipped(jinja2.BaseLoader):
    """The workspace's templates before the shipped ones. A template that extends its own name extends the shipped one."""

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
