"""The 95% interval of a ratio of sums over documents, by a bootstrap. Pure.

Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), section 12.5 (the bootstrap-t interval) and chapter 8
(paired data: the documents are drawn, each with both runs' values). The standard error of the ratio is that of its linearisation:
W. Cochran, "Sampling Techniques" (1977), section 6.3.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from labctl_orchestrator.analysis.intervals import ROUNDING, Estimate

# With fewer, too many draws have one document alone.
FEWEST_DOCUMENTS = 10
DRAWS = 2000
# More documents are summed in so many groups, one document after another to each: as many values give as good an interval.
MOST_GROUPS = 200


class _DocumentTotals(NamedTuple):
    """Sums over documents with value v and weight w: of v, w, v*v, v*w, w*w."""

    v: float
    w: float
    vv: float
    vw: float
    ww: float

    @property
    def ratio(self) -> float:
        return self.v / self.w

    def error(self, n: int) -> float:
        """The standard error of the ratio of n documents."""
        residuals = self.vv - 2 * self.ratio * self.vw + self.ratio**2 * self.ww
        return math.sqrt(max(0.0, residuals) * n / (n - 1)) / self.w


@functools.lru_cache(maxsize=1024)
def ratio_of_sums(values: tuple[float, ...], weights: tuple[int, ...]) -> Estimate:
    """sum(values) / sum(weights), with its interval over documents; without one for fewer than FEWEST_DOCUMENTS with a weight.
    The draws are the same at each call."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    items = [
        tuple(map(math.fsum, zip(*known[first::MOST_GROUPS], strict=True)))
        for first in range(min(len(known), MOST_GROUPS))
    ]
    n = len(items)
    if n == 0:
        return Estimate(0.0)
    products = [_DocumentTotals(v, w, v * v, v * w, w * w) for v, w in items]
    whole = _sum(products)
    if n < FEWEST_DOCUMENTS:
        return Estimate(whole.ratio)
    error = whole.error(n)
    if error <= ROUNDING * max(1.0, abs(whole.ratio)):  # each document gives the same
        return Estimate(whole.ratio, whole.ratio, whole.ratio)
    draw = random.Random(n)  # noqa: S311  no secret
    studentized = []
    for _ in range(DRAWS):
        drawn = _sum(draw.choices(products, k=n))
        of_draw = drawn.error(n)
        if of_draw > 0:
            studentized.append((drawn.ratio - whole.ratio) / of_draw)
    studentized.sort()
    tail = round(0.025 * len(studentized))
    return Estimate(whole.ratio, whole.ratio - error * studentized[-1 - tail], whole.ratio - error * studentized[tail])


def _sum(products: Sequence[_DocumentTotals]) -> _DocumentTotals:
    return _DocumentTotals(*map(sum, zip(*products, strict=True)))
