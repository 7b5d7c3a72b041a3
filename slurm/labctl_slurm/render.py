"""A job and its partition -> the text of the Slurm script."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import jinja2

import labctl_templates
from labctl_slurm.errors import WrongUseError, nearest
from labctl_slurm.partitions import Partition


@dataclass(frozen=True)
class Script:
    """All that a script needs to know. `tasks` is None for a single job, else the number of tasks of the array;
    `logs` is the folder of the job's output, `code` that of the worker's code."""

    partition: Partition
    job_name: str
    gpus: int
    tasks: int | None
    logs: Path
    code: Path
    own_templates: Path

    def text(self, command: str) -> str:
        """The script that runs `command`. Raises WrongUseError for a template that is missing, broken or incomplete."""
        template = self._template()
        try:
            text = template.render(
                partition=self.partition,
                job_name=self.job_name,
                gpus=self.gpus,
                gres=self.partition.gres(self.gpus),
                array=None if self.tasks is None else f"0-{self.tasks - 1}",
                output=self._log("out"),
                error=self._log("err"),
                code=str(self.code),
                command=command,
            )
        except jinja2.UndefinedError as error:
            raise WrongUseError(
                f"template {template.filename}: {error}", "see docs/templates.md for what it may use"
            ) from None
        self._check(text, command, template)
        return text

    def _log(self, kind: str) -> str:
        # submitit's names for them: %j is the job's id, %A_%a those of an array and its task, 0 the one Slurm task.
        identity = "%j" if self.tasks is None else "%A_%a"
        return f"{self.logs}/{identity}_0_log.{kind}"

    def _template(self) -> jinja2.Template:
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([self.own_templates, labctl_templates.FOLDER]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701  a shell script, not a page: values are quoted by the filter q
        )
        environment.filters["q"] = lambda value: shlex.quote(str(value))
        name = self._template_name(environment)
        try:
            return environment.get_template(name + labctl_templates.SUFFIX)
        except jinja2.TemplateSyntaxError as error:
            raise WrongUseError(
                f"template {error.filename}, line {error.lineno}: {error.message}", "correct it"
            ) from None
        except jinja2.TemplateNotFound as error:
            raise WrongUseError(
                f"template {name!r} extends {error}, which does not exist", "correct its name"
            ) from None

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

    def _check(self, text: str, command: str, template: jinja2.Template) -> None:
        """What a template of one's own may forget, and would be noticed only on the node."""
        needed = {command: "{{ command }}", str(self.code): "{{ code }}", self._log("out"): "{{ output }}"}
        if self.tasks is not None:
            needed["#SBATCH --array="] = "#SBATCH --array={{ array }}"
        for part, how in needed.items():
            if part not in text:
                raise WrongUseError(
                    f"template {template.filename} leaves out {how}", "extend base.sbatch.j2, or put it in"
                )
