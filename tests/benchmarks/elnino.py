"""The El Nino grid with noise, sampled end to end: ``python -m ... DISTRIBUTION OUTPUT``."""

import sys
import time
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import pymc as pm
import pytensor.tensor as pt

import pymc_kron as pk
from tests.benchmarks import measure
from tests.benchmarks.distributions import DISTRIBUTIONS, PACKAGES


def model(distribution):
    sst = pk.load_elnino()
    with pm.Model() as model:
        amplitude = pm.HalfNormal("amplitude", 2)
        length_scale = pm.Gamma("length_scale", 2, 0.5, shape=2)
        sigma = pm.HalfNormal("sigma")
        years, months = map(measure.lags, sst.shape)
        covs = [
            amplitude**2 * pt.exp(-years / length_scale[0]),
            pt.exp(-((months / length_scale[1]) ** 2) / 2),
        ]
        cls, parameters = distribution.parameters(np.zeros(sst.size), covs, sigma)
        cls("y", **parameters, observed=(sst - sst.mean("year")).to_numpy().ravel())
    return model


def measure_sampling(distribution):
    start = time.perf_counter()
    with model(distribution):
        trace = pm.sample(
            500,
            tune=500,
            chains=2,
            cores=2,
            nuts_sampler="pymc",
            random_seed=1,
            progressbar=False,
            compile_kwargs={"mode": distribution.mode},
        )
    seconds = time.perf_counter() - start
    summary = az.summary(trace, round_to="none")
    return {
        "seconds": seconds,
        "sampling": trace.sample_stats.attrs["sampling_time"],
        "ess": float(summary["ess_bulk"].astype(float).min()),
        "r_hat": float(summary["r_hat"].astype(float).max()),
        "divergences": int(trace.sample_stats["diverging"].sum()),
        "gradients": int(trace.sample_stats["n_steps"].sum()),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, name, output = sys.argv
    measure.save(Path(output), measure_sampling(DISTRIBUTIONS[name]), PACKAGES)
