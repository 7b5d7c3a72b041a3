"""Tasks of lm-evaluation-harness: gsm8k, gsm8k:200 of the first 200 questions, or a local task file such as capitals.yaml:50."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import QualityTask

FILES = (".yaml", ".yml")


def parse(text: str) -> QualityTask:
    """ "gsm8k:200" -> the task. Raises WrongUseError for another form, and for an unreadable file."""
    name, colon, limit = text.strip().rpartition(":")
    if not colon:
        name, limit = limit, ""
    if not name or (colon and not (limit.isascii() and limit.isdigit() and int(limit) > 0)):
        raise WrongUseError(
            f"not a task: {text!r}", "write TASK or TASK:N, such as gsm8k:200, or the path of a task file"
        )
    questions = int(limit) if limit else None
    if not name.endswith(FILES):
        return QualityTask(name, questions)
    file = expand_home(name).absolute()
    try:
        content = file.read_text(encoding="utf-8")
        digest = hashlib.sha256()
        for path in sorted({file, *_named(content, file.parent)}):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUseError(f"cannot read task file {file}: {error}", "give a readable UTF-8 file") from None
    own = re.search(r"^(?:task|group):\s*[\"']?([^\s\"'#]+)", content, re.MULTILINE)
    if own is None:
        raise WrongUseError(f"task file has no name: {file}", "add the key task, with a name")
    return QualityTask(own[1], questions, str(file), digest.hexdigest())


def _named(text: str, folder: Path) -> set[Path]:
    """The files of the folder that a task file names: data, included tasks, modules of its functions."""
    modules = [f"{module}.py" for module in re.findall(r"!function\s+(\w+)\.", text)]
    return {path for word in {*re.findall(r"[\w./-]+", text), *modules} if (path := folder / word).is_file()}


def label(tasks: list[QualityTask]) -> str | None:
    """ "gsm8k:200, capitals@0a1b2c3d": the tasks, with digits of the hash of a file; None without one."""
    words = []
    for task in tasks:
        content = f"@{task.sha256[:8]}" if task.sha256 else ""
        words.append(f"{task.name}{content}{f':{task.limit}' if task.limit else ''}")
    return ", ".join(words) or None
