"""``solve(kron(A, B), b)`` with the bundle against the same graph without it, one thread."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from pytensor.compile.mode import get_mode

from tests.helpers import has_kron, random_matrix

ROUNDS = {10: 2000, 50: 10, 100: 2}


@pytest.mark.parametrize("bundle", ["with the bundle", "without"])
@pytest.mark.parametrize("n", ROUNDS)
def bench_solve(benchmark, n, bundle):
    benchmark.group = f"solve(kron(A, B), b), A and B {n} x {n}"
    mode = get_mode("NUMBA")
    if bundle == "without":
        mode = mode.excluding("kron")
    A, B, b = pt.tensor("A", shape=(n, n)), pt.tensor("B", shape=(n, n)), pt.dvector("b")
    solve = pytensor.function([A, B, b], pt.linalg.solve(pt.linalg.kron(A, B), b), mode=mode)
    assert has_kron(solve.maker.fgraph) == (bundle == "without")
    solve.trust_input = True
    rng = np.random.default_rng(0)
    arguments = random_matrix(rng, n, n), random_matrix(rng, n, n), rng.normal(size=n * n)
    rounds = ROUNDS[n] if bundle == "without" else 2000
    benchmark.pedantic(solve, arguments, rounds=rounds, warmup_rounds=1)
