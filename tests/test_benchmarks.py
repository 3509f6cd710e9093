"""The reference of the benchmarks is right."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from tests.benchmarks import limit, measure
from tests.helpers import dense_kron, random_spd

SIGMA = 0.7


@pytest.fixture(params=[(3,), (4, 2), (2, 5), (3, 2, 4), (2, 3, 1, 2)], ids=str)
def problem(request):
    rng = np.random.default_rng(0)
    covs = [random_spd(rng, n) for n in request.param]
    N = np.prod(request.param)
    return covs, rng.normal(size=N), rng.normal(size=N)


def test_log_densities_are_those_of_scipy(problem):
    covs, mu, x = problem
    K = dense_kron(*covs)
    noisy = K + SIGMA**2 * np.eye(len(x))
    expected = multivariate_normal.logpdf(x, mu, K)
    noisy_expected = multivariate_normal.logpdf(x, mu, noisy)
    np.testing.assert_allclose(limit.logp(covs, mu, x), expected)
    np.testing.assert_allclose(limit.logp_and_gradient(covs, mu, x)[0], expected)
    np.testing.assert_allclose(limit.noisy_logp(covs, SIGMA, mu, x), noisy_expected)
    np.testing.assert_allclose(limit.noisy_logp_and_gradient(covs, SIGMA, mu, x)[0], noisy_expected)


@pytest.mark.parametrize("noisy", [False, True], ids=["without noise", "with noise"])
def test_gradients_are_finite_differences(problem, noisy):
    covs, mu, x = problem
    arguments = [*covs, *([np.array(SIGMA)] if noisy else []), mu, x]

    def unflat(arguments):
        return (arguments[: len(covs)], *arguments[len(covs) :])

    logp, with_gradient = (
        (limit.noisy_logp, limit.noisy_logp_and_gradient)
        if noisy
        else (limit.logp, limit.logp_and_gradient)
    )
    _, *gradients = with_gradient(*unflat(arguments))
    rng = np.random.default_rng(1)
    for i, (argument, gradient) in enumerate(zip(arguments, gradients, strict=True)):
        direction = rng.normal(size=argument.shape)
        if argument.ndim == 2:
            direction = direction + direction.T
            np.testing.assert_allclose(gradient, gradient.T)
        step = 1e-5 * direction
        ends = [
            logp(*unflat([*arguments[:i], argument + move, *arguments[i + 1 :]]))
            for move in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6, atol=1e-8)


def test_an_implementation_counts_only_if_its_numbers_are_right(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0)

    def wrong(work, covs, sigma, mu, x):
        return measure.prepare_limit(work, covs, sigma, 1.001 * mu, x)

    for work in measure.WORKS.values():
        implementations = {"right": measure.prepare_limit, "wrong": wrong}
        cell = measure.measure_cell(work, (3, 2), implementations)
        assert list(cell["seconds"]) == ["limit", "right"]
        assert cell["failures"]["wrong"].startswith("ArithmeticError: off by")
