"""Log-density and gradient on JAX, on whatever device it finds: ``python -m ... DTYPE OUTPUT``.

The gradient is JAX's own, of the program that PyMC gives to samplers that run on JAX.
"""

import math
import sys
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
    expected, *gradients = measure.prepare_limit(work, covs, sigma, mu, x)()
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
    memory = programs[str(work)].memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "sizes": sizes,
        "work": work.slug,
        "errors": [error(value, expected), max(map(error, actual, gradients))],
        "bytes": held,
        "seconds": measure.medians(
            {name: partial(call, program) for name, program in programs.items()}
        ),
    }


def device_name():
    [device, *_] = jax.devices()
    return measure.processor() if device.platform == "cpu" else device.device_kind


if __name__ == "__main__":
    _, dtype, output = sys.argv
    pytensor.config.floatX = dtype
    jax.config.update("jax_enable_x64", dtype == "float64")
    results = [measure_grid(sizes, work, dtype) for work in WORKS for sizes in GRIDS]
    results = {"device": device_name(), "grids": results}
    measure.save(Path(output), results, ["pymc", "pytensor", "jax"])
