"""Simulation-based calibration, with rank histograms: ``python -m tests.calibration``.

Parameters are drawn from the prior and data from the model with these parameters. Where posterior
draws are right, the rank of the true parameter among L independent ones is uniform on 0, ..., L
(Talts, S. et al. (2018), "Validating Bayesian inference algorithms with simulation-based
calibration", arXiv:1804.06788).
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import nutpie
import pymc as pm
import pytensor.tensor as pt
import scipy.stats

import pymc_kron as pk
from pymc_kron.missing import Cells
from tests.benchmarks.measure import lags

SIZES = (4, 6)
REPLICATIONS = 320
# Of these draws every sixth is ranked, as if they were independent
DRAWS, EVERY = 594, 6
BINS = 20
# Single cells and a whole row
MISSING = np.zeros(SIZES, dtype=bool)
MISSING[1] = MISSING[0, 3] = MISSING[3, 0] = True
PATTERNS = {"with noise": np.zeros(SIZES, dtype=bool), "with noise and missing cells": MISSING}


def build_model():
    """Return a model of two factors with noise, whose data may have missing cells."""
    rows, columns = map(lags, SIZES)
    with pm.Model() as model:
        level = pm.Normal("level", 0, 1)
        amplitude = pm.LogNormal("amplitude", 0, 0.5)
        length_scale = pm.LogNormal("length_scale", 1, 0.5, shape=2)
        sigma = pm.LogNormal("sigma", -0.5, 0.5)
        covs = [
            amplitude**2 * pm.math.exp(-rows / length_scale[0]),
            pm.math.exp(-((columns / length_scale[1]) ** 2) / 2),
        ]
        data = pm.Data("data", np.zeros(SIZES))
        pk.TensorNormal("y", level, covs, sigma=sigma, observed=data, marginalize_missing=True)
    return model


def compile_prediction(model, missing):
    """Return a function that draws the missing cells, given parameters and data."""
    _rng, _size, mu, *parts = model["y"].owner.inputs
    value, mu = pt.matrix("value", shape=SIZES), pt.broadcast_to(mu, SIZES).ravel()
    regression = Cells.of(pt.constant(missing.ravel())).regression(
        model["y"].owner.op.covariance(*parts)
    )
    rng = pt.random.shared_rng(seed=None)
    _, z = pt.random.normal(size=missing.size, rng=rng, return_next_rng=True)
    delta = pt.switch(missing.ravel(), 0, value.ravel() - mu)
    draw = mu[regression.cells.missing] + regression.draw(delta, z)
    return pm.compile([*model.free_RVs, value], draw, random_seed=1)


def ranks(missing, *, seed):
    """Return the ranks of each quantity in all replications, from 0 to ``DRAWS // EVERY``."""
    model = build_model()
    compiled = nutpie.compile_pymc_model(model)
    predict = compile_prediction(model, missing) if missing.any() else None
    *parameters, grids = pm.draw([*model.free_RVs, model["y"]], REPLICATIONS, random_seed=seed)
    found = []
    for i in range(REPLICATIONS):
        truth = {rv.name: values[i] for rv, values in zip(model.free_RVs, parameters, strict=True)}
        data = np.where(missing, np.nan, grids[i])
        trace = nutpie.sample(
            compiled.with_data(data=data),
            draws=DRAWS,
            tune=500,
            chains=1,
            seed=seed + i,
            progress_bar=False,
        )
        posterior = trace["posterior"].to_dataset().isel(chain=0, draw=slice(None, None, EVERY))
        draws = {name: posterior[name].values for name in truth}
        if predict is not None:
            points = zip(*draws.values(), strict=True)
            cells = np.array([predict(*point, np.where(missing, 0, data)) for point in points])
            truth |= {
                "a missing cell": grids[i][missing][0],
                "sum of the missing cells": grids[i][missing].sum(),
            }
            draws |= {"a missing cell": cells[:, 0], "sum of the missing cells": cells.sum(axis=1)}
        found.append(
            {
                "".join([name, *(f"[{j}]" for j in index)]): np.sum(
                    draws[name][(slice(None), *index)] < np.asarray(value)[index]
                )
                for name, value in truth.items()
                for index in np.ndindex(np.shape(value))
            }
        )
    return {name: np.array([rank[name] for rank in found]) for name in found[0]}


def histogram(ranks):
    counts, _ = np.histogram(ranks, bins=BINS, range=(-0.5, DRAWS // EVERY + 0.5))
    return counts


def p_value(ranks):
    """Return the probability of a histogram that is less uniform, if the ranks are uniform."""
    values, n_ranks = np.arange(DRAWS // EVERY + 1), DRAWS // EVERY + 1
    expected = histogram(values) * len(ranks) / n_ranks
    return scipy.stats.chisquare(histogram(ranks), expected).pvalue


def main():
    docs = Path(__file__).parents[1] / "docs"
    results = {
        name: ranks(missing, seed=1000 * i) for i, (name, missing) in enumerate(PATTERNS.items(), 1)
    }
    n_columns = max(map(len, results.values()))
    figure, axes = plt.subplots(
        len(results), n_columns, figsize=(16, 4.6), layout="constrained", sharey=True
    )
    low, high = scipy.stats.binom(REPLICATIONS, 1 / BINS).interval(0.99)
    lines = ["| model | quantity | p |", "| --- | --- | --- |"]
    for row, (model, found) in zip(axes, results.items(), strict=True):
        for ax in row[len(found) :]:
            ax.set_axis_off()
        for ax, (name, values) in zip(row, found.items(), strict=False):
            ax.axhspan(low, high, color="0.85")
            ax.bar(np.arange(BINS), histogram(values), width=1, color="C0")
            ax.set_title(name, fontsize=9)
            ax.set_xticks([])
            lines.append(f"| {model} | {name} | {p_value(values):.3f} |")
        row[0].set_ylabel(model, fontsize=8)
    figure.savefig(docs / "images" / "calibration.png", dpi=110)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
