"""The 95% interval of a difference of two means. Its variance is a sum of estimated variances. Pure.

Sources: F. E. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2 (1946), and
B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved", Biometrika 34
(1947), for the degrees of freedom; NIST DLMF 8.17.22 for the incomplete beta function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95
# The 97.5% quantile of the normal distribution; Student's t has a larger one.
NORMAL_975 = 1.959963984540054
# With more degrees of freedom t's quantile equals the normal distribution's to five digits.
MOST_DF = 1e5
# The rounding error of equal values.
ROUNDING = 1e-12
ROUNDING_OF_DF = 1e-6


class Component(NamedTuple):
    """A part of the variance of a difference, and its degrees of freedom (infinite where the variance is assumed)."""

    variance: float
    df: float


class Estimate(NamedTuple):
    """A difference of two means, and its 95% interval (`low`, `high`), None if the spread is unknown."""

    difference: float
    low: float | None = None
    high: float | None = None


def variance(samples: Sequence[float]) -> float:
    """With n - 1; 0 for one sample."""
    n = len(samples)
    if n < 2:
        return 0.0
    mean = math.fsum(samples) / n
    return sum([(sample - mean) ** 2 for sample in samples]) / (n - 1)


def estimate(difference: float, between: Sequence[Component], within: Sequence[Component]) -> Estimate:
    """The interval of a difference whose variance is the sum of these components, between engine loads and within them:

    difference +- t(0.975, df) * sqrt(V), V = sum of v_i, df = V^2 / sum of v_i^2/df_i (Satterthwaite)

    Components within loads add the scatter of repeats that the spread between loads does not contain. The degrees of freedom are
    at most those of the components between loads alone: more would make the interval narrower than without the addition.
    """
    total = sum(part.variance for part in (*between, *within))
    if total <= ROUNDING**2:  # every repeat gave the same
        return Estimate(difference, difference, difference)
    half = t_975(min(satterthwaite([*between, *within]), satterthwaite(between))) * math.sqrt(total)
    return Estimate(difference, difference - half, difference + half)


def satterthwaite(components: Sequence[Component]) -> float:
    """The degrees of freedom of a sum of independent variances; infinite if all are assumed."""
    total = sum(part.variance for part in components)
    uncertainty = sum(part.variance**2 / part.df for part in components)
    return total**2 / uncertainty if uncertainty else math.inf


def t_975(df: float) -> float:
    """The 97.5% quantile of Student's t for `df` >= 1, also fractional.

    Degrees of freedom are rounded down to three digits, from 100 on to two. That never makes an interval too narrow, and many
    rows share a quantile.
    """
    if df > MOST_DF:
        return NORMAL_975
    df = max(1.0, df)
    step = 0.01 if df < 10 else 0.1 if df < 100 else 10.0 ** (math.floor(math.log10(df)) - 1)
    return _t_975(round(math.floor(df / step + ROUNDING_OF_DF) * step, 2))


@functools.lru_cache(maxsize=65536)
def _t_975(df: float) -> float:
    """Newton's method on P(|T| > t) = 0.05. The function is convex and falls, so from the left no step goes too far."""
    log_density = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    t = NORMAL_975
    while True:
        tail = incomplete_beta(df / (df + t * t), df / 2, 0.5)
        density = math.exp(log_density - (df + 1) / 2 * math.log1p(t * t / df))
        step = (tail - (1 - LEVEL)) / (2 * density)
        t += step
        if step < 1e-6 * t:  # the next one would be about 1e-12
            return t


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b) for 0 < x < (a + 1)/(a + b + 2), where its continued fraction converges
    fast: NIST DLMF 8.17.22, by Lentz's method. P(|T| > t) of Student's t is I_{df/(df + t^2)}(df/2, 1/2)."""
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
