"""Whether code for given CUDA architectures runs on a GPU."""

from __future__ import annotations

from collections.abc import Iterable


def has_kernels(capability: str, architectures: Iterable[str]) -> bool:
    """Whether a GPU of this compute capability ("9.0") runs code for one of these architectures.

    Machine code (sm_80, sm_100f) runs on the same major version and the same or a later minor one, PTX (compute_80) on all
    later ones, sm_90a and compute_90a only on 9.0. Source: NVIDIA's CUDA programming guide, "Application compatibility" and
    "Family-specific features".
    """
    gpu = tuple(int(part) for part in capability.split("."))
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if kind not in ("sm", "compute") or not digits.isdigit():
            continue
        code = divmod(int(digits), 10)
        if number.endswith("a"):
            fits = code == gpu
        elif kind == "compute" and number == digits:
            fits = code <= gpu
        else:
            fits = code[0] == gpu[0] and code[1] <= gpu[1]
        if fits:
            return True
    return False
