"""The text form of sampling settings: "greedy", or "temperature=0.7,top_p=0.9,seed=1"."""

from __future__ import annotations

from labctl_slurm.errors import WrongUseError, nearest
from labctl_workers.record import Sampling

GREEDY = "greedy"


def parse(text: str) -> Sampling:
    """Raises WrongUseError for any text but "greedy" and settings with a temperature above 0."""
    if text == GREEDY:
        return Sampling()
    settings: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in ("temperature", "top_p", "seed"):
            known = (GREEDY, "temperature", "top_p", "seed")
            raise WrongUseError(f"sampling {text!r}: unknown key {key!r}", nearest(key, known))
        try:
            settings[key] = int(value) if key == "seed" else float(value)
        except ValueError:
            raise WrongUseError(f"sampling {text!r}: {key} is not a number", f"give a number, as in {key}=1") from None
    temperature, top_p, seed = settings.get("temperature", 1.0), settings.get("top_p", 1.0), settings.get("seed", 0)
    for valid, problem, remedy in (
        (0 < temperature <= 100, "temperature out of range", "give greedy, or a temperature above 0 and at most 100"),
        (0 < top_p <= 1, "top_p out of range", "give a top_p above 0 and at most 1"),
        (0 <= seed < 2**32, "seed out of range", "give a whole number from 0 to 2^32 - 1"),
    ):
        if not valid:
            raise WrongUseError(f"sampling {text!r}: {problem}", remedy)
    return Sampling(temperature=temperature, top_p=top_p, seed=int(seed))


def label(sampling: Sampling) -> str:
    """ "greedy", or the settings in the form of the command line."""
    if sampling.greedy:
        return GREEDY
    return f"temperature={sampling.temperature:g},top_p={sampling.top_p:g},seed={sampling.seed or 0}"
