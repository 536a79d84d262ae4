"""Calibration against loops, scikit-learn, grids and simulations whose truth is known."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats as scipy_stats
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve

from fmnist_jax.analysis.calibration import (
    area_under_risk_coverage,
    calibration_interval,
    expected_calibration_error,
    fit_temperature,
    reliability,
    risk_coverage,
)


def simulate(rng, n, temperature=1.0):
    """Logits and labels for which the fitting temperature is the one given."""
    logits = rng.normal(0, 4, (n, 5))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return temperature * logits, labels


def top(logits, labels):
    probabilities = softmax(np.asarray(logits, np.float64), axis=1)
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def direct_ece(confidence, correct, bins):
    error, edges = 0.0, np.linspace(0, 1, bins + 1)
    for low, high in itertools.pairwise(edges):
        inside = (low < confidence) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return error


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
def test_ece_and_reliability(bins):
    logits, labels = simulate(np.random.default_rng(0), 500, temperature=1.5)
    logits = logits.astype(np.float32)
    confidence, correct = top(logits, labels)
    error = expected_calibration_error(logits, labels, bins)
    assert_allclose(error, direct_ece(confidence, correct, bins))

    result = reliability(logits, labels, bins)
    filled = result.num_examples > 0
    accuracies, confidences = calibration_curve(correct, confidence, n_bins=bins)
    assert_allclose(result.accuracy[filled], accuracies)
    assert_allclose(result.confidence[filled], confidences)
    assert np.isnan(result.accuracy[~filled]).all()
    assert np.isnan(result.confidence[~filled]).all()
    assert result.num_examples.shape == (bins,)
    assert result.num_examples.sum() == 500


def test_a_probability_on_an_edge_is_in_the_bin_below():
    halves, sure = np.zeros((1, 2)), np.array([[900.0, 0.0]])
    assert reliability(halves, [0], bins=2).num_examples.tolist() == [1, 0]
    assert reliability(sure, [0], bins=2).num_examples.tolist() == [0, 1]


def test_ece_of_perfect_probabilities_is_its_bias():
    rng = np.random.default_rng(0)
    errors, expected = [], []
    for _ in range(50):
        logits, labels = simulate(rng, 5000)
        errors.append(expected_calibration_error(logits, labels))
        # Each bin's surplus of hits is normal, with the variance of as many coins.
        confidence, _ = top(logits, labels)
        variance = np.histogram(confidence, 15, (0, 1), weights=confidence * (1 - confidence))[0]
        expected.append(np.sqrt(2 / np.pi * variance).sum() / 5000)
    assert_allclose(np.mean(errors), np.mean(expected), rtol=0.1)
    assert np.mean(errors) < 0.02


def test_interval_is_the_set_of_errors_that_are_no_surprise():
    """The same by multinomial weights, and by trying scale after scale."""
    logits, labels = simulate(np.random.default_rng(0), 400, temperature=2)
    confidence, correct = top(logits, labels)
    inside = np.ceil(confidence[:, None] * 15) - 1 == np.arange(15)
    gaps = inside * (confidence - correct)[:, None] / 400
    noise = np.random.default_rng(1).multinomial(400, np.full(400, 1 / 400), 4000) @ gaps
    noise -= gaps.sum(axis=0)
    error = np.abs(gaps.sum(axis=0)).sum()
    scales = np.linspace(0, 2, 201)
    errors = [np.abs(scale * gaps.sum(axis=0) + noise).sum(axis=1) for scale in scales]
    below = np.array([np.mean(row < error) for row in errors])
    expected = error * scales[(below > 0.05) & (below < 0.95)][[0, -1]]
    interval = calibration_interval(logits, labels, level=0.9, draws=4000)
    assert_allclose(interval, expected, atol=0.003)
    assert 0.02 < interval[0] < error < interval[1]


@pytest.mark.parametrize(("temperature", "coverage"), [(1, 0.95), (1.1, 0.92), (2, 0.93)])
def test_intervals_hold_the_true_error(temperature, coverage):
    # The truth: many examples, each right with the probability that it has.
    logits, _ = simulate(np.random.default_rng(1), 200_000, temperature)
    confidence, chance = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    true_error = direct_ece(confidence.max(axis=1), chance.max(axis=1), 15)

    rng = np.random.default_rng(0)
    intervals = []
    for seed in range(150):
        logits, labels = simulate(rng, 1000, temperature)
        intervals.append(calibration_interval(logits, labels, seed=seed, draws=200))
    low, high = np.transpose(intervals)
    held = np.sum((low <= true_error) & (true_error <= high))
    assert scipy_stats.binomtest(int(held), 150, coverage).pvalue > 0.01, held / 150
    # They are of use: they tell a bad network from a perfect one, and do not reach everywhere.
    assert (np.mean(low > 0) > 0.9) == (temperature == 2)
    assert np.mean(high - low) < 0.06


def test_interval_of_the_same_seed_is_the_same():
    logits, labels = simulate(np.random.default_rng(0), 300)
    first = calibration_interval(logits, labels, seed=1, draws=100)
    assert first == calibration_interval(logits, labels, seed=1, draws=100)
    assert first != calibration_interval(logits, labels, seed=2, draws=100)


def test_temperature_is_the_best_of_a_fine_grid():
    logits, labels = simulate(np.random.default_rng(0), 300, temperature=0.7)
    logits = logits.astype(np.float32)
    grid = np.exp(np.linspace(np.log(0.5), np.log(2), 2001))
    losses = [
        -log_softmax(logits.astype(np.float64) / t, axis=1)[np.arange(300), labels].mean()
        for t in grid
    ]
    assert_allclose(fit_temperature(logits, labels), grid[np.argmin(losses)], rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
def test_a_known_temperature_is_found(temperature):
    logits, labels = simulate(np.random.default_rng(0), 20_000, temperature)
    fitted = fit_temperature(logits, labels)
    assert_allclose(fitted, temperature, rtol=0.05)
    better = expected_calibration_error(logits / fitted, labels)
    assert temperature == 1 or better < expected_calibration_error(logits, labels) / 3


def test_temperature_without_a_minimum_ends_at_the_bound():
    logits = np.array([[9.0, 0.0], [0.0, 3e3], [1e-6, 0.0]])
    assert fit_temperature(logits, [0, 1, 0]) == 0.01
    assert fit_temperature(logits, [1, 0, 1]) == 100


def test_risk_coverage_is_the_mean_over_the_orders_of_ties():
    margins, predicted = np.array([2.2, 0.8, 0.8, 0.4, 0.8, 2.2]), np.array([0, 1, 0, 0, 1, 0])
    logits = np.where(predicted[:, None] == [0, 1], margins[:, None], 0)
    labels = np.array([0, 1, 1, 1, 0, 1])
    correct = predicted == labels
    risks = []
    for order in map(list, itertools.permutations(range(6))):
        if (np.diff(margins[order]) <= 0).all():
            mistakes = ~correct[order]
            risks.append([mistakes[:kept].mean() for kept in range(1, 7)])
    assert len(risks) == 2 * 6  # orders of two and of three that are tied
    result = risk_coverage(logits, labels)
    assert_allclose(result.coverage, np.arange(1, 7) / 6)
    assert_allclose(result.risk, np.mean(risks, axis=0))
    assert_allclose(area_under_risk_coverage(logits, labels), np.mean(risks))


def test_risk_coverage_without_ties():
    logits, labels = simulate(np.random.default_rng(0), 200)
    confidence, correct = top(logits, labels)
    risks = [1 - correct[confidence >= threshold].mean() for threshold in sorted(confidence)[::-1]]
    assert_allclose(risk_coverage(logits, labels).risk, risks, atol=1e-12)
    assert_allclose(risks[-1], 1 - correct.mean())
    assert_allclose(area_under_risk_coverage(logits, labels), np.mean(risks))
    # Confidence that knows nothing leaves the error rate at every coverage.
    shuffled = np.random.default_rng(1).permutation(200)
    assert area_under_risk_coverage(logits, labels) < 0.7 * risks[-1]
    assert area_under_risk_coverage(logits, labels[shuffled]) > 0.5


GOOD = np.zeros((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        expected_calibration_error,
        calibration_interval,
        reliability,
        fit_temperature,
        risk_coverage,
        area_under_risk_coverage,
    ],
)
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros(3), [0, 1, 2], r"logits are \(3,\) and labels \(3,\)"),
        (GOOD, [0], r"labels \(1,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), "not empty"),
        (GOOD * np.nan, [0, 1], "logits hold nan"),
        (GOOD, [0.0, 1.0], "labels are float64"),
        (GOOD, [0, 3], "labels hold 3; they must be from 0 to 2"),
        (GOOD, [-1, 0], "labels hold -1"),
    ],
)
def test_bad_input_is_named(function, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        function(logits, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 0}, "bins is 0"),
        ({"level": 95}, "level is 95"),
        ({"draws": 39}, "draws is 39; a level of 0.95 takes at least 40"),
    ],
)
def test_bad_settings_of_an_interval_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        calibration_interval(GOOD, [0, 1], **settings)
