"""Is a difference more than the spread? 95% intervals of a ratio or a difference of two cells, by Welch's t. Pure.

The sources: B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved",
Biometrika 34 (1947), and F. E. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics
Bulletin 2 (1946), for the degrees of freedom; NIST DLMF 8.17.22 for the incomplete beta function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95
# Where a normal distribution has its 97.5%: Student's t has it further out, whatever its degrees of freedom.
NORMAL_975 = 1.959963984540054
DF_STEPS = 100
# What rounding makes of values that are all the same.
ROUNDING = 1e-12
ROUNDING_OF_DF = 1e-6


class Summary(NamedTuple):
    """What is known of the samples of one cell: how many, their mean, and their variance (with n - 1; 0 for one)."""

    n: int
    mean: float
    variance: float


class Estimate(NamedTuple):
    """A difference of two means, and its 95% interval (`low`, `high`); both are None where nothing is known of the spread."""

    difference: float
    low: float | None
    high: float | None

    @property
    def shows_a_difference(self) -> bool:
        """Whether the interval leaves no difference out."""
        return self.low is not None and self.high is not None and (self.low > ROUNDING or self.high < -ROUNDING)


def summary(samples: Sequence[float]) -> Summary:
    """Of at least one sample."""
    n = len(samples)
    mean = sum(samples) / n
    variance = sum([(sample - mean) ** 2 for sample in samples]) / (n - 1) if n > 1 else 0.0
    return Summary(n, mean, variance)


def welch(of: Summary, to: Summary) -> Estimate:
    """The mean of the one less that of the other, with its interval by Welch's t; without one where either has one sample.

    difference +- t(0.975, df) * sqrt(v1/n1 + v2/n2), df = (v1/n1 + v2/n2)^2 / ((v1/n1)^2/(n1-1) + (v2/n2)^2/(n2-1))
    """
    difference = of.mean - to.mean
    if of.n < 2 or to.n < 2:
        return Estimate(difference, None, None)
    one, other = of.variance / of.n, to.variance / to.n
    variance = one + other
    if variance <= ROUNDING**2:  # every repeat gave the same
        return Estimate(difference, difference, difference)
    df = variance**2 / (one**2 / (of.n - 1) + other**2 / (to.n - 1))
    half = t_975(df) * math.sqrt(variance)
    return Estimate(difference, difference - half, difference + half)


def with_one_spread(of: Summary, to: Summary) -> Estimate:
    """As `welch`, where one of the two has a single sample: both are taken to spread as the other does.

    Student's two-sample t with one variance, which here is that of the n samples: difference +- t(0.975, n - 1) *
    sqrt(v * (1 + 1/n)), the interval in which one more sample is to be expected.
    """
    several = of if of.n > to.n else to
    difference = of.mean - to.mean
    if several.n < 2:
        return Estimate(difference, None, None)
    half = t_975(several.n - 1) * math.sqrt(several.variance * (1 + 1 / several.n))
    return Estimate(difference, difference - half, difference + half)


def t_975(df: float) -> float:
    """The 97.5% quantile of Student's t for at least one degree of freedom, which need not be a whole number.

    Degrees of freedom are rounded down to a hundredth: the interval is never too narrow for it, and few are reckoned twice.
    """
    return _t_975(max(DF_STEPS, math.floor(df * DF_STEPS + ROUNDING_OF_DF)))


@functools.lru_cache(maxsize=65536)
def _t_975(hundredths: int) -> float:
    """Newton's method on P(|T| > t) = 0.05. That falls, and ever more slowly, so from the left it never steps too far."""
    df = hundredths / DF_STEPS
    log_density = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    t = NORMAL_975
    while True:
        tail = incomplete_beta(df / (df + t * t), df / 2, 0.5)
        density = math.exp(log_density - (df + 1) / 2 * math.log1p(t * t / df))
        step = (tail - (1 - LEVEL)) / (2 * density)
        t += step
        if step < 1e-6 * t:  # the next one would be some 1e-12
            return t


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b) for 0 < x < (a + 1)/(a + b + 2), where its continued fraction is
    quick: NIST DLMF 8.17.22, by Lentz's method. P(|T| > t) of Student's t is I_{df/(df + t^2)}(df/2, 1/2)."""
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction, c, d = 1.0, 1.0, 0.0
    for term in range(1, 10_000):
        m = term // 2
        if term % 2:
            coefficient = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            coefficient = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + coefficient * d)
        c = 1 + coefficient / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-13:
            break
    return math.exp(log_front) / (a * fraction)
