"""Settings: the shipped partitions, the user's file and the workspace's file, later ones winning key by key."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from labctl_orchestrator.workspace import SETTINGS_FILE, Workspace
from labctl_slurm import partitions
from labctl_slurm.errors import WrongUseError, nearest
from labctl_slurm.partitions import Partition

TABLES = ("partitions",)


@dataclass
class Settings:
    """What applies here. `sources` are (file, its [partitions] table), weakest first."""

    sources: list[tuple[str, Mapping[str, Mapping[str, Any]]]] = field(default_factory=list)

    def names(self) -> list[str]:
        """All partitions, the shipped ones first."""
        return list(dict.fromkeys(name for _, tables in self.sources for name in tables))

    def partition(self, name: str) -> Partition:
        """Raises WrongUseError for an unknown name or a value that cannot be right."""
        tables = [(source, tables[name]) for source, tables in self.sources if name in tables]
        if not tables:
            raise WrongUseError(f"no partition is called {name!r}", nearest(name, self.names()))
        return partitions.build(name, tables)


def load(workspace: Workspace | None) -> Settings:
    """Read the settings files. Raises WrongUseError for a file that is no TOML or has an unknown key."""
    settings = Settings([("shipped", partitions.shipped())])
    files = [Path(platformdirs.user_config_dir("labctl")) / SETTINGS_FILE]
    if workspace is not None:
        files.append(workspace.settings_file)
    for file in files:
        if file.is_file():
            settings.sources.append((str(file), _partitions_in(file)))
    return settings


def _partitions_in(file: Path) -> Mapping[str, Mapping[str, Any]]:
    document = read_toml(file)
    for key in document:
        if key not in TABLES:
            raise WrongUseError(f"{file}: there is no setting {key!r}", nearest(key, TABLES))
    tables = document.get("partitions", {})
    if not isinstance(tables, dict):
        raise WrongUseError(f"{file}: partitions must be a table", "write [partitions.NAME] and its keys below it")
    return {name: partitions.check_table(name, table, file) for name, table in tables.items()}


def read_toml(file: Path) -> dict[str, Any]:
    """Raises WrongUseError, with the line, for a file that is no TOML or cannot be read."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise WrongUseError(f"{file} is not TOML: {error}", "correct it there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUseError(f"{file} cannot be read: {error}", "make it a readable UTF-8 text file") from None
