"""A first gradient from empty caches: ``python -m ... [once] DISTRIBUTION WORK OUTPUT``.

Seconds from imported packages to the first gradient of a model of 50 x 50 cells with two
length-scales, compilation included, each in a fresh process; the median of three.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from tests.benchmarks import measure
from tests.benchmarks.distributions import DISTRIBUTIONS, PACKAGES

SIZES = (50, 50)


def first_gradient(distribution, work):
    start = time.perf_counter()
    _, _, mu, x = measure.arguments(work, SIZES)
    with pm.Model() as model:
        length_scale = pm.HalfNormal("length_scale", shape=2)
        covs = [pt.exp(-measure.lags(n) / length_scale[i]) for i, n in enumerate(SIZES)]
        sigma = pm.HalfNormal("sigma") if work.noisy else None
        cls, parameters = distribution.parameters(mu, covs, sigma)
        cls("y", **parameters, observed=x.reshape(parameters["mu"].shape))
    dlogp = model.compile_dlogp(mode=distribution.mode)
    gradient = dlogp(model.initial_point())
    assert np.isfinite(gradient).all()
    return time.perf_counter() - start


def in_fresh_process(name, work):
    with tempfile.TemporaryDirectory() as caches:
        flags = f"{os.environ.get('PYTENSOR_FLAGS', '')},base_compiledir={caches}".lstrip(",")
        environment = {**os.environ, "PYTENSOR_FLAGS": flags, "NUMBA_CACHE_DIR": caches}
        command = [sys.executable, "-m", __spec__.name, "once", name, work]
        run = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case "once", name, work:
            print(first_gradient(DISTRIBUTIONS[name], measure.WORKS[work]))
        case name, work, output:
            seconds = [in_fresh_process(name, work) for _ in range(3)]
            measure.save(Path(output), {"seconds": float(np.median(seconds))}, PACKAGES)
