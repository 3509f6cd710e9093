"""Draws, from Cholesky factors and from a posterior: ``python -m ... OUTPUT``.

Draws per grid are against SciPy by hand, once with and once without drawing the normals. Posterior
predictive draws are 100 of the 61 x 12 = 732 cells of the El Nino grid.
"""

import sys
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import pymc as pm
import pytensor.tensor as pt

import pymc_kron as pk
from tests.benchmarks import limit, measure
from tests.benchmarks.distributions import DISTRIBUTIONS, PACKAGES, trusting

GRIDS = [*measure.GRIDS, (61, 12)]


def measure_draws(sizes):
    covs, _, mu, _ = measure.arguments(measure.WORKS["logp"], sizes)
    chols = [np.linalg.cholesky(cov) for cov in covs]
    inputs = [pt.tensor(shape=chol.shape) for chol in chols]
    rv = pk.KroneckerMvNormal.dist(mu, chols=inputs)
    draw = trusting(inputs, rv, random_seed=1)
    fortran, rng = [np.asfortranarray(chol) for chol in chols], np.random.default_rng(1)
    z = np.zeros(len(mu))
    calls = {
        "product": lambda: limit.product(fortran, z),
        "limit": lambda: limit.draw(fortran, mu, rng),
        "KroneckerMvNormal": lambda: draw(*chols),
    }
    return {"sizes": sizes, "seconds": measure.medians(calls), "failures": {}}


def elnino_model(distribution):
    sst = pk.load_elnino()
    with pm.Model() as model:
        length_scale = pm.HalfNormal("length_scale", shape=2)
        covs = [pt.exp(-measure.lags(n) / length_scale[i]) for i, n in enumerate(sst.shape)]
        cls, parameters = distribution.parameters(np.zeros(sst.size), covs, None)
        cls("y", **parameters, observed=(sst - sst.mean("year")).to_numpy().ravel())
    return model


def measure_predictive():
    [samples] = np.random.default_rng(0).gamma(20, 0.1, size=(1, 100, 2))
    posterior = az.from_dict({"posterior": {"length_scale": samples[None]}})

    def compiled(distribution):
        model = elnino_model(distribution)
        draw = trusting([model["length_scale"]], model["y"], mode=distribution.mode, random_seed=1)
        return lambda: [draw(sample) for sample in samples]

    def sampled(distribution):
        def sample():
            with elnino_model(distribution):
                pm.sample_posterior_predictive(
                    posterior,
                    random_seed=1,
                    progressbar=False,
                    compile_kwargs={"mode": distribution.mode},
                )

        return sample

    names = ["KroneckerMvNormal", "pm.KroneckerNormal"]
    return {
        work: measure.medians({name: call(DISTRIBUTIONS[name]) for name in names})
        for work, call in [
            ("calls of the compiled function", compiled),
            ("`pm.sample_posterior_predictive`, compilation included", sampled),
        ]
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, output = sys.argv
    measure.use_one_core()
    results = {
        "grids": [measure_draws(sizes) for sizes in GRIDS],
        "predictive": measure_predictive(),
    }
    measure.save(Path(output), results, PACKAGES)
