"""Latent fields, centred and whitened: ``python -m ... OBSERVATIONS OUTPUT``.

Counts and successes on a grid of 8 x 12 cells, with unknown level, amplitude and length-scales of
the field. Effective samples a second of sampling, without compilation: the least of all cells
and hyperparameters, of two chains of 5000 draws; of three seeds.
"""

import sys
import time
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import nutpie
import pymc as pm
import pytensor.tensor as pt
import xarray as xr
from pymc.util import UNSET

import pymc_kron as pk
from pymc_kron.transforms import whiten
from tests.benchmarks import measure

SIZES = (8, 12)
SEEDS = (1, 2, 3)
TRANSFORMS = {"centred": UNSET, "whitened": whiten}
PACKAGES = ["pymc", "pytensor", "nutpie", "numba", "arviz"]


def poisson(field, observed=None):
    return pm.Poisson("y", pt.exp(field), observed=observed)


def bernoulli(field, observed=None):
    return pm.Bernoulli("y", logit_p=field, observed=observed)


# The likelihood and the level that the data are drawn with
OBSERVATIONS = {"bernoulli": (bernoulli, 0.0), "poisson": (poisson, -1.0), "counts": (poisson, 5.0)}


def covariances(amplitude, length_scale):
    rows, columns = map(measure.lags, SIZES)
    return [amplitude**2 * pt.exp(-rows / length_scale[0]), pt.exp(-columns / length_scale[1])]


def data(observations):
    likelihood, level = OBSERVATIONS[observations]
    with pm.Model():
        field = pk.TensorNormal("field", level, covariances(1.0, [3.0, 4.0]))
        return pm.draw(likelihood(field), random_seed=1)


def model(observations, y, transform):
    likelihood, level = OBSERVATIONS[observations]
    with pm.Model() as model:
        mu = pm.Normal("mu", level)
        amplitude = pm.LogNormal("amplitude", 0, 0.5)
        length_scale = pm.LogNormal("length_scale", 1, 0.5, shape=2)
        covs = covariances(amplitude, length_scale)
        likelihood(pk.TensorNormal("field", mu, covs, transform=transform), y)
    return model


def sample(compiled, seed):
    start = time.perf_counter()
    trace = nutpie.sample(compiled, draws=5000, chains=2, cores=2, seed=seed, progress_bar=False)
    seconds = time.perf_counter() - start
    posterior = trace["posterior"].to_dataset()
    run = {
        "seconds": seconds,
        "ess": extreme(az.ess(posterior), min),
        "r_hat": extreme(az.rhat(posterior), max),
        "divergences": int(trace["sample_stats"]["diverging"].sum()),
        "gradients": int(trace["sample_stats"]["n_steps"].sum()),
    }
    return run, posterior


def extreme(statistics, of):
    return of(float(values) for var in statistics.values() for values in var.to_numpy().flat)


def largest_difference(one, other):
    """Return the largest difference of posterior means, in Monte Carlo standard errors."""
    error = sum(az.mcse(posterior) ** 2 for posterior in (one, other)) ** 0.5
    dims = ("chain", "draw")
    return extreme(np.abs(one.mean(dims) - other.mean(dims)) / error, max)


def measure_sampling(observations):
    y = data(observations)
    runs, posteriors = {}, {}
    for name, transform in TRANSFORMS.items():
        compiled = nutpie.compile_pymc_model(model(observations, y, transform))
        runs[name], samples = zip(*(sample(compiled, seed) for seed in SEEDS), strict=True)
        posteriors[name] = xr.concat(samples, "chain")
    return {
        "mean": float(y.mean()),
        "runs": runs,
        "difference": largest_difference(*posteriors.values()),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, observations, output = sys.argv
    measure.save(Path(output), measure_sampling(observations), PACKAGES)
