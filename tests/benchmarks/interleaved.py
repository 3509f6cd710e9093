"""The table of ``docs/benchmarks.md``: implementations called in turns, medians, one BLAS thread.

``uv run python -m tests.benchmarks.interleaved``

A machine that others use too is faster and slower by turns. What is called in turns shares that;
`pytest-benchmark` runs one implementation after the other.
"""

import time
import warnings

import numpy as np

# Loads the BLAS that compiled functions call: a limit finds only what is loaded
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_limits

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


def model_functions(n, *, with_gradient):
    return {
        implementation: bench_logp.model_function(implementation, n, with_gradient=with_gradient)
        for implementation in bench_logp.IMPLEMENTATIONS
    }


def draw_functions():
    [samples] = bench_draws.posterior().posterior["length_scale"].to_numpy()

    def draw_all(draw):
        for sample in samples:
            draw(sample)

    functions = {}
    for implementation in bench_draws.IMPLEMENTATIONS:
        model = bench_draws.model(implementation)
        draw = bench_logp.trusting([model["length_scale"]], model["y"], random_seed=1)
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
            print_row(f"logp of factors, n = {n}", bench_logp.factor_functions(n))
        for work, with_gradient in (("logp", False), ("logp and gradient", True)):
            for n in bench_logp.SIZES:
                print_row(
                    f"{work}, n = {n}", model_functions(n, with_gradient=with_gradient), TURNS // 3
                )
        print_row("100 draws of 732 cells", draw_functions(), turns=5)
