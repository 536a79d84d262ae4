"""Calibration matches loops, scikit-learn, grids and simulations with known truth."""

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
    summarize,
)


def simulate(rng, n, temperature=1.0):
    """Logits and labels whose optimal temperature is the given one."""
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
def test_ece_and_reliability_match_a_loop_and_scikit_learn(bins):
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


def test_bins_include_their_right_edge():
    halves, sure = np.zeros((1, 2)), np.array([[900.0, 0.0]])
    assert reliability(halves, [0], bins=2).num_examples.tolist() == [1, 0]
    assert reliability(sure, [0], bins=2).num_examples.tolist() == [0, 1]


@pytest.mark.slow
def test_ece_of_perfect_probabilities_is_its_bias():
    rng = np.random.default_rng(0)
    errors, expected = [], []
    for _ in range(50):
        logits, labels = simulate(rng, 5000)
        errors.append(expected_calibration_error(logits, labels))
        # The gap of a bin is approximately normal, with the variance of its Bernoulli trials.
        confidence, _ = top(logits, labels)
        variance = np.histogram(confidence, 15, (0, 1), weights=confidence * (1 - confidence))[0]
        expected.append(np.sqrt(2 / np.pi * variance).sum() / 5000)
    assert_allclose(np.mean(errors), np.mean(expected), rtol=0.1)
    assert np.mean(errors) < 0.02


def test_interval_equals_test_inversion_on_a_grid():
    """Resampling by multinomial weights, and inversion by trying every scale."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "coverage"), [(1, 0.95), (1.1, 0.92), (2, 0.93)])
def test_intervals_cover_the_true_error(temperature, coverage):
    # The truth, from many examples and the probability of each to be correct.
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
    # They are informative: they distinguish a miscalibrated network, and they are narrow.
    assert (np.mean(low > 0) > 0.9) == (temperature == 2)
    assert np.mean(high - low) < 0.06


def test_interval_is_reproduced_from_its_seed():
    logits, labels = simulate(np.random.default_rng(0), 300)
    first = calibration_interval(logits, labels, seed=1, draws=100)
    assert first == calibration_interval(logits, labels, seed=1, draws=100)
    assert first != calibration_interval(logits, labels, seed=2, draws=100)


def test_temperature_is_the_minimum_over_a_fine_grid():
    logits, labels = simulate(np.random.default_rng(0), 300, temperature=0.7)
    logits = logits.astype(np.float32)
    grid = np.exp(np.linspace(np.log(0.5), np.log(2), 2001))
    losses = [
        -log_softmax(logits.astype(np.float64) / t, axis=1)[np.arange(300), labels].mean()
        for t in grid
    ]
    assert_allclose(fit_temperature(logits, labels), grid[np.argmin(losses)], rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
def test_known_temperature_is_recovered(temperature):
    logits, labels = simulate(np.random.default_rng(0), 20_000, temperature)
    fitted = fit_temperature(logits, labels)
    assert_allclose(fitted, temperature, rtol=0.05)
    better = expected_calibration_error(logits / fitted, labels)
    assert temperature == 1 or better < expected_calibration_error(logits, labels) / 3


def test_temperature_without_a_minimum_is_clipped():
    logits = np.array([[9.0, 0.0], [0.0, 3e3], [1e-6, 0.0]])
    assert fit_temperature(logits, [0, 1, 0]) == 0.01
    assert fit_temperature(logits, [1, 0, 1]) == 100


def test_risk_coverage_is_the_mean_over_all_orders_of_ties():
    margins, predicted = np.array([2.2, 0.8, 0.8, 0.4, 0.8, 2.2]), np.array([0, 1, 0, 0, 1, 0])
    logits = np.where(predicted[:, None] == [0, 1], margins[:, None], 0)
    labels = np.array([0, 1, 1, 1, 0, 1])
    correct = predicted == labels
    risks = []
    for order in map(list, itertools.permutations(range(6))):
        if (np.diff(margins[order]) <= 0).all():
            mistakes = ~correct[order]
            risks.append([mistakes[:kept].mean() for kept in range(1, 7)])
    assert len(risks) == 2 * 6  # orders of two and of three ties
    result = risk_coverage(logits, labels)
    assert_allclose(result.coverage, np.arange(1, 7) / 6)
    assert_allclose(result.risk, np.mean(risks, axis=0))
    assert_allclose(area_under_risk_coverage(logits, labels), np.mean(risks))


def test_risk_coverage_equals_thresholding():
    logits, labels = simulate(np.random.default_rng(0), 200)
    confidence, correct = top(logits, labels)
    risks = [1 - correct[confidence >= threshold].mean() for threshold in sorted(confidence)[::-1]]
    assert_allclose(risk_coverage(logits, labels).risk, risks, atol=1e-12)
    assert_allclose(risks[-1], 1 - correct.mean())
    assert_allclose(area_under_risk_coverage(logits, labels), np.mean(risks))
    # Uninformative confidence leaves the error rate unchanged at every coverage.
    shuffled = np.random.default_rng(1).permutation(200)
    assert area_under_risk_coverage(logits, labels) < 0.7 * risks[-1]
    assert area_under_risk_coverage(logits, labels[shuffled]) > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 0}, "bins is 0"),
        ({"level": 95}, "level is 95"),
        ({"draws": 39}, "draws is 39; a level of 0.95 needs at least 40"),
    ],
)
def test_invalid_settings_of_an_interval_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        calibration_interval(np.zeros((2, 3)), [0, 1], **settings)


def test_summary_scales_by_the_temperature_of_the_validation_split():
    rng = np.random.default_rng(0)
    logits, labels = simulate(rng, 2000, temperature=2)
    val_logits, val_labels = simulate(rng, 1000, temperature=2)
    test = {"logits": logits.astype(np.float32), "labels": labels}
    found = summarize({**test, "val_logits": val_logits, "val_labels": val_labels})
    temperature = fit_temperature(val_logits, val_labels)
    scaled = test["logits"] / temperature
    assert found["temperature"] == temperature
    assert_allclose(found["ece"], expected_calibration_error(logits, labels), rtol=1e-3)
    assert (found["ece_low"], found["ece_high"]) == calibration_interval(test["logits"], labels)
    assert_allclose(found["aurc"], area_under_risk_coverage(logits, labels), rtol=1e-3)
    assert_allclose(found["ece_scaled"], expected_calibration_error(scaled, labels), rtol=1e-3)
    loss = -log_softmax(scaled, axis=1)[np.arange(2000), labels].mean()
    assert_allclose(found["loss_scaled"], loss, rtol=1e-6)
    for without in (test, {**test, "val_logits": logits[:0], "val_labels": labels[:0]}):
        expected = found | dict.fromkeys(("temperature", "ece_scaled", "loss_scaled"))
        assert summarize(without) == expected
    # Correct predictions alone fit every smaller temperature better.
    num_classes = logits.shape[1]
    correct = {"val_logits": np.eye(num_classes), "val_labels": np.arange(num_classes)}
    perfect = test | correct
    assert summarize(perfect) == expected


@pytest.mark.parametrize("num_classes", [2, 100])
def test_any_number_of_classes(num_classes):
    rng = np.random.default_rng(num_classes)
    logits = rng.normal(0, 3, (2000, num_classes))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((2000, 1))).sum(axis=1)
    sharp = 2 * logits  # overconfident
    found = summarize(
        {"logits": sharp, "labels": labels, "val_logits": sharp, "val_labels": labels}
    )
    confidence, correct = top(sharp, labels)
    assert_allclose(found["ece"], direct_ece(confidence, correct, 15))
    assert found["ece_low"] < found["ece"] < found["ece_high"]
    grid = np.exp(np.linspace(np.log(1), np.log(4), 200))
    losses = [-log_softmax(sharp / t, axis=1)[np.arange(2000), labels].mean() for t in grid]
    assert found["temperature"] == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert found["temperature"] == pytest.approx(2, rel=0.1)
    assert found["loss_scaled"] == pytest.approx(min(losses), abs=1e-4)
    order = np.argsort(-confidence, kind="stable")
    assert_allclose(
        found["aurc"], (np.cumsum(~correct[order]) / np.arange(1, 2001)).mean(), atol=1e-9
    )
