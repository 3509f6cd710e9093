"""The table of ``docs/benchmarks.md``: implementations called in turns, medians, one BLAS thread.

``uv run python -m tests.benchmarks.interleaved``

A machine that others use too is faster and slower by turns. What is called in turns shares that;
`pytest-benchmark` runs one implementation after the other.
"""

import time
import warnings

import numpy as np
import pymc as pm
import pytensor.tensor as pt

# Loads the BLAS that compiled functions call: a limit finds only what is loaded
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_limits

from pymc_kron import KroneckerMvNormal
from tests.benchmarks import bench_draws, bench_logp

TURNS = 3000


def medians(functions, turns):
    """Return the median seconds of each function, called in turns with its arguments."""
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, (function, *arguments) in functions.items():
            start = time.perf_counter()
            function(*arguments)
            times[name].append(time.perf_counter() - start)
    return {name: np.median(seconds) for name, seconds in times.items()}


def trusting(inputs, outputs, **kwargs):
    function = pm.compile(inputs, outputs, **kwargs)
    function.trust_input = True
    return function


def model_functions(n, with_gradient):
    point = np.log(bench_logp.LENGTH_SCALES)
    functions = {}
    for implementation in bench_logp.IMPLEMENTATIONS:
        model = bench_logp.model(implementation, n)
        outputs = [model.logp(), model.dlogp()] if with_gradient else model.logp()
        functions[implementation] = (trusting(model.value_vars, outputs), point)
    return functions


def factor_functions(n):
    lags = bench_logp.lags(n)
    arrays = [*(np.exp(-lags / s) for s in bench_logp.LENGTH_SCALES), bench_logp.values(n)]
    A, B, x = (pt.tensor(name, shape=a.shape) for name, a in zip("ABx", arrays, strict=True))
    logp = pm.logp(KroneckerMvNormal.dist(0, [A, B]), x)
    return {
        "KroneckerMvNormal": (trusting([A, B, x], logp), *arrays),
        "SciPy": (bench_logp.scipy_logp, *arrays),
    }


def draw_functions():
    [samples] = bench_draws.posterior().posterior["length_scale"].to_numpy()

    def draw_all(draw):
        for sample in samples:
            draw(sample)

    functions = {}
    for implementation in bench_draws.IMPLEMENTATIONS:
        model = bench_draws.model(implementation)
        draw = trusting([model["length_scale"]], model["y"], random_seed=1)
        functions[implementation] = (draw_all, draw)
    return functions


def print_row(work, functions, turns=TURNS):
    for function, *arguments in functions.values():
        function(*arguments)
    reference, *others = medians(functions, turns).items()
    cells = [f"{reference[0]} {reference[1] * 1e6:,.0f}"]
    cells += [f"{name} {s * 1e6:,.0f} ({s / reference[1]:.2f})" for name, s in others]
    print(f"| {work} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with threadpool_limits(1):
        for n in bench_logp.SIZES:
            print_row(f"logp of factors, n = {n}", factor_functions(n))
        for work, with_gradient in (("logp", False), ("logp and gradient", True)):
            for n in bench_logp.SIZES:
                print_row(f"{work}, n = {n}", model_functions(n, with_gradient), TURNS // 3)
        print_row("100 draws of 732 cells", draw_functions(), turns=5)
