"""The text form of lengths: "1024", "mean=1024,std=100", and pairs of them as "1024/128"."""

from __future__ import annotations

from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Workload
from labctl_workers.workload import TokenLengths

EXAMPLE = "give a number, or mean=1024,std=100,min=1,max=2048, or min=64,max=1024"


def canonical(key: str, text: str | int) -> str:
    """The length in its canonical form. Raises WrongUseError for any other text."""
    try:
        return str(TokenLengths.parse(str(text)))
    except ValueError as error:
        raise WrongUseError(f"invalid {key}: {text}: {error}", EXAMPLE) from None


def pair(text: str) -> tuple[str, str]:
    """Input and output length of "1024/128", each in its canonical form. Raises WrongUseError for any other text."""
    given = text.split("/")
    if len(given) != 2:
        raise WrongUseError(f"invalid lengths: {text}: not input/output", "write 1024/128: input length, output length")
    return canonical("lengths", given[0]), canonical("lengths", given[1])


def longest(text: str) -> int:
    """The largest length of a canonical form."""
    return TokenLengths.parse(text).high


def columns(workload: Workload | None) -> dict[str, int | str | None]:
    """The axes of a workload. Digits of the hash tell datasets of one name apart."""
    if workload is None:
        return dict.fromkeys(("input_len", "output_len", "prefix_len", "dataset", "workload_seed"))
    return {
        "input_len": _value(workload.input_len),
        "output_len": _value(workload.output_len),
        "prefix_len": workload.prefix_len or None,
        "dataset": f"{workload.dataset}@{(workload.sha256 or '')[:8]}" if workload.dataset else None,
        "workload_seed": workload.seed,
    }


def _value(text: str | None) -> int | str | None:
    """A fixed length as a number, so that it sorts and compares as one."""
    return int(text) if text is not None and text.isdigit() else text
