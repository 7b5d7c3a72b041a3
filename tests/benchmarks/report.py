"""What the benchmarks that hold figures against references print."""

from __future__ import annotations


class Report:
    """Prints each check as it comes; the exit status tells whether one failed."""

    def __init__(self) -> None:
        self.failed = 0

    def ratio(self, what: str, own: float, reference: float, bound: float) -> None:
        """A check that two figures are within `bound`, a share, of each other."""
        ratio, holds = own / reference, abs(own / reference - 1) <= bound
        self.line(what, f"{own:,.5g}", f"{reference:,.5g}", f"{ratio:.3f} (within {bound:.0%})", holds)

    def line(self, what: str, own: str, reference: str, difference: str, ok: bool) -> None:
        self.failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what:<44} {own:>16} {reference:>16}  {difference}", flush=True)

    def end(self) -> int:
        print(f"{self.failed} failed")
        return 1 if self.failed else 0
