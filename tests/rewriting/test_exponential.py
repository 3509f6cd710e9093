import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.traversal import explicit_graph_inputs
from scipy.linalg import expm

from tests.helpers import (
    AS_WRITTEN,
    PY,
    compile_py,
    has_kron,
    largest_size_in,
    random_matrix,
    symbolic_dense_kron,
)

I2, I3, I4 = np.eye(2), np.eye(3), np.eye(4)


@pytest.fixture
def arrays(rng):
    return [random_matrix(rng, n, n) / 4 for n in (2, 3, 4)]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def symbolic(*arrays, static=True):
    return [
        pt.tensor(f"A{i}", dtype="float64", shape=a.shape if static else (None, None))
        for i, a in enumerate(arrays)
    ]


def kron_sum(A, B):
    """Write the Kronecker sum with identity matrices of the factors' sizes."""
    return pt.linalg.kron(A, pt.eye(B.shape[0])) + pt.linalg.kron(pt.eye(A.shape[0]), B)


@pytest.mark.parametrize("static", [True, False])
def test_two_factors(arrays, rng, static):
    a, b, _ = arrays
    A, B = symbolic(a, b, static=static)
    x = rng.normal(size=6)
    function = compile_py([A, B], pt.linalg.expm(kron_sum(A, B)) @ x)
    assert not has_kron(function.maker.fgraph)
    expected = expm(np.kron(a, I3) + np.kron(I2, b)) @ x
    assert_allclose(function(a, b), expected, rtol=1e-10)
    assert largest_size_in(function, a, b) < 36


def test_scalars_identities_and_three_factors(arrays):
    a, b, c = arrays
    A, B, C = symbolic(*arrays)
    s = pt.dscalar("s")
    X = (
        s * pt.linalg.kron(A, pt.linalg.kron(I3, I4))
        - pt.linalg.kron(I2, pt.linalg.kron(B, I4)) / 2
        + pt.linalg.kron(pt.linalg.kron(I2, I3), C.T)
        + pt.linalg.kron(I2, pt.linalg.kron(B.T, I4))
        + 0.3 * pt.eye(24)
    )
    function = compile_py([A, B, C, s], pt.linalg.expm(X).sum(axis=0))
    assert not has_kron(function.maker.fgraph)
    dense = (
        0.7 * np.kron(a, np.kron(I3, I4))
        - np.kron(I2, np.kron(b, I4)) / 2
        + np.kron(np.kron(I2, I3), c.T)
        + np.kron(I2, np.kron(b.T, I4))
        + 0.3 * np.eye(24)
    )
    assert_allclose(function(a, b, c, 0.7), expm(dense).sum(axis=0), rtol=1e-10)


def test_transposed(arrays, rng):
    a, b, _ = arrays
    A, B = symbolic(a, b)
    s, x = pt.dscalar("s"), rng.normal(size=6)
    dense = np.kron(a, I3) + np.kron(I2, b)
    for X, expected in [
        (kron_sum(A, B).T, dense.T),
        (s * kron_sum(A, B).T, 0.7 * dense.T),
        (pt.linalg.kron(A, I3).T + kron_sum(A, B), dense + np.kron(a, I3).T),
        (pt.linalg.kron(A, I3).T, np.kron(a, I3).T),
    ]:
        function = compile_py([A, B, s], pt.linalg.expm(X) @ x)
        assert not has_kron(function.maker.fgraph)
        assert_allclose(function(a, b, 0.7), expm(expected) @ x, rtol=1e-10)


# Gradients that are taken first, in the factors and in scalars, of which t may be zero

LOSSES = {
    "bilinear form": lambda X, x: x @ (pt.linalg.expm(X) @ x**2),
    "row": lambda X, x: (pt.linalg.expm(X)[3] * x).sum(),
    "sum": lambda X, x: pt.log(pt.linalg.expm(X).sum()),
    "trace": lambda X, x: pt.log(pt.trace(pt.linalg.expm(X))),
}
SUMS = {
    "A (+) B": lambda kron, A, B, c, t: kron(A, pt.eye(4)) + kron(pt.eye(3), B),
    "t (A (+) c B)": lambda kron, A, B, c, t: t * (kron(A, pt.eye(4)) + c * kron(pt.eye(3), B)),
    "(c A (+) B).T + t I": lambda kron, A, B, c, t: (
        (c * kron(A, pt.eye(4)) + kron(pt.eye(3), B)).T + t * pt.eye(12)
    ),
    "t (A (x) I)": lambda kron, A, B, c, t: t * kron(A, pt.eye(4)),
    "A (+) B - A.T (+) c I": lambda kron, A, B, c, t: (
        kron(A, pt.eye(4)) + kron(pt.eye(3), B) - kron(A.T, pt.eye(4)) / c
    ),
}


@pytest.mark.parametrize(
    ("loss", "name"),
    [("bilinear form", name) for name in SUMS] + [(loss, "t (A (+) c B)") for loss in LOSSES],
)
def test_gradient_taken_first(loss, name, arrays, rng):
    _, a, b = arrays
    A, B = symbolic(a, b)
    c, t, x = pt.dscalar("c"), pt.dscalar("t"), rng.normal(size=12)

    def compiled(kron, mode):
        cost = LOSSES[loss](SUMS[name](kron, A, B, c, t), x)
        wrt = [var for var in (A, B, c, t) if var in explicit_graph_inputs([cost])]
        return compile_py([A, B, c, t], pt.grad(cost, wrt), mode=mode)

    function = compiled(pt.linalg.kron, PY)
    assert not has_kron(function.maker.fgraph)
    dense = compiled(symbolic_dense_kron, AS_WRITTEN)
    for time in (0.7, 0.0):
        values = [a, b, np.array(0.4), np.array(time)]
        # The gradient of the exponential of B is that of a matrix with eight rows
        assert largest_size_in(function, *values) < 144
        for result, expected in zip(function(*values), dense(*values), strict=True):
            assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


def test_one_factor_beside_an_identity(arrays, rng):
    a, *_ = arrays
    [A] = symbolic(a)
    x = rng.normal(size=6)
    function = compile_py([A], pt.linalg.expm(pt.linalg.kron(A, I3)) @ x)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(a), expm(np.kron(a, I3)) @ x, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("product", "more than one factor"), ("sizes", "known to agree")],
)
def test_refused(arrays, name, reason):
    a, b, _ = arrays
    A, B = symbolic(a, b, static=False)
    if name == "product":
        X, dense = pt.linalg.kron(A, B), np.kron(a, b)
    else:
        # (2, 2) (x) I_3 and I_2 (x) (3, 3), of which the graph knows only some of the sizes
        X = pt.linalg.kron(A, I3) + pt.linalg.kron(pt.eye(A.shape[0]), B)
        dense = np.kron(a, I3) + np.kron(I2, b)
    function = compile_py([A, B], pt.linalg.expm(X))
    assert_allclose(function(a, b), expm(dense), rtol=1e-10)
    entries = function.maker.fgraph.kron_journal.entries
    assert any(entry.refusal and reason in entry.refusal.reason for entry in entries)
