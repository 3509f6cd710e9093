"""Missing cells, sampled and integrated out: ``python -m ... FIELD OUTPUT``.

A grid of 20 x 30 cells, of which single ones at random or whole rows are missing; level,
amplitude, two length-scales and, with noise, its standard deviation are unknown. Effective
samples a second of sampling, without compilation: the least of the parameters that both models
have, of two chains. Also the seconds of one log-density with its gradient.
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

SIZES = (20, 30)
# Which cells are missing, and how many of these
PATTERNS = [("cells", 10), ("cells", 100), ("rows", 1), ("rows", 3), ("rows", 6)]
# The kernel of the second axis, and the standard deviation of the noise
FIELDS = {
    "smooth": (lambda lags, length_scale: pt.exp(-((lags / length_scale) ** 2) / 2), 0.1),
    "rough": (lambda lags, length_scale: pt.exp(-lags / length_scale), None),
}
WAYS = {"imputed": False, "integrated out": True}
PACKAGES = ["pymc", "pytensor", "nutpie", "numba", "arviz"]


def covariances(field, amplitude, length_scale):
    kernel, _ = FIELDS[field]
    rows, columns = map(measure.lags, SIZES)
    return [
        amplitude**2 * pt.exp(-rows / length_scale[0]),
        kernel(columns, length_scale[1]),
    ]


def data(field, what, count):
    _, sigma = FIELDS[field]
    grid = pk.TensorNormal.dist(1.0, covariances(field, 1.0, [5.0, 5.0]), sigma=sigma)
    y = pm.draw(grid, random_seed=1)
    rng = np.random.default_rng(2)
    if what == "rows":
        y[rng.permutation(SIZES[0])[:count]] = np.nan
    else:
        y.flat[rng.permutation(y.size)[:count]] = np.nan
    return y


def model(field, y, marginalize_missing):
    _, sigma = FIELDS[field]
    with pm.Model() as model:
        level = pm.Normal("level")
        amplitude = pm.HalfNormal("amplitude")
        length_scale = pm.LogNormal("length_scale", 1.5, 0.5, shape=2)
        covs = covariances(field, amplitude, length_scale)
        noise = {} if sigma is None else {"sigma": pm.HalfNormal("sigma")}
        pk.TensorNormal(
            "y", level, covs, **noise, observed=y, marginalize_missing=marginalize_missing
        )
    return model


def seconds_of_a_gradient(model):
    function = model.logp_dlogp_function(ravel_inputs=True, mode="NUMBA")
    function.set_extra_values({})
    point = pm.blocking.DictToArrayBijection.map(model.initial_point())

    def call():
        start = time.perf_counter()
        function(point)
        return time.perf_counter() - start

    return float(np.median([call() for _ in range(100)]))


def sample(model):
    compiled = nutpie.compile_pymc_model(model)
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
        "gradient": seconds_of_a_gradient(model),
    }
    return run, parameters


def measure_field(field):
    cells = []
    for what, count in PATTERNS:
        y = data(field, what, count)
        runs, posteriors = zip(
            *(sample(model(field, y, way)) for way in WAYS.values()), strict=True
        )
        cells.append(
            {
                "what": f"{count} {what if count > 1 else what[:-1]}",
                "missing": int(np.isnan(y).sum()),
                "runs": dict(zip(WAYS, runs, strict=True)),
                "difference": largest_difference(*posteriors),
            }
        )
    return cells


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, field, output = sys.argv
    measure.save(Path(output), measure_field(field), PACKAGES)
