"""Calibration: how well predicted probabilities match observed frequencies.

`logits` are float[n, num_classes] and `labels` int[n] with values in [0, num_classes). ValueError
is raised if shapes do not match, logits are not finite or a value is out of range.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize
from scipy.special import softmax

from fmnist_jax.analysis.scores import check_predictions, log_losses

# Published networks need temperatures between 0.5 and 5 (Guo et al. 2017; Minderer et al. 2021).
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 100.0


class Reliability(NamedTuple):
    """Confidence and accuracy of the examples in each confidence bin.

    Attributes:
      confidence: float64[bins], mean top probability; nan in an empty bin.
      accuracy: float64[bins], fraction; nan in an empty bin.
      num_examples: int64[bins].
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    num_examples: np.ndarray


class RiskCoverage(NamedTuple):
    """Error rate of the most confident predictions, by coverage.

    Attributes:
      coverage: float64[n], fraction of the examples that are kept: 1 / n, 2 / n, ..., 1.
      risk: float64[n], error rate among them.
    """

    coverage: np.ndarray
    risk: np.ndarray


def summarize(predictions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Summarizes the calibration of a network for a JSON file.

    Args:
      predictions: `logits` and `labels` of the test images, and optionally `val_logits` and
        `val_labels` of the validation images.

    Returns:
      `ece` and its 95% interval, `ece_low` and `ece_high`; `aurc`; and the `temperature` fitted on
      the validation images, with the `ece_scaled` and `loss_scaled` that it gives on the test
      images. The last three are None if validation images are missing or do not determine a
      temperature, as when all are classified correctly.

    Example:
      >>> summarize({"logits": np.log([[0.5, 0.5]] * 2), "labels": np.array([0, 1])})["ece"]
      0.0
    """
    logits, labels = predictions["logits"].astype(np.float64), predictions["labels"]
    low, high = calibration_interval(logits, labels)
    result: dict[str, Any] = {
        "ece": expected_calibration_error(logits, labels),
        "ece_low": low,
        "ece_high": high,
        "aurc": area_under_risk_coverage(logits, labels),
    } | dict.fromkeys(("temperature", "ece_scaled", "loss_scaled"))
    if len(predictions.get("val_labels", ())):
        temperature = fit_temperature(predictions["val_logits"], predictions["val_labels"])
        if _MIN_TEMPERATURE < temperature < _MAX_TEMPERATURE:
            scaled = logits / temperature
            result["temperature"] = temperature
            result["ece_scaled"] = expected_calibration_error(scaled, labels)
            result["loss_scaled"] = float(log_losses(scaled, labels).mean())
    return result


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of the top label (ECE, Guo et al. 2017).

    Examples are binned by their top probability into bins of equal width, 15 as in Guo et al. The
    error, in [0, 1], is the mean over examples of the distance between mean top probability and
    accuracy of their bin. It has two biases: over- and underconfidence within a bin cancel, and
    noise increases the distance of every bin. Perfect probabilities of 10,000 examples have an
    error of about 0.01.

    Example:
      >>> logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
      >>> round(expected_calibration_error(logits, [0, 0, 1, 0]), 3)  # (0.9 to 1 + 0.8 to 0.5) / 2
      0.2
    """
    bin_of, confidence, correct = _binned(logits, labels, bins)
    gaps = confidence - correct
    return float(np.abs(np.bincount(bin_of, gaps)).sum() / len(gaps))


def calibration_interval(
    logits: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    level: float = 0.95,
    seed: int = 0,
    draws: int = 1000,
) -> tuple[float, float]:
    """Confidence interval of the expected calibration error, by test inversion (Carpenter 1999).

    Noise biases a binned calibration error upwards, and resampling adds the same bias again, so
    that a percentile interval lies above the true error. Instead, assume that the true gaps of the
    bins are t times the measured ones, with the noise of resampled images. The lower end is the
    error of the t for which the measured error is in the upper tail, the upper end that for which
    it is in the lower tail. The lower end is 0 if perfect probabilities (t = 0) often have an error
    as large as the measured one (Broecker & Smith 2007). A measured error that is mostly noise can
    lie above its interval. Bins without mistakes contribute no noise.

    In simulations with 1,000 and 10,000 images and true errors from 0 to 0.2, 89% to 98% of the 95%
    intervals contained the true binned error. For perfect probabilities 96% to 98% did, no
    percentile interval did, and half of the reflected intervals did. Only the lower end is a bound
    on the error without bins, because gaps that cancel within a bin are not detected (Kumar et al.
    2019).

    Args:
      logits: float[n, num_classes].
      labels: int[n], values in [0, num_classes).
      bins: number of bins.
      level: coverage probability for the true binned error, in (0, 1).
      seed: seed of the resampling.
      draws: number of resampled sets of images, at least 2 / (1 - level).

    Returns:
      Lower and upper end, in [0, 1].

    Example:
      >>> logits = np.tile([3.0, 0.0], (1000, 1))  # a probability of 95%
      >>> labels = np.repeat([0, 1], [900, 100])  # an accuracy of 90%
      >>> error = expected_calibration_error(logits, labels)
      >>> low, high = calibration_interval(logits, labels)
      >>> print(f"{error:.3f}, from {low:.3f} to {high:.3f}")
      0.053, from 0.033 to 0.071
    """
    bin_of, confidence, correct = _binned(logits, labels, bins)
    gaps = confidence - correct
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1, as in 0.95")
    if draws * (1 - level) < 2:
        raise ValueError(
            f"draws is {draws}; a level of {level} needs at least {2 / (1 - level):.0f}"
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
    """Confidence and accuracy by bin, for a reliability diagram (Guo et al. 2017).

    Bins have equal width. Each includes its right edge, and the first also 0.

    Example:
      >>> logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
      >>> reliability(logits, [0, 0, 1, 0], bins=5).num_examples.tolist()
      [0, 0, 0, 2, 2]
    """
    bin_of, confidence, correct = _binned(logits, labels, bins)
    num_examples = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bin_of, values, bins)
        return np.divide(sums, num_examples, out=np.full(bins, np.nan), where=num_examples > 0)

    return Reliability(mean(confidence), mean(correct), num_examples)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Fits the temperature T that minimizes the cross-entropy of logits / T (Guo et al. 2017).

    Fit it on a validation split and apply it to the test images; predictions do not change. T
    above 1 means that the network is overconfident.

    Returns:
      T, clipped to [0.01, 100]. It is 0.01 if all predictions are correct, and 100 if the logits
      are worse than uniform ones.

    Example:
      >>> logits = np.log([[0.75, 0.25]] * 4)
      >>> labels = [0, 0, 0, 1]  # with these frequencies
      >>> f"{fit_temperature(logits, labels):.4f}, {fit_temperature(3 * logits, labels):.4f}"
      '1.0000, 3.0000'
    """
    logits, labels = check_predictions(logits, labels)
    # Relative to the label's logit, so that small errors of confident predictions are not rounded.
    logits = logits - logits[np.arange(len(labels)), labels][:, None]

    def slope(log_temperature: float) -> float:
        """Derivative of the mean cross-entropy by 1 / T, in which it is convex."""
        probabilities = softmax(logits / np.exp(log_temperature), axis=1)
        return float(np.sum(probabilities * logits) / len(labels))

    low, high = np.log([_MIN_TEMPERATURE, _MAX_TEMPERATURE])
    if slope(low) <= 0:
        return _MIN_TEMPERATURE
    if slope(high) >= 0:
        return _MAX_TEMPERATURE
    return float(np.exp(optimize.brentq(slope, low, high)))


def risk_coverage(logits: ArrayLike, labels: ArrayLike) -> RiskCoverage:
    """Risk-coverage curve: error rate among the most confident predictions.

    Examples with equal top probability count as their mean error, the mean over all orders.

    Example:
      >>> logits = np.array([[4.0, 0.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
      >>> risk_coverage(logits, [0, 1, 0, 1]).risk.round(3).tolist()
      [0.0, 0.0, 0.167, 0.25]
    """
    confidence, correct = _top(logits, labels)
    _, block_of, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    mistakes = np.repeat(np.bincount(block_of, ~correct) / sizes, sizes)
    kept = np.arange(1, len(confidence) + 1)
    return RiskCoverage(kept / len(kept), np.cumsum(mistakes) / kept)


def area_under_risk_coverage(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean risk over all coverages (AURC, Geifman & El-Yaniv 2017); lower is better.

    Example:
      >>> area_under_risk_coverage(np.array([[4.0, 0.0], [0.0, 2.0]]), [0, 0])
      0.25
    """
    return float(risk_coverage(logits, labels).risk.mean())


def _binned(
    logits: ArrayLike, labels: ArrayLike, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int[n], the bin of each example, and the results of `_top`."""
    confidence, correct = _top(logits, labels)
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    return bin_of, confidence, correct


def _top(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """float64[n], the top probability of each example; bool[n], whether its class is the label."""
    logits, labels = check_predictions(logits, labels)
    return softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == labels
