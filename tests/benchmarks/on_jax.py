"""Log-density and gradient on JAX, on whatever device it finds: ``python -m ... DTYPE OUTPUT``.

The gradient is JAX's own, of the program that PyMC gives to samplers that run on JAX. On a CPU, JAX
has one core, and the time is that of the processor, which others that use the machine don't change.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from pymc.sampling.jax import get_jaxified_graph

from pymc_kron import KroneckerMvNormal
from tests.benchmarks import measure

GRIDS = [(20, 20, 25), (40, 50, 50), (100, 100, 100), (200, 200, 250)]
WORKS = [measure.Work(noisy, with_gradient=True) for noisy in (False, True)]


def jaxified(sizes, noisy):
    """Return the log-density of the factors, sigma if there is noise, the mean and the value."""
    N = math.prod(sizes)
    covs = [pt.tensor(shape=(n, n)) for n in sizes]
    sigma = pt.tensor(shape=()) if noisy else None
    mu, x = pt.tensor(shape=(N,)), pt.tensor(shape=(N,))
    logp = pm.logp(KroneckerMvNormal.dist(mu, covs, sigma=sigma), x)
    inputs = [*covs, *([] if sigma is None else [sigma]), mu, x]
    function = get_jaxified_graph(inputs, [logp])
    return lambda *arrays: function(*arrays)[0]


def error(actual, expected):
    """Return the largest error relative to the largest entry; that of factors up to symmetry."""
    actual = np.asarray(actual, dtype=float)
    if actual.ndim == 2:
        actual = (actual + actual.T) / 2
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def measure_grid(sizes, work, dtype):
    covs, sigma, mu, x = measure.arguments(work, sizes)
    limit = measure.prepare_limit(work, covs, sigma, mu, x)
    expected, *gradients = limit()
    arrays = [*covs, *([] if sigma is None else [sigma]), mu, x]
    arrays = [jax.device_put(array.astype(dtype)) for array in arrays]

    logp = jaxified(sizes, work.noisy)
    with_gradient = jax.value_and_grad(logp, argnums=tuple(range(len(arrays))))
    programs = {
        str(name): jax.jit(function).lower(*arrays).compile()
        for name, function in [(work._replace(with_gradient=False), logp), (work, with_gradient)]
    }

    def call(program):
        return jax.block_until_ready(program(*arrays))

    value, actual = call(programs[str(work)])
    return {
        "sizes": sizes,
        "work": work.slug,
        "errors": [error(value, expected), max(map(error, actual, gradients))],
        "bytes": measure.bytes_held(programs[str(work)]),
        "seconds": measure.medians(
            {
                "limit": limit,
                **{name: partial(call, program) for name, program in programs.items()},
            },
            fewest=3,
            clock=time.process_time if on_cpu() else time.perf_counter,
        ),
    }


def on_cpu():
    return jax.default_backend() == "cpu"


if __name__ == "__main__":
    _, dtype, output = sys.argv
    measure.use_one_core()
    pytensor.config.floatX = dtype
    jax.config.update("jax_enable_x64", dtype == "float64")
    results = [measure_grid(sizes, work, dtype) for work in WORKS for sizes in GRIDS]
    device = f"one core of {measure.processor()}" if on_cpu() else jax.devices()[0].device_kind
    results = {"device": device, "grids": results}
    measure.save(Path(output), results, ["pymc", "pytensor", "jax"])
