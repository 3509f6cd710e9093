"""Whole models: posteriors and predictions of Kronecker and dense models of the same data."""

import arviz as az
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_kron import KroneckerMvNormal
from tests.helpers import symbolic_dense_kron

# One worker, for the sake of the one dense posterior that all compare with
pytestmark = pytest.mark.xdist_group("models")

LAGS = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float) for n in (4, 6)]
TRUE_LENGTH_SCALES = (1.5, 3.0)


def simulate():
    rng = np.random.default_rng(29)
    K = np.kron(
        *(np.exp(-lags / scale) for lags, scale in zip(LAGS, TRUE_LENGTH_SCALES, strict=True))
    )
    return rng.multivariate_normal(np.full(24, 0.5), K, size=3)


Y = simulate()


def build_model(kind):
    with pm.Model(coords={"replicate": range(3), "cell": range(24)}) as model:
        mu = pm.Normal("mu")
        length_scale = pm.LogNormal("length_scale", 0.5, 0.5, shape=2)
        covs = [pt.exp(-lags / length_scale[i]) for i, lags in enumerate(LAGS)]
        kwargs = {"observed": Y, "dims": ("replicate", "cell")}
        match kind:
            case "KroneckerMvNormal":
                KroneckerMvNormal("y", mu, covs, **kwargs)
            case "MvNormal of kron":
                pm.MvNormal("y", pt.full(24, mu), pt.linalg.kron(*covs), **kwargs)
            case "dense":
                pm.MvNormal("y", pt.full(24, mu), symbolic_dense_kron(*covs), **kwargs)
    return model


def sample(kind, nuts_sampler, *, seed, draws=1000):
    with build_model(kind):
        return pm.sample(
            draws,
            tune=500,
            chains=2,
            cores=1,
            random_seed=seed,
            progressbar=False,
            nuts_sampler=nuts_sampler,
            target_accept=0.9,
        )


@pytest.fixture(scope="module")
def dense_posterior():
    return sample("dense", "nutpie", seed=1)


def assert_posteriors_agree(idata, reference):
    """Compare means and standard deviations within their Monte Carlo errors."""
    for statistic, mcse in (("mean", "mcse_mean"), ("sd", "mcse_sd")):
        summaries = [
            az.summary(data, var_names=["mu", "length_scale"], round_to=None)
            for data in (idata, reference)
        ]
        values, errors = (
            np.array([summary[column].to_numpy(dtype=float) for summary in summaries])
            for column in (statistic, mcse)
        )
        z = (values[0] - values[1]) / np.sqrt((errors**2).sum(axis=0))
        assert np.abs(z).max() < 4, (statistic, z)


@pytest.mark.parametrize(
    ("kind", "nuts_sampler"),
    [
        ("KroneckerMvNormal", "pymc"),
        ("KroneckerMvNormal", "nutpie"),
        ("KroneckerMvNormal", "numpyro"),
        ("MvNormal of kron", "nutpie"),
    ],
)
# JAX has one device here, and NumPyro says that two chains take turns
@pytest.mark.filterwarnings("ignore:There are not enough devices to run parallel chains")
def test_posterior(kind, nuts_sampler, dense_posterior):
    idata = sample(kind, nuts_sampler, seed=2)
    assert (
        (az.rhat(idata, var_names=["mu", "length_scale"]).to_dataset() < 1.02)
        .all()
        .to_array()
        .all()
    )
    assert_posteriors_agree(idata, dense_posterior)


def test_posterior_predictive(dense_posterior):
    draws = {}
    for kind in ("KroneckerMvNormal", "MvNormal of kron", "dense"):
        with build_model(kind):
            predictive = pm.sample_posterior_predictive(
                dense_posterior, random_seed=3, progressbar=False
            )
        y = predictive.posterior_predictive["y"]
        assert y.dims == ("chain", "draw", "replicate", "cell")
        draws[kind] = y.to_numpy().reshape((-1, 24))
    K_dense = np.cov(draws["dense"].T)
    n = len(draws["dense"]) / 3  # one draw of the parameters for three replicates
    scale = np.sqrt(K_dense.diagonal().max())
    variances = np.outer(K_dense.diagonal(), K_dense.diagonal())
    for kind in ("KroneckerMvNormal", "MvNormal of kron"):
        difference = draws[kind].mean(axis=0) - draws["dense"].mean(axis=0)
        assert_allclose(difference, 0, atol=4.5 * scale * np.sqrt(2 / n))
        errors = (np.cov(draws[kind].T) - K_dense) / np.sqrt(2 * (K_dense**2 + variances) / n)
        assert np.abs(errors).max() < 4.5


@pytest.mark.parametrize("kind", ["KroneckerMvNormal", "MvNormal of kron"])
def test_prior_predictive_and_a_latent_field(kind):
    with build_model(kind):
        prior = pm.sample_prior_predictive(20, random_seed=4)
    assert prior.prior_predictive["y"].shape == (1, 20, 3, 24)
    assert np.isfinite(prior.prior_predictive["y"]).all()


@pytest.mark.filterwarnings("ignore::pymc.exceptions.ImputationWarning")
def test_missing_cells_are_imputed_while_sampling():
    y = Y[0].copy()
    missing = [3, 10, 17]
    y[missing] = np.nan
    K = np.kron(np.exp(-LAGS[0] / 1.5), np.exp(-LAGS[1] / 3.0))
    with pm.Model():
        KroneckerMvNormal("y", 0.5, [np.exp(-LAGS[0] / 1.5), np.exp(-LAGS[1] / 3.0)], observed=y)
        idata = pm.sample(
            1500, tune=500, chains=2, cores=1, random_seed=5, progressbar=False, target_accept=0.9
        )
    observed = np.setdiff1d(np.arange(24), missing)
    weights = np.linalg.solve(K[np.ix_(observed, observed)], K[np.ix_(observed, missing)]).T
    mean = 0.5 + weights @ (y[observed] - 0.5)
    variance = (K[np.ix_(missing, missing)] - weights @ K[np.ix_(observed, missing)]).diagonal()
    summary = az.summary(idata, var_names=["y_unobserved"], round_to=None)
    z_mean = (summary["mean"].astype(float) - mean) / summary["mcse_mean"].astype(float)
    z_sd = (summary["sd"].astype(float) - np.sqrt(variance)) / summary["mcse_sd"].astype(float)
    assert np.abs(z_mean).max() < 4
    assert np.abs(z_sd).max() < 4
