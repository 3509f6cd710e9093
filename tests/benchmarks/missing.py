"""Missing cells, sampled and integrated out: ``python -m ... NOISE OUTPUT``.

A grid of 40 x 50 cells of which some are missing at random; level, amplitude, two length-scales
and, with noise, its standard deviation are unknown. Effective samples a second of sampling,
without compilation: the least of the parameters that both models have, of two chains.
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

import pymc_kron as pk
from tests.benchmarks import measure
from tests.benchmarks.non_centred import extreme, largest_difference

SIZES = (40, 50)
MISSING = (10, 30, 100, 300, 1000)
NOISES = {"without": None, "with": 0.5}
WAYS = {"imputed": False, "integrated out": True}
PACKAGES = ["pymc", "pytensor", "nutpie", "numba", "arviz"]


def covariances(amplitude, length_scale):
    rows, columns = map(measure.lags, SIZES)
    return [amplitude**2 * pt.exp(-rows / length_scale[0]), pt.exp(-columns / length_scale[1])]


def data(noise, n_missing):
    grid = pk.TensorNormal.dist(1.0, covariances(1.0, [5.0, 8.0]), sigma=noise)
    y = pm.draw(grid, random_seed=1)
    cells = np.random.default_rng(2).permutation(y.size)[:n_missing]
    y.flat[cells] = np.nan
    return y


def model(noise, y, marginalize_missing):
    with pm.Model() as model:
        level = pm.Normal("level")
        amplitude = pm.HalfNormal("amplitude")
        length_scale = pm.LogNormal("length_scale", 2, 0.5, shape=2)
        sigma = None if noise is None else pm.HalfNormal("sigma")
        covs = covariances(amplitude, length_scale)
        pk.TensorNormal(
            "y", level, covs, sigma=sigma, observed=y, marginalize_missing=marginalize_missing
        )
    return model


def sample(noise, y, way):
    compiled = nutpie.compile_pymc_model(model(noise, y, WAYS[way]))
    start = time.perf_counter()
    trace = nutpie.sample(compiled, draws=500, chains=2, cores=2, seed=1, progress_bar=False)
    seconds = time.perf_counter() - start
    posterior = trace["posterior"].to_dataset()
    parameters = posterior[[name for name in posterior if not name.startswith("y")]]
    run = {
        "seconds": seconds,
        "ess": extreme(az.ess(parameters), min),
        "r_hat": extreme(az.rhat(parameters), max),
        "gradients": int(trace["sample_stats"]["n_steps"].sum()),
    }
    return run, parameters


def measure_ways(name):
    noise = NOISES[name]
    cells = []
    for n_missing in MISSING:
        y = data(noise, n_missing)
        runs, posteriors = zip(*(sample(noise, y, way) for way in WAYS), strict=True)
        difference = largest_difference(*posteriors)
        cells.append(
            {
                "missing": n_missing,
                "runs": dict(zip(WAYS, runs, strict=True)),
                "difference": difference,
            }
        )
        print(cells[-1], flush=True)
    return cells


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, noise, output = sys.argv
    measure.save(Path(output), measure_ways(noise), PACKAGES)
