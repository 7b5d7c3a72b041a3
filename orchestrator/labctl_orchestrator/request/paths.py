"""Paths with ~, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

from labctl_slurm.errors import WrongUseError


def expand_home(path: str) -> Path:
    """The path with ~ and ~user expanded. Raises WrongUseError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WrongUseError(f"cannot expand ~ in {path}: {error}", "write the full path") from None


def read_text(kind: str, file: Path, at_most: int) -> tuple[bytes, str]:
    """The content of a text file that a user named, of `at_most` bytes, and its text. `kind`: "prompts file". Raises
    WrongUseError."""
    try:
        with file.open("rb") as opened:
            content = opened.read(at_most + 1)
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError:
        raise WrongUseError(f"{kind} not found: {file}", "correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise WrongUseError(f"cannot read {kind} {file}: {why}", "give a readable UTF-8 file") from None
    if len(content) > at_most:
        size = f"{at_most >> 30} GiB" if at_most >= 2**30 else f"{at_most >> 20} MiB"
        raise WrongUseError(f"{kind} larger than {size}: {file}", "give a smaller file")
    return content, text
