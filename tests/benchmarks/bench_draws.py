"""100 posterior predictive draws of the 61 x 12 = 732 cells of the El Nino grid."""

import arviz as az
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest

import pymc_kron as pk

IMPLEMENTATIONS = ["KroneckerMvNormal", "MvNormal of kron", "KroneckerNormal"]


def model(implementation):
    sst = pk.load_elnino()
    anomaly = (sst - sst.mean("year")).to_numpy().ravel()
    with pm.Model() as model:
        length_scale = pm.HalfNormal("length_scale", shape=2)
        lags = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in sst.shape]
        covs = [pt.exp(-lag / length_scale[i]) for i, lag in enumerate(lags)]
        mu = np.zeros(732)
        match implementation:
            case "KroneckerMvNormal":
                pk.KroneckerMvNormal("y", mu, covs, observed=anomaly)
            case "MvNormal of kron":
                pm.MvNormal("y", mu, pt.linalg.kron(*covs), observed=anomaly)
            case "KroneckerNormal":
                pm.KroneckerNormal("y", mu, covs, observed=anomaly)
    return model


def posterior():
    length_scale = np.random.default_rng(0).gamma(20, 0.1, size=(1, 100, 2))
    return az.from_dict({"posterior": {"length_scale": length_scale}})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_posterior_predictive(benchmark, implementation):
    benchmark.group = "pm.sample_posterior_predictive, compilation included"
    idata = posterior()

    def sample():
        with model(implementation):
            pm.sample_posterior_predictive(idata, random_seed=1, progressbar=False)

    benchmark.pedantic(sample, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_compiled_draws(benchmark, implementation):
    benchmark.group = "100 calls of the compiled function"
    kronecker = model(implementation)
    length_scale = kronecker["length_scale"]
    draw = pm.compile([length_scale], kronecker["y"], random_seed=1)
    draw.trust_input = True
    samples = posterior().posterior["length_scale"].to_numpy()[0]

    def draw_all():
        for sample in samples:
            draw(sample)

    benchmark.pedantic(draw_all, rounds=3, warmup_rounds=1)
