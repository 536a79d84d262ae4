"""What a few seeds and 10,000 test images can tell: intervals, paired tests, and their power."""

import bisect
import math
import statistics
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

# All sign patterns of so many differences are 8 MiB; beyond, random ones.
_EXACT_DIFFERENCES = 16
_RANDOM_PATTERNS = 10_000


class Estimate(NamedTuple):
    """A mean and the interval in which the true one lies.

    Attributes:
      mean: of the values.
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
    """How two classifiers differ on the same images.

    Attributes:
      only_a: images that only the first has right, summed over seeds.
      only_b: images that only the second has right, summed over seeds.
      p: two-sided p value, in [0, 1].
    """

    only_a: int
    only_b: int
    p: float


def mean_interval(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Student's t interval of a mean (Student 1908), exact for values of a normal distribution.

    Args:
      values: float[n], one a seed.
      level: share of such intervals that hold the true mean, in (0, 1).

    Raises:
      ValueError: if values are none, not finite or not in one dimension, or the level is no share.

    Example:
      >>> accuracy = mean_interval([0.9209, 0.9189, 0.9178])
      >>> f"{accuracy.mean:.4f}, from {accuracy.low:.4f} to {accuracy.high:.4f}"
      '0.9192, from 0.9153 to 0.9231'
    """
    values = _sample("values", values)
    _check_share("level", level)
    mean, std = _mean_and_std(values)
    # No degrees of freedom make the quantile nan, as it should be.
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * std / np.sqrt(len(values))
    return Estimate(mean, std, float(mean - half), float(mean + half), len(values))


def prediction_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval in which the next single value lies (Fisher 1935).

    It is wider than that of the mean by the spread of one value; exact for a normal distribution.

    Args:
      values: float[n], one a seed.
      level: share of such intervals that hold the next value, in (0, 1).

    Returns:
      Its ends; nan for one value.

    Raises:
      ValueError: if there is no value, one is not finite, or level is outside its range.

    Example:
      >>> low, high = prediction_interval([0.918, 0.921, 0.919])
      >>> round(low, 4), round(high, 4)
      (0.9117, 0.9269)
    """
    estimate = mean_interval(values, level)
    half = (estimate.high - estimate.mean) * math.sqrt(estimate.n + 1)
    return estimate.mean - half, estimate.mean + half


def bootstrap_interval(values: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """Bootstrap interval of a mean for values of any distribution: BCa (Efron 1987), 9,999 draws.

    Few values make it too narrow: of five normal ones, a 95% interval holds the true mean 84% of
    the time, of twenty 93%; `mean_interval` is the better one there. Equal values give an interval
    of no width.

    Args:
      values: float[n].
      level: share of such intervals that hold the true mean, in (0, 1).
      seed: of the resampling.

    Raises:
      ValueError: if values are none, not finite or not in one dimension, or the level is no share.

    Example:
      >>> estimate = bootstrap_interval(np.arange(100) ** 2)
      >>> estimate.low < estimate.mean < estimate.high
      True
    """
    values = _sample("values", values)
    _check_share("level", level)
    mean, std = _mean_and_std(values)
    if not std > 0:  # BCa is not defined for equal values, nor any resampling for one
        end = mean if std == 0 else float("nan")
        return Estimate(mean, std, end, end, len(values))
    # In standard units: values that differ in their last digits only would be equal after rounding.
    interval = stats.bootstrap(
        ((values - mean) / std,), np.mean, confidence_level=level, rng=np.random.default_rng(seed)
    ).confidence_interval
    low, high = (float(mean + std * end) for end in interval)
    return Estimate(mean, std, low, high, len(values))


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p value of a paired test over seeds (Fisher 1935).

    If two ways to train are equally good, each difference could as well have had the other sign.
    The p value is the share of the sign patterns whose sum is at least as far from zero as the sum
    found: of all 2^n patterns up to n = 16, of 9,999 random ones and the one found beyond. No p
    value is below 2 / 2^n: the smallest is 0.25 for three seeds, 0.0625 for five and 0.03125 for
    six, so that fewer than six seeds never come below 0.05.

    Args:
      differences: float[n], one a seed.
      seed: of the random patterns.

    Returns:
      A number in (0, 1].

    Raises:
      ValueError: if differences are none, not finite or not in one dimension.

    Example:
      >>> sign_flip_test([0.001, 0.004, 0.002, 0.001, 0.003])
      0.0625
    """
    differences = _sample("differences", differences)
    n = len(differences)
    if n <= _EXACT_DIFFERENCES:
        signs = 1.0 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        rng = np.random.default_rng(seed)
        signs = rng.choice([-1.0, 1.0], (_RANDOM_PATTERNS, n))
        signs[0] = 1  # the pattern found, so that p is never 0 (Phipson & Smyth 2010)
    # Accuracies are multiples of 1 / images, so sums are often equal, but for rounding.
    tolerance = 1e-9 * np.abs(differences).sum()
    return float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - tolerance))


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Tests whether two classifiers have the same accuracy, given the same images.

    For one seed it is McNemar's test (1947) in its exact form: of the images that one classifier
    alone has right, either would have half. For several seeds the same image comes again, and
    seeds agree on which images are hard, so that these counts are not independent. Then the test
    is the one of Durkalski et al. (2003) for clusters, each image a cluster: with d the difference
    of both counts of an image, sum(d)^2 / sum(d^2) is compared with chi-square of one degree of
    freedom. It relies on a normal sum, so it needs some dozens of images on which d is not zero.

    Either way the test generalises over images: to these trained networks on other images of the
    same kind. It says nothing about other seeds of the same training; `sign_flip_test` does.

    Args:
      correct_a: bool[images] or bool[seeds, images], True where the first classifier is right.
      correct_b: the same of the second, of the same shape; the images in the same order.

    Raises:
      ValueError: if the arrays are not bool, are empty, or their shapes differ or do not fit.

    Example:
      >>> mcnemar([True, True, True, True, True, False], [False, False, False, False, False, False])
      McNemar(only_a=5, only_b=0, p=0.0625)
    """
    correct_a, correct_b = np.asarray(correct_a), np.asarray(correct_b)
    for name, correct in (("correct_a", correct_a), ("correct_b", correct_b)):
        if correct.dtype != bool:
            raise ValueError(
                f"{name} is {correct.dtype}; it must be bool, True where the prediction is right"
            )
    if correct_a.shape != correct_b.shape or correct_a.ndim not in (1, 2) or correct_a.size == 0:
        raise ValueError(
            f"correct_a is {correct_a.shape} and correct_b {correct_b.shape}; both must be "
            "[images] or [seeds, images], of one shape and not empty"
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


def smallest_difference(std: float, n: int, level: float = 0.05, power: float = 0.8) -> float:
    """The mean of paired differences that so many seeds were able to find.

    Where a test found nothing, a true difference of this size would have been found with this
    power; a smaller one may be there. It is exact for the two-sided paired t test and differences
    of a normal distribution, whose squared t is noncentral F. 0.05 and 0.8 are the customary choice
    (Cohen 1988).

    Args:
      std: standard deviation of the differences, at least 0.
      n: number of differences, at least 2.
      level: of the test, its share of false alarms, in (0, 1).
      power: chance to find the difference, above level and below 1.

    Returns:
      The difference, in the unit of std.

    Raises:
      ValueError: if an argument is outside its range.

    Example:
      >>> round(smallest_difference(std=0.002, n=5), 5)
      0.00336
    """
    if not (np.isfinite(std) and std >= 0):
        raise ValueError(f"std is {std}; it must be a finite number of at least 0")
    if n < 2:
        raise ValueError(f"n is {n}; it takes 2 differences to know how far they spread")
    if not 0 < level < power < 1:
        raise ValueError(
            f"level is {level} and power {power}; it must be that 0 < level < power < 1, as in "
            "0.05 and 0.8"
        )
    critical = stats.t.isf(level / 2, n - 1) ** 2

    def missing(standard_errors: float) -> float:
        return power - stats.ncf.sf(critical, 1, n - 1, standard_errors**2)

    high = 1.0
    while missing(high) > 0:
        high *= 2
    # Scipy's noncentral F is wrong at exactly 0, where the power is the level.
    return float(std / np.sqrt(n) * optimize.brentq(missing, 1e-6, high))


def seeds_needed(
    std: float, difference: float, level: float = 0.05, power: float = 0.8, most: int = 10_000
) -> int | None:
    """How many paired seeds would settle whether a difference is there.

    Args:
      std: standard deviation of the paired differences, at least 0; of a few seeds it is itself
        uncertain, see `variance_interval`.
      difference: mean of the differences, of either sign.
      level: of the two-sided t test, in (0, 1).
      power: chance to find the difference, above level and below 1.
      most: where to stop looking, at least 2.

    Returns:
      The smallest number of seeds, at least 2; None where it is beyond `most`.

    Raises:
      ValueError: if an argument is outside its range.

    Example:
      >>> seeds_needed(std=0.002, difference=0.001)
      34
    """
    if not np.isfinite(difference):
        raise ValueError(f"difference is {difference}; it must be a finite number")
    if most < 2:
        raise ValueError(f"most is {most}; it must be at least 2")

    def enough(n: int) -> bool:
        return smallest_difference(std, n, level, power) < abs(difference)

    counts = range(2, most + 1)
    index = bisect.bisect_left(counts, True, key=enough)
    return counts[index] if index < len(counts) else None


def variance_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Variance of a normal distribution and its interval, by chi-square.

    Unlike that of a mean, it does not hold for other distributions, however many the values.

    Args:
      values: float[n], one a seed.
      level: share of such intervals that hold the true variance, in (0, 1).

    Returns:
      Sample variance (divided by n - 1) and both ends; all nan for one value.

    Raises:
      ValueError: if values are none, not finite or not in one dimension, or the level is no share.

    Example:
      >>> print("{:.2f}, from {:.2f} to {:.2f}".format(*variance_interval([91.9, 92.1, 91.8])))
      0.02, from 0.01 to 0.92
    """
    values = _sample("values", values)
    _check_share("level", level)
    variance = _mean_and_std(values)[1] ** 2
    freedom = len(values) - 1
    low, high = freedom * variance / stats.chi2.isf([(1 - level) / 2, (1 + level) / 2], freedom)
    return variance, float(low), float(high)


def _sample(name: str, values: ArrayLike) -> np.ndarray:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"{name} has shape {sample.shape}; it must be [n] with n of at least 1")
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} holds {sample[~np.isfinite(sample)][0]}; all must be finite")
    return sample


def _mean_and_std(sample: np.ndarray) -> tuple[float, float]:
    """Without rounding on the way: equal values have a standard deviation of exactly 0."""
    values = sample.tolist()
    std = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), std


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} is {share}; it must be above 0 and below 1, as in 0.95")
