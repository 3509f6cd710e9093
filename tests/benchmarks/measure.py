"""What is measured, and how: implementations called in turns with the limit, in one process.

A machine that others use too is faster and slower by turns. What is called in turns shares that,
so ratios to the limit compare between processes, and so between environments. Only NumPy, SciPy
and threadpoolctl are imported.
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

from tests.benchmarks import limit

GRIDS = [
    *[(n, n) for n in (10, 50, 100, 200)],
    *[(n, n, n) for n in (10, 20, 50, 100)],
]
SIGMA = 0.5
# How long the turns of a cell of a table take together, within these numbers of turns
SECONDS = 4.0
FEWEST, MOST = 5, 2000
RTOL = 1e-7


class Work(NamedTuple):
    """What an implementation computes."""

    noisy: bool
    with_gradient: bool

    def __str__(self):
        return f"{'noisy ' * self.noisy}logp{' and gradient' * self.with_gradient}"

    @property
    def slug(self):
        return str(self).replace(" ", "-")


WORKS = {
    work.slug: work
    for work in (Work(False, False), Work(False, True), Work(True, False), Work(True, True))
}

# Computes a value, or a value and gradients, that NumPy can read
Call = Callable[[], Any]
# Makes a call from a work and ``covs, sigma, mu, x``; sigma is None without noise. Gradients are
# in all of them, in this order
Prepare = Callable[..., Call]


def arguments(work: Work, sizes: Sequence[int]):
    """Return ``covs, sigma, mu, x`` of a grid."""
    rng = np.random.default_rng(0)
    covs = [np.exp(-lags(n) / (2.0 + i)) for i, n in enumerate(sizes)]
    mu, x = rng.normal(size=(2, math.prod(sizes)))
    return covs, np.array(SIGMA) if work.noisy else None, mu, x


def lags(n: int) -> np.ndarray:
    return np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float)


def prepare_limit(work, covs, sigma, mu, x):
    functions = {
        "logp": limit.logp,
        "logp-and-gradient": limit.logp_and_gradient,
        "noisy-logp": limit.noisy_logp,
        "noisy-logp-and-gradient": limit.noisy_logp_and_gradient,
    }
    function = functions[work.slug]
    rest = [sigma, mu, x] if work.noisy else [mu, x]
    return lambda: function(covs, *rest)


def measure_cell(work: Work, sizes: Sequence[int], implementations: Mapping[str, Prepare]) -> dict:
    """Return the median seconds of the limit and of each implementation, called in turns.

    An implementation that raises, or whose numbers aren't those of the limit, has no time.
    """
    values = arguments(work, sizes)
    calls = {"limit": prepare_limit(work, *values)}
    expected = calls["limit"]()
    failures = {}
    for name, prepare in implementations.items():
        try:
            call = prepare(work, *values)
            check_close(call(), expected)
        except Exception as error:
            message, *_ = str(error).strip().splitlines() or [""]
            failures[name] = f"{type(error).__name__}: {message}"
        else:
            calls[name] = call
    return {"sizes": sizes, "seconds": medians(calls), "failures": failures}


def check_close(actual, expected):
    """Raise unless a value, and gradients, are as expected; those of factors up to symmetry."""
    if isinstance(expected, float):
        actual, expected = [actual], [expected]
    for a, b in zip(actual, expected, strict=True):
        a = np.asarray(a)
        if a.ndim == 2:
            a = (a + a.T) / 2
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        if not error < RTOL:
            raise ArithmeticError(f"off by {error:.0e}")


def medians(
    calls: Mapping[str, Call],
    fewest: int = FEWEST,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each call, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    for turn in range(MOST):
        if turn >= fewest and time.perf_counter() - start > SECONDS:
            break
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append(clock() - begin)
    return {name: float(np.median(values)) for name, values in times.items()}


def bytes_held(program: Any) -> int:
    """Return the memory that a device holds for a program compiled by JAX, as it plans it."""
    memory = program.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(sizes)


def use_one_core():
    """Keep the process on one core: some libraries have no other way to use one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def save(path: Path, results: Any, packages: Sequence[str]):
    """Write results, and what they were measured with, as JSON."""
    packages = sorted({"numpy", "scipy", *packages})
    provenance = {
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"Python": platform.python_version()}
        | {package: version(package) for package in packages},
        "kernels": sorted(
            {info["architecture"] for info in threadpool_info() if "architecture" in info}
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": results, **provenance}, indent=1) + "\n")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main(implementations: Mapping[str, Prepare], packages: Sequence[str]):
    """Measure a work on all grids: ``python -m MODULE WORK OUTPUT``."""
    _, slug, output = sys.argv
    use_one_core()
    work = WORKS[slug]
    save(Path(output), [measure_cell(work, sizes, implementations) for sizes in GRIDS], packages)
