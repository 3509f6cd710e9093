"""One small model for all samplers and methods, and its posterior by quadrature.

Eight observations of a grid of 3 x 4 cells with noise; a length-scale and the standard deviation
of the noise are unknown. Two parameters are few enough to integrate over a lattice of points,
with dense matrices and NumPy alone.
"""

from functools import cache

import arviz as az
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import norm

from pymc_kron import TensorNormal
from tests.helpers import symbolic_dense_kron

SIZES = (3, 4)
N_CELLS = 12
LAGS = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float) for n in SIZES]
K_SPACE = np.exp(-LAGS[0] / 1.5)
PARAMETERS = ["length_scale", "sigma"]
# Of the logarithms of the parameters
PRIOR_MEAN, PRIOR_SD = np.array([0.5, -1.0]), np.array([0.5, 0.5])


def dense_cov(length_scale, sigma):
    """Return the covariance of all cells, batched over the parameters."""
    K_time = np.exp(-LAGS[1] / np.asarray(length_scale)[..., None, None])
    K = K_SPACE[:, None, :, None] * K_time[..., None, :, None, :]
    noise = np.asarray(sigma)[..., None, None] ** 2 * np.eye(N_CELLS)
    return K.reshape((*K.shape[:-4], N_CELLS, N_CELLS)) + noise


def dense_logp(y, cov):
    """Return the log-density of each observation, batched over covariances."""
    chol = np.linalg.cholesky(cov)
    whitened = np.linalg.solve(chol, y.reshape((-1, N_CELLS)).T)
    logdet = 2 * np.log(np.diagonal(chol, axis1=-2, axis2=-1)).sum(axis=-1)
    constant = N_CELLS * np.log(2 * np.pi)
    return -0.5 * ((whitened**2).sum(axis=-2) + logdet[..., None] + constant)


Y = (
    np.random.default_rng(41)
    .multivariate_normal(np.zeros(N_CELLS), dense_cov(2.0, 0.4), size=8)
    .reshape((8, *SIZES))
)


def build(kind="TensorNormal", *, observed=Y):
    """Return the model; all kinds have the same posterior."""
    coords = {"replicate": range(8), "row": range(3), "column": range(4), "cell": range(N_CELLS)}
    with pm.Model(coords=coords) as model:
        length_scale = pm.LogNormal("length_scale", PRIOR_MEAN[0], PRIOR_SD[0])
        sigma = pm.LogNormal("sigma", PRIOR_MEAN[1], PRIOR_SD[1])
        K_time = pt.exp(-LAGS[1] / length_scale)
        if kind == "TensorNormal":
            dims = ("replicate", "row", "column")
            TensorNormal("y", 0, [K_SPACE, K_time], sigma=sigma, observed=observed, dims=dims)
        else:
            kron = {"MvNormal of kron": pt.linalg.kron, "dense": symbolic_dense_kron}[kind]
            K = kron(K_SPACE, K_time) + sigma**2 * pt.eye(N_CELLS)
            if observed is not None:
                observed = observed.reshape((8, N_CELLS))
            pm.MvNormal("y", np.zeros(N_CELLS), K, observed=observed, dims=("replicate", "cell"))
    return model


def log_joint(theta):
    """Return the log-density of data and logarithms of the parameters, ``(...,2)->(...)``."""
    log_prior = norm.logpdf(theta, PRIOR_MEAN, PRIOR_SD).sum(axis=-1)
    return log_prior + dense_logp(Y, dense_cov(*np.exp(np.moveaxis(theta, -1, 0)))).sum(axis=-1)


@cache
def exact_posterior():
    """Return means, covariance and log-evidence, of the logarithms of the parameters.

    By the trapezoidal rule, which is exact to rounding for densities as smooth as these where the
    steps are a fraction of their width and the ends far out.
    """
    axes = [np.linspace(-2.0, 3.0, 51), np.linspace(-5.0, 1.0, 51)]
    theta = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape((-1, 2))
    logp = log_joint(theta)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    log_evidence = logsumexp(logp) + np.log(cell)
    weights = np.exp(logp - logsumexp(logp))
    mean = weights @ theta
    centred = theta - mean
    return mean, (weights[:, None] * centred).T @ centred, log_evidence


def log_parameters(idata):
    """Return the logarithms of the draws, as a dataset."""
    return np.log(idata["posterior"].to_dataset()[PARAMETERS])


def standard_scores(idata):
    """Return how far means and standard deviations are off, in Monte Carlo standard errors."""
    draws = log_parameters(idata)
    mean, cov, _ = exact_posterior()
    exact = {"mean": mean, "sd": np.sqrt(cov.diagonal())}
    return {
        (statistic, name): float(
            (getattr(draws[name], {"mean": "mean", "sd": "std"}[statistic])() - value)
            / az.mcse(draws, method=statistic)[name]
        )
        for statistic, values in exact.items()
        for name, value in zip(PARAMETERS, values, strict=True)
    }


def assert_exact(idata):
    """Compare a posterior with the exact one within its Monte Carlo error."""
    scores = standard_scores(idata)
    assert max(map(abs, scores.values())) < 4, scores


def stand_in(draws):
    """Return draws from the Gaussian with the moments of the posterior, in its place."""
    mean, cov, _ = exact_posterior()
    theta = np.random.default_rng(3).multivariate_normal(mean, cov, size=(2, draws))
    variables = {
        name: (("chain", "draw"), np.exp(theta[..., i])) for i, name in enumerate(PARAMETERS)
    }
    return xr.DataTree.from_dict({"posterior": xr.Dataset(variables)})
