"""Service levels: limits on the latencies of requests, such as ttft<500ms, or ttft_p99<500ms of a percentile."""

from __future__ import annotations

import re
from typing import NamedTuple

from labctl_slurm.errors import WrongUseError

# Each with the column that has it for a request.
LATENCIES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}
_FORM = re.compile(
    r"(?P<latency>[a-z0-9]+?)(?:_p(?P<percent>\d{1,2}(?:\.\d{1,3})?))?\s*<=?\s*(?P<limit>\d{1,9}(?:\.\d{1,9})?)\s*(?P<unit>ms|s)"
)


class ServiceLevel(NamedTuple):
    """A latency of at most `limit_s` seconds: of a request, or with `percent` the percentile of a repeat's requests."""

    latency: str
    limit_s: float
    percent: float | None = None

    def __str__(self) -> str:
        """In the form of `parse`: "ttft_p99<500ms"."""
        of = "" if self.percent is None else f"_p{self.percent:g}"
        limit = f"{1000 * self.limit_s:g}ms" if self.limit_s < 1 else f"{self.limit_s:g}s"
        return f"{self.latency}{of}<{limit}"


def parse(text: str, where: str = "") -> ServiceLevel:
    """ "ttft_p99<500ms" -> the level. Raises WrongUseError for other text; its message begins with `where`."""
    match = _FORM.fullmatch(text.strip())
    if match is None or match["latency"] not in LATENCIES or float(match["limit"]) == 0:
        raise WrongUseError(
            f"{where}not a service level: {text!r}",
            f"give a latency ({', '.join(LATENCIES)}) and a limit with a unit: ttft<2s, or ttft_p99<500ms for a percentile",
        )
    limit_s = float(match["limit"]) / (1000 if match["unit"] == "ms" else 1)
    return ServiceLevel(match["latency"], limit_s, float(match["percent"]) if match["percent"] else None)
