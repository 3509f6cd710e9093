import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import expm

from tests.helpers import compile_py, has_kron, largest_computed_size, random_matrix

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
    outputs = pt.linalg.expm(kron_sum(A, B)) @ x
    assert largest_computed_size([A, B], outputs, [a, b], mode="NUMBA") < 36


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
