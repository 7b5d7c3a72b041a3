"""Paths with ~."""

from __future__ import annotations

from pathlib import Path

from labctl_slurm.errors import WrongUseError


def expand_home(path: str) -> Path:
    """The path with ~ and ~user expanded. Raises WrongUseError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WrongUseError(f"cannot expand ~ in {path}: {error}", "write the full path") from None
