"""Paths as a person writes them."""

from __future__ import annotations

from pathlib import Path

from labctl_slurm.errors import WrongUseError


def expand_home(path: str) -> Path:
    """The path, with ~ and ~user replaced. Raises WrongUseError for a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WrongUseError(f"{path}: {error}", "write the path without ~") from None
