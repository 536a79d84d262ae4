"""Confidence intervals, paired tests and their power, for a few seeds and 10,000 test images.

`values` and `differences` are float[n], one per seed. The `level` of an interval is its coverage
probability, in (0, 1). ValueError is raised if an argument has another shape or dtype, or is empty,
not finite or out of range.
"""

import bisect
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

# Exact up to 2**16 sign patterns, which take 0.4 s and 8 MiB; random patterns above.
_MAX_EXACT_DIFFERENCES = 16
_NUM_RANDOM_PATTERNS = 9_999


class Estimate(NamedTuple):
    """A sample mean with a confidence interval.

    Attributes:
      mean: sample mean.
      std: sample standard deviation (divided by n - 1); nan for one value.
      low: lower end of the interval; nan for one value.
      high: upper end of the interval; nan for one value.
      n: number of values.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int


class McNemar(NamedTuple):
    """Result of McNemar's test.

    Attributes:
      only_a: images that only the first classifies correctly, summed over seeds.
      only_b: images that only the second classifies correctly, summed over seeds.
      p: two-sided p-value, in [0, 1].
    """

    only_a: int
    only_b: int
    p: float


def mean_interval(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Student's t interval of the mean (Student 1908), exact for a normal distribution.

    Example:
      >>> accuracy = mean_interval([0.9209, 0.9189, 0.9178])
      >>> f"{accuracy.mean:.4f}, from {accuracy.low:.4f} to {accuracy.high:.4f}"
      '0.9192, from 0.9153 to 0.9231'
    """
    sample = _check_sample("values", values).tolist()
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1, as in 0.95")
    n = len(sample)
    # In exact arithmetic: the standard deviation of equal values is exactly 0.
    mean, std = statistics.mean(sample), statistics.stdev(sample) if n > 1 else math.nan
    half = stats.t.ppf((1 + level) / 2, n - 1) * std / np.sqrt(n)
    return Estimate(mean, std, float(mean - half), float(mean + half), n)


def prediction_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's t prediction interval of the next value, exact for a normal distribution.

    Returns:
      Lower and upper end; nan for one value.

    Example:
      >>> low, high = prediction_interval([0.918, 0.921, 0.919])
      >>> round(low, 4), round(high, 4)
      (0.9117, 0.9269)
    """
    estimate = mean_interval(values, level)
    half = (estimate.high - estimate.mean) * math.sqrt(estimate.n + 1)
    return estimate.mean - half, estimate.mean + half


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Summarizes values of several seeds for a JSON file.

    Returns:
      The fields of `Estimate`, and `values`. None replaces nan, which JSON does not have.

    Example:
      >>> summarize([0.5, 0.7])["mean"], summarize([0.5])["std"]
      (0.6, None)
    """
    estimate = mean_interval(values)._asdict()
    finite = {name: value if math.isfinite(value) else None for name, value in estimate.items()}
    return {**finite, "values": [float(value) for value in values]}


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided paired permutation test over seeds by sign flips (Fisher 1935).

    If two training methods are equally good, both signs of each difference are equally likely. The
    p-value is the fraction of sign patterns whose sum is at least as far from zero as the observed
    one. It is exact up to n = 16. Above, it is estimated from 9,999 random patterns and the
    observed one, so that it is never 0 (Phipson & Smyth 2010). `seed` is that of the patterns.

    Example:
      >>> sign_flip_test([0.001, 0.004, 0.002, 0.001, 0.003])
      0.0625
    """
    differences = _check_sample("differences", differences)
    n = len(differences)
    if n == 1:  # scipy requires two values
        return 1.0
    # Accuracies are multiples of 1 / images, so sums are often equal up to rounding errors.
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()

    def is_extreme(flipped: np.ndarray, axis: int) -> np.ndarray:
        return (np.abs(flipped.sum(axis=axis)) >= observed).astype(float)

    result = stats.permutation_test(
        (differences,),
        is_extreme,
        permutation_type="samples",
        alternative="greater",
        n_resamples=2**n if n <= _MAX_EXACT_DIFFERENCES else _NUM_RANDOM_PATTERNS,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def smallest_sign_flip_p(n: int) -> float:
    """Smallest p-value of `sign_flip_test` for n seeds; it is above 0.05 for fewer than six.

    Example:
      >>> [smallest_sign_flip_p(n) for n in (1, 3, 5, 6, 20)]
      [1.0, 0.25, 0.0625, 0.03125, 0.0001]
    """
    return 2.0 ** (1 - n) if n <= _MAX_EXACT_DIFFERENCES else 1 / (_NUM_RANDOM_PATTERNS + 1)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Tests whether two classifiers have the same accuracy, given the same images.

    For one seed it is the exact form of McNemar's test (1947). Counts of several seeds are not
    independent, because seeds agree on which images are hard. The test for several seeds is that
    of Durkalski et al. (2003) for clustered data, with one cluster per image: with d the difference
    of the two counts of an image, sum(d)^2 / sum(d^2) follows chi-square with one degree of
    freedom. This normal approximation needs some dozens of images with nonzero d.

    The test generalizes to other images, for these trained networks; `sign_flip_test` generalizes
    to other seeds of the same training.

    Args:
      correct_a: bool[images] or bool[seeds, images], True where the first classifier is right.
      correct_b: the same for the second classifier, in the same shape and order of images.

    Example:
      >>> mcnemar([True, True, True, True, True, False], [False, False, False, False, False, False])
      McNemar(only_a=5, only_b=0, p=0.0625)
    """
    correct_a, correct_b = np.asarray(correct_a), np.asarray(correct_b)
    if not correct_a.dtype == correct_b.dtype == bool:
        raise ValueError(
            f"correct_a is {correct_a.dtype} and correct_b {correct_b.dtype}; both must be bool"
        )
    if correct_a.shape != correct_b.shape or correct_a.ndim not in (1, 2) or correct_a.size == 0:
        raise ValueError(
            f"correct_a has shape {correct_a.shape} and correct_b {correct_b.shape}; both must be "
            "[images] or [seeds, images], of the same shape and not empty"
        )
    correct_a, correct_b = np.atleast_2d(correct_a), np.atleast_2d(correct_b)
    only_a, only_b = int(np.sum(correct_a & ~correct_b)), int(np.sum(correct_b & ~correct_a))
    differences = correct_a.sum(axis=0, dtype=np.int64) - correct_b.sum(axis=0, dtype=np.int64)
    if not differences.any():
        p = 1.0
    elif len(correct_a) == 1:
        p = stats.binomtest(only_a, only_a + only_b).pvalue
    else:
        p = stats.chi2.sf(differences.sum() ** 2 / np.sum(differences**2), df=1)
    return McNemar(only_a, only_b, float(p))


def minimum_detectable_effect(std: float, n: int, level: float = 0.05, power: float = 0.8) -> float:
    """The mean difference that a two-sided paired t test of n seeds detects with the given power.

    It is exact for normally distributed differences. If the test is not significant, a smaller
    difference cannot be ruled out.

    Args:
      std: standard deviation of the differences, at least 0.
      n: number of differences, at least 2.
      level: significance level of the test, in (0, 1); 0.05 and a power of 0.8 are conventional
        (Cohen 1988).
      power: probability of detection, above level and below 1.

    Returns:
      The difference, in the unit of std.

    Example:
      >>> round(minimum_detectable_effect(std=0.002, n=5), 5)
      0.00336
    """
    if not (np.isfinite(std) and std >= 0):
        raise ValueError(f"std is {std}; it must be finite and at least 0")
    if n < 2:
        raise ValueError(f"n is {n}; it must be at least 2")
    if not 0 < level < power < 1:
        raise ValueError(f"level is {level} and power {power}; 0 < level < power < 1 must hold")
    critical = stats.t.isf(level / 2, n - 1) ** 2

    # The squared t statistic follows a noncentral F distribution.
    def missing_power(standard_errors: float) -> float:
        return power - stats.ncf.sf(critical, 1, n - 1, standard_errors**2)

    high = 1.0
    while missing_power(high) > 0:
        high *= 2
    # Not from 0, where scipy's noncentral F is wrong; the power there is the level.
    return float(std / np.sqrt(n) * optimize.brentq(missing_power, 1e-6, high))


def seeds_needed(
    std: float, difference: float, level: float = 0.05, power: float = 0.8
) -> int | None:
    """The number of seeds with which a two-sided paired t test detects a difference.

    Args:
      std: standard deviation of the differences, at least 0.
      difference: mean of the differences, of either sign.
      level: significance level of the test, in (0, 1).
      power: probability of detection, above level and below 1.

    Returns:
      The smallest sufficient number, at least 2, or None if it exceeds 10,000.

    Example:
      >>> seeds_needed(std=0.002, difference=0.001)
      34
    """
    if not np.isfinite(difference):
        raise ValueError(f"difference is {difference}; it must be finite")

    def is_enough(n: int) -> bool:
        return minimum_detectable_effect(std, n, level, power) < abs(difference)

    n = 2 + bisect.bisect_left(range(2, 10_001), True, key=is_enough)
    return n if n <= 10_000 else None


def _check_sample(name: str, values: ArrayLike) -> np.ndarray:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"{name} has shape {sample.shape}; it must be [n] with n at least 1")
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} contains {sample[~np.isfinite(sample)][0]}; all must be finite")
    return sample
