"""``solve(kron(A, B), b)`` with the bundle and without: ``python -m ... OUTPUT``."""

import sys
from pathlib import Path

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.compile.mode import get_mode

from tests.benchmarks import measure
from tests.helpers import has_kron, random_matrix


def measure_solve(n):
    rng = np.random.default_rng(0)
    arguments = random_matrix(rng, n, n), random_matrix(rng, n, n), rng.normal(size=n * n)
    bundle = get_mode("NUMBA")
    seconds = {}
    for name, mode in [("without", bundle.excluding("kron")), ("with the bundle", bundle)]:
        A, B, b = pt.tensor("A", shape=(n, n)), pt.tensor("B", shape=(n, n)), pt.dvector("b")
        solution = pt.linalg.solve(pt.linalg.kron(A, B), b)
        solve = pytensor.function([A, B, b], solution, mode=mode)
        solve.trust_input = True
        assert has_kron(solve.maker.fgraph) == (name == "without")
        seconds |= measure.medians({name: lambda solve=solve: solve(*arguments)}, fewest=2)
    return {"n": n, "seconds": seconds}


if __name__ == "__main__":
    _, output = sys.argv
    measure.use_one_core()
    measure.save(Path(output), [measure_solve(n) for n in (10, 50, 100)], ["pymc", "pytensor"])
