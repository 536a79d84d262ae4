"""Intervals and tests match scipy, statsmodels, brute force and simulations."""

import itertools
import json

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats as scipy_stats
from scipy.special import expit
from statsmodels.stats import contingency_tables
from statsmodels.stats.power import TTestPower

from fmnist_jax.analysis.stats import (
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    prediction_interval,
    seeds_needed,
    sign_flip_test,
    smallest_sign_flip_p,
    summarize,
)


def assert_rate(hits, rate):
    """The observed rate agrees with the expected one, by a binomial test at the 1% level."""
    assert scipy_stats.binomtest(int(np.sum(hits)), len(hits), rate).pvalue > 0.01, np.mean(hits)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_interval_matches_scipy(level):
    values = np.random.default_rng(0).normal(0.92, 0.002, 7)
    estimate = mean_interval(values, level)
    reference = scipy_stats.ttest_1samp(values, 0).confidence_interval(level)
    assert_allclose([estimate.low, estimate.high], reference)
    assert_allclose([estimate.mean, estimate.std], [values.mean(), values.std(ddof=1)])
    assert estimate.n == 7


@pytest.mark.slow
def test_t_interval_covers_the_mean():
    samples = np.random.default_rng(0).normal(3, 2, (2000, 4))
    estimates = [mean_interval(values) for values in samples]
    assert_rate([estimate.low <= 3 <= estimate.high for estimate in estimates], 0.95)


def test_prediction_interval_is_that_of_the_next_value():
    values = np.random.default_rng(0).normal(3, 2, 5)
    # The next value minus the mean has a variance of 1 + 1/n in units of the variance.
    half = scipy_stats.t.ppf(0.95, 4) * values.std(ddof=1) * np.sqrt(1 + 1 / 5)
    low, high = prediction_interval(values, 0.9)
    assert_allclose([low, high], [values.mean() - half, values.mean() + half])
    assert np.isnan(prediction_interval([0.9])).all()


@pytest.mark.slow
def test_prediction_interval_covers_the_next_value():
    samples = np.random.default_rng(0).normal(3, 2, (2000, 5))
    ends = [prediction_interval(values) for values in samples[:, :4]]
    pairs = zip(ends, samples[:, 4], strict=True)
    assert_rate([low <= value <= high for (low, high), value in pairs], 0.95)


def test_intervals_of_one_value_and_of_equal_values():
    # In floating point, 0.1 + 0.1 + 0.1 is not 3 * 0.1.
    assert mean_interval([0.1] * 3) == (0.1, 0, 0.1, 0.1, 3)
    alone = mean_interval([0.1])
    assert (alone.mean, alone.n) == (0.1, 1)
    assert np.isnan(alone[1:4]).all()
    almost = mean_interval([1, 1, 1 + 2**-52])
    assert 0.99 < almost.low <= almost.mean <= almost.high < 1.01


def test_summary_is_json_of_the_interval():
    values = np.random.default_rng(0).normal(0.92, 0.002, 7).tolist()
    numbers = summarize(values)
    keys = ("mean", "std", "low", "high", "n")
    assert [numbers[key] for key in keys] == list(mean_interval(values))
    assert json.loads(json.dumps(numbers, allow_nan=False))["values"] == values
    assert summarize([0.5]) == {
        "mean": 0.5, "std": None, "low": None, "high": None, "n": 1, "values": [0.5],
    }  # fmt: skip


@pytest.mark.parametrize(
    "differences", [[3], [1, 2, -3], [5, 1, 4, -2], [1, 2, -3, 4, 5, -6, 2], [0, 0], [9] * 6]
)
def test_sign_flip_test_equals_brute_force(differences):
    patterns = itertools.product([-1, 1], repeat=len(differences))
    sums = [sum(np.multiply(signs, differences).tolist()) for signs in patterns]
    expected = np.mean([abs(number) >= abs(sum(differences)) for number in sums])
    assert sign_flip_test(differences) == expected
    # Sums that are equal in integers differ by rounding errors here.
    assert sign_flip_test(np.array(differences) * 1e-4) == expected


def exact_sign_flip_p(differences):
    """By convolution: how many sign patterns have which sum, for integer differences."""
    counts = np.ones(1)
    for difference in np.abs(differences):
        kernel = np.zeros(2 * difference + 1)
        kernel[0] += 1
        kernel[-1] += 1
        counts = np.convolve(counts, kernel)
    sums = np.arange(len(counts)) - len(counts) // 2
    return counts[np.abs(sums) >= abs(differences.sum())].sum() / 2.0 ** len(differences)


def test_sign_flip_test_is_exact_up_to_16_differences():
    differences = np.random.default_rng(0).integers(-5, 9, 16)
    assert sign_flip_test(differences * 1e-4) == exact_sign_flip_p(differences)


def test_random_sign_flips_approximate_the_exact_p_value():
    differences = np.random.default_rng(0).integers(-5, 9, 24)
    exact = exact_sign_flip_p(differences)
    assert 0.01 < exact < 0.2
    found = [sign_flip_test(differences, seed) for seed in range(3)]
    assert_allclose(found, exact, atol=4 * np.sqrt(exact / 10_000))
    assert len(set(found)) == 3
    assert sign_flip_test(differences, 0) == found[0]
    # The observed pattern counts, so p is never 0.
    assert sign_flip_test(np.ones(40)) == 1 / 10_000


@pytest.mark.parametrize("n", [1, 2, 6, 16, 17, 20])
def test_smallest_sign_flip_p_is_that_of_equal_differences(n):
    assert smallest_sign_flip_p(n) == sign_flip_test(np.ones(n))


@pytest.mark.slow
def test_sign_flip_test_has_its_false_positive_rate():
    samples = np.random.default_rng(0).standard_t(2, (2000, 8))
    # Of the 256 patterns, the 12 most extreme are below 0.05.
    assert_rate([sign_flip_test(sample) < 0.05 for sample in samples], 12 / 256)


def test_mcnemar_of_one_seed_matches_the_exact_test_of_statsmodels():
    rng = np.random.default_rng(0)
    a, b = rng.random(300) < 0.9, rng.random(300) < 0.85
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    result = mcnemar(a, b)
    assert [result.only_a, result.only_b] == [table[0][1], table[1][0]]
    assert_allclose(result.p, contingency_tables.mcnemar(table, exact=True).pvalue)
    assert mcnemar(a[None], b[None]) == result
    assert mcnemar(b, a) == (result.only_b, result.only_a, result.p)
    assert mcnemar(a, a) == (0, 0, 1)

    # Copies of one seed add no evidence.
    again = mcnemar(np.stack([a] * 5), np.stack([b] * 5))
    reference = contingency_tables.mcnemar(table, exact=False, correction=False)
    assert_allclose(again.p, reference.pvalue)
    assert [again.only_a, again.only_b] == [5 * result.only_a, 5 * result.only_b]


def test_mcnemar_of_seeds_equals_a_sum_over_images():
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 40)) < 0.8, rng.random((3, 40)) < 0.6
    total = squares = 0
    for image in range(40):
        d = sum(int(a[seed, image]) - int(b[seed, image]) for seed in range(3))
        total, squares = total + d, squares + d**2
    normal = scipy_stats.norm.sf(abs(total) / np.sqrt(squares))
    assert_allclose(mcnemar(a, b).p, 2 * normal)


@pytest.mark.slow
def test_clustered_mcnemar_has_its_false_positive_rate():
    # Two training methods, equally good on average, each with its own hard images.
    rng = np.random.default_rng(0)
    clustered, pooled = [], []
    for _ in range(1000):
        easy = rng.normal(2, 2, 200)
        a, b = (rng.random((5, 200)) < expit(easy + rng.normal(0, 2, 200)) for _ in "ab")
        result = mcnemar(a, b)
        clustered.append(result.p < 0.05)
        # The test as if the images of different seeds were independent.
        pooled.append(mcnemar(a.ravel(), b.ravel()).p < 0.05)
    assert_rate(clustered, 0.05)
    assert np.mean(pooled) > 0.1


def power_by_integration(effect, n, level):
    """Power of the t test, by integration over the distribution of the standard deviation."""
    critical = scipy_stats.t.isf(level / 2, n - 1)
    std = np.linspace(0, 8, 400_001)
    beyond = scipy_stats.norm.sf(critical * std, effect * np.sqrt(n)) + scipy_stats.norm.cdf(
        -critical * std, effect * np.sqrt(n)
    )
    return np.trapezoid(beyond * scipy_stats.chi.pdf(std, n - 1, scale=1 / np.sqrt(n - 1)), std)


@pytest.mark.parametrize("n", [2, 3, 5, 20, 500])
@pytest.mark.parametrize(("level", "power"), [(0.05, 0.8), (0.01, 0.95), (0.2, 0.3)])
def test_minimum_detectable_effect_has_the_power(n, level, power):
    difference = minimum_detectable_effect(0.003, n, level, power)
    assert_allclose(power_by_integration(difference / 0.003, n, level), power, rtol=1e-6)
    if n >= 20:  # below, the noncentral t of statsmodels is sometimes nan
        assert_allclose(TTestPower().power(difference / 0.003, n, level), power, rtol=1e-9)
    assert minimum_detectable_effect(0, n, level, power) == 0


@pytest.mark.slow
def test_minimum_detectable_effect_is_detected_with_its_power():
    difference = minimum_detectable_effect(2, 4)
    samples = np.random.default_rng(0).normal(difference, 2, (3000, 4))
    assert_rate(scipy_stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05, 0.8)


@pytest.mark.parametrize("effect", [0.06, 0.5, 1.3, 8, 100])
def test_seeds_needed_is_the_smallest_sufficient_number(effect):
    n = seeds_needed(0.002, -0.002 * effect)
    assert n is not None
    assert power_by_integration(effect, n, 0.05) > 0.8
    assert n == 2 or power_by_integration(effect, n - 1, 0.05) < 0.8


def test_seeds_needed_at_its_limits():
    limit = minimum_detectable_effect(1, 10_000)
    assert seeds_needed(1, 1.00001 * limit) == 10_000
    assert seeds_needed(1, 0.99999 * limit) is None
    assert seeds_needed(1, 0) is None
    assert seeds_needed(0, 0) is None
    assert seeds_needed(0, 0.1) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), r"values has shape \(0,\)"),
        (lambda: mean_interval([[1, 2]]), r"values has shape \(1, 2\)"),
        (lambda: mean_interval([1, np.nan]), "values contains nan"),
        (lambda: sign_flip_test([]), r"differences has shape \(0,\)"),
        (lambda: mean_interval([1, 2], 95), "level is 95;"),
        (lambda: mean_interval([1, 2], 0), "level is 0;"),
        (lambda: mcnemar([0, 1], [True, False]), "correct_a is int64"),
        (lambda: mcnemar([True], [True, False]), r"shape \(1,\) and correct_b \(2,\)"),
        (lambda: mcnemar(np.ones((2, 0), bool), np.ones((2, 0), bool)), "not empty"),
        (lambda: minimum_detectable_effect(-1, 3), "std is -1"),
        (lambda: minimum_detectable_effect(np.inf, 3), "std is inf"),
        (lambda: minimum_detectable_effect(1, 1), "n is 1"),
        (lambda: minimum_detectable_effect(1, 3, level=0.95), "level is 0.95 and power 0.8"),
        (lambda: minimum_detectable_effect(1, 3, power=1), "power 1;"),
        (lambda: seeds_needed(1, np.nan), "difference is nan"),
    ],
)
def test_invalid_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
