"""Settings and their sources: flags > LABCTL_* > labctl.toml of the workspace, the user and the site > labctl's defaults."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import platformdirs

from labctl_orchestrator.request import engine_options
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.request import DEFAULT_KEYS, FABLES, Layer, SubmissionSpec, as_list
from labctl_orchestrator.request.tasks import FILES
from labctl_slurm import partitions
from labctl_slurm.errors import WrongUseError, nearest
from labctl_slurm.partitions import Partition
from labctl_workers.record import UnreadableError, read_bytes

TABLES = ("defaults", "partitions")
SHIPPED = "default"
SETTINGS_FILE = "labctl.toml"
SITE_FILE = Path("/etc") / SETTINGS_FILE
# Variables of labctl that are not settings of a submission.
NOT_SETTINGS = ("LABCTL_HOME", "LABCTL_SITE", "LABCTL_DEBUG", "LABCTL_NO_PREFLIGHT")
TYPES = {field.name: field.type for field in msgspec.structs.fields(SubmissionSpec)}


@dataclass
class Settings:
    """(source, table) pairs of the partitions and of a submission's defaults, weakest first."""

    partition_tables: list[tuple[str, Mapping[str, Mapping[str, object]]]] = field(default_factory=list)
    defaults: list[Layer] = field(default_factory=list)

    def names(self) -> list[str]:
        """The names of all partitions, shipped ones first."""
        return list(dict.fromkeys(name for _, tables in self.partition_tables for name in tables))

    def partition(self, name: str, overrides: Mapping[str, object] | None = None) -> Partition:
        """The partition with a submission's overrides. Raises WrongUseError for an unknown name or an invalid value."""
        return partitions.build(name, self.tables_of(name) + ([("flags", overrides)] if overrides else []))

    def tables_of(self, name: str) -> list[Layer]:
        """The (source, table) pairs of one partition. Raises WrongUseError for an unknown name."""
        tables = [(source, tables[name]) for source, tables in self.partition_tables if name in tables]
        if not tables:
            raise WrongUseError(f"unknown partition {name!r}", nearest(name, self.names()))
        return tables

    def explained_defaults(self) -> list[tuple[str, Any, str]]:
        """(key, value, source) of every default of a submission."""
        shipped = msgspec.to_builtins(SubmissionSpec())
        found = {key: (shipped[key], SHIPPED) for key in DEFAULT_KEYS}
        for source, values in self.defaults:
            found.update({key: (value, source) for key, value in values.items()})
        return [(key, value, source) for key, (value, source) in found.items()]

    def explained_partition(self, name: str) -> list[tuple[str, Any, str]]:
        """(key, value, source) of every key of a partition."""
        partition = msgspec.structs.asdict(self.partition(name))
        source_of = {key: source for source, table in self.tables_of(name) for key in table}
        return [(key, partition[key], source_of.get(key, SHIPPED)) for key in partitions.KEYS]


class HasSettings(Protocol):
    """A workspace."""

    @property
    def settings_file(self) -> Path: ...


def load(workspace: HasSettings | None) -> Settings:
    """Read the settings files and LABCTL_* variables. Raises WrongUseError for invalid TOML and unknown keys."""
    settings = Settings([(SHIPPED, partitions.shipped())])
    files = [_site_file(), Path(platformdirs.user_config_dir("labctl")) / SETTINGS_FILE]
    if workspace is not None:
        files.append(workspace.settings_file)
    for file in files:
        if file.exists():
            _add(settings, file)
    settings.defaults += _from_environment()
    return settings


def _site_file() -> Path:
    """The settings file for all users of a site: LABCTL_SITE, else /etc/labctl.toml. Raises WrongUseError if the file that
    LABCTL_SITE names is missing."""
    named = os.environ.get("LABCTL_SITE")
    if not named:
        return SITE_FILE
    if not expand_home(named).exists():
        raise WrongUseError(f"LABCTL_SITE names no file: {named}", "correct LABCTL_SITE or unset it")
    return expand_home(named)


def _add(settings: Settings, file: Path) -> None:
    document = read_toml(file)
    for key in document:
        if key not in TABLES:
            raise WrongUseError(f"{file}: unknown table [{key}]", nearest(key, TABLES))
    for table in TABLES:
        if not isinstance(document.get(table, {}), dict):
            raise WrongUseError(f"{file}: {table} must be a table", f"write [{table}], and its keys below it")
    tables = document.get("partitions", {})
    checked = {name: partitions.check_table(name, table, file) for name, table in tables.items()}
    settings.partition_tables.append((str(file), checked))
    defaults = document.get("defaults", {})
    for key in defaults:
        if key not in DEFAULT_KEYS:
            raise WrongUseError(f"{file}: [defaults] has no key {key!r}", nearest(key, DEFAULT_KEYS))
    if defaults:
        settings.defaults.append((f"{file} [defaults]", defaults))


def _from_environment() -> list[Layer]:
    """LABCTL_DTYPE=float16 is `dtype = "float16"`, LABCTL_SBATCH=qos=high,nice=10 a table. Values get the key's type."""
    found: list[Layer] = []
    for variable, value in sorted(os.environ.items()):
        if not variable.startswith("LABCTL_") or variable.startswith("LABCTL_TEST_") or variable in NOT_SETTINGS:
            continue
        key = variable.removeprefix("LABCTL_").lower()
        if key not in DEFAULT_KEYS:
            known = [f"LABCTL_{name.upper()}" for name in DEFAULT_KEYS] + list(NOT_SETTINGS)
            raise WrongUseError(f"unknown variable {variable}", nearest(variable, known))
        if key in ("engine_options", "sbatch"):
            parse = engine_options.parse_sbatch if key == "sbatch" else engine_options.parse
            found.append((variable, {key: dict(parse(part) for part in value.split(","))}))
            continue
        try:
            found.append((variable, {key: msgspec.convert(as_list(key, value), TYPES[key], strict=False)}))
        except msgspec.ValidationError:  # `build` reports the error
            found.append((variable, {key: value}))
    return found


def request_file(file: str) -> Layer:
    """A submission file: (its name, its keys). Raises WrongUseError for a file that does not exist or is not TOML."""
    if not Path(file).is_file():
        remedy = "correct its path"
        if not file.endswith(".toml"):
            remedy = "give a .toml file; if it is a further value, repeat the flag (--dtype float16 --dtype float32)"
        raise WrongUseError(f"submission file not found: {file}", remedy)
    values = read_toml(Path(file), pipe=True)
    beside = Path(file).parent  # paths are relative to the submission file
    if isinstance(values.get("prompts"), str):
        values["prompts"] = str(beside / expand_home(values["prompts"]))
    if isinstance(values.get("score"), str) and values["score"] != FABLES:
        values["score"] = str(beside / expand_home(values["score"]))
    if isinstance(tasks := as_list("quality", values.get("quality", [])), list) and tasks:
        files = [isinstance(task, str) and task.partition(":")[0].endswith(FILES) for task in tasks]
        paired = zip(tasks, files, strict=True)
        values["quality"] = [str(beside / expand_home(task)) if is_file else task for task, is_file in paired]
    for table in (values, *_tables(values.get("cells")), *_tables(values.get("exclude"))):
        if isinstance(datasets := as_list("dataset", table.get("dataset", [])), list):
            paths = [str(beside / expand_home(path)) if isinstance(path, str) else path for path in datasets]
            table.update({"dataset": paths} if paths else {})
    return file, values


def _tables(value: object) -> list[dict[str, Any]]:
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []


TOML_BYTES_AT_MOST = 16 * 2**20


def read_toml(file: Path, *, pipe: bool = False) -> dict[str, Any]:
    """Read a TOML file, which may be a pipe only with `pipe`. Raises WrongUseError, with the line, for invalid TOML and for an
    unreadable file."""
    try:
        content = file.read_bytes() if pipe else read_bytes(file, TOML_BYTES_AT_MOST)
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors write a byte order mark
    except tomllib.TOMLDecodeError as error:
        remedy = "complete the last line" if "end of document" in str(error) else "correct the line"
        raise WrongUseError(f"{file} is not TOML: {error}", remedy) from None
    except (OSError, UnicodeDecodeError, UnreadableError, RecursionError) as error:
        raise WrongUseError(f"cannot read {file}: {error}", "make it a readable UTF-8 text file") from None
