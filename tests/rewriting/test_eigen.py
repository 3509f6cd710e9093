import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.linalg
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    WITHOUT_KRON,
    assert_gradient_after_rewrites,
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    random_spd,
)

batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")

TOLERANCE = {"float64": 1e-11, "float32": 2e-4}


def random_symmetric(rng, n, batch=(), dtype="float64"):
    """Return a symmetric matrix with eigenvalues of both signs."""
    matrix = rng.normal(size=(*batch, n, n))
    return (matrix + np.swapaxes(matrix, -1, -2)).astype(dtype)


def square_matrices(arrays):
    """Return variables that are known to be square."""
    return [
        pt.tensor(f"A{i}", dtype=array.dtype, shape=array.shape) for i, array in enumerate(arrays)
    ]


def same_up_to_signs(vectors, expected, tolerance):
    signs = np.sign((vectors * expected).sum(-2, keepdims=True))
    assert_allclose(signs * vectors, expected, atol=tolerance)


WRAPPERS = {
    "plain": lambda K: K,
    "transposed": lambda K: K.T,
    "negated": lambda K: -K,
    "scaled": lambda K: -2.5 * K / 3,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eigenvalues_and_eigenvectors(dtype, lower, wrapper):
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n, dtype=dtype) for n in (3, 2, 4)]
    A, B, C = factors = square_matrices(arrays)
    wrap = WRAPPERS[wrapper]
    K_var = wrap(pt.linalg.kron(A, pt.linalg.kron(B, C).T).astype(dtype)).astype(dtype)
    K = wrap(dense_kron(*arrays).astype("float64"))
    w_var, V_var = pt.linalg.eigh(K_var, lower=lower)
    values_var = pt.linalg.eigvalsh(K_var, lower=lower)

    function = compile_py(factors, [w_var, V_var, values_var])
    w, V, values = function(*arrays)
    assert w.dtype == V.dtype == values.dtype == dtype
    assert has_kron(function.maker.fgraph)
    tolerance = TOLERANCE[dtype] * abs(K).max()
    expected_w, expected_V = scipy.linalg.eigh(K)
    for eigenvalues in (w, values):
        assert (np.diff(eigenvalues) >= 0).all()
        assert_allclose(eigenvalues, expected_w, atol=tolerance)
    assert_allclose(V.T @ V, np.eye(24), atol=TOLERANCE[dtype])
    assert_allclose(V * w @ V.T, K, atol=tolerance)
    same_up_to_signs(V, expected_V, 1e3 * TOLERANCE[dtype])


@pytest.mark.parametrize("batches", [((5,), (5,)), ((5,), ()), ((), (5,)), ((2, 1), (5,))], ids=str)
def test_batches(batches):
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n, batch) for n, batch in zip((3, 4), batches, strict=True)]
    factors = square_matrices(arrays)
    K_var, K = batched_kron(*factors), dense_kron(*arrays)
    function = compile_py(factors, [*pt.linalg.eigh(K_var), pt.linalg.eigvalsh(K_var)])
    w, V, values = function(*arrays)
    expected_w, expected_V = np.linalg.eigh(K)
    assert_allclose(w, expected_w, atol=1e-12)
    assert_allclose(values, expected_w, atol=1e-12)
    same_up_to_signs(V, expected_V, 1e-10)


def test_integers():
    arrays = [np.array([[2, 1], [1, 3]]), np.array([[1, -1, 0], [-1, 2, 1], [0, 1, 4]])]
    factors = square_matrices(arrays)
    K = pt.linalg.kron(*factors)
    w, V, values = compile_py(factors, [*pt.linalg.eigh(K), pt.linalg.eigvalsh(K)])(*arrays)
    assert_allclose(w, np.linalg.eigvalsh(dense_kron(*arrays)), atol=1e-12)
    assert_allclose(values, w)
    assert_allclose(V * w @ V.T, dense_kron(*arrays), atol=1e-12)


def test_the_eigenvalues_alone_need_no_large_array():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (7, 6)]
    factors = square_matrices(arrays)
    K = pt.linalg.kron(*factors)
    for values in (pt.linalg.eigvalsh(K), pt.linalg.eigh(K)[0]):
        function = compile_py(factors, values)
        assert not has_kron(function.maker.fgraph)
        assert largest_size_in(function, *arrays) <= 49


PRODUCTS = {
    "V' x": lambda w, V, x: V.T @ x,
    "x V": lambda w, V, x: x @ V,
    "V x": lambda w, V, x: V @ x,
    "V (w V' x)": lambda w, V, x: V @ (w * (V.T @ x)),
    "V w (V' x)": lambda w, V, x: (V * w) @ (V.T @ x),
    "V / w (V' x)": lambda w, V, x: (V / w) @ (V.T @ x),
    "V (diag(w) (V' x))": lambda w, V, x: V @ (pt.diag(w) @ (V.T @ x)),
    "x V w V'": lambda w, V, x: (x @ V) @ (w[:, None] * V.T),
    "V_k (V_k' x)": lambda w, V, x: V[:, -5:] @ (V[:, -5:].T @ x),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_with_the_eigenvectors_do_not_form_them(product):
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (7, 6)]
    factors = square_matrices(arrays)
    K = dense_kron(*arrays)
    x, x_var = rng.normal(size=42), pt.vector("x", shape=(42,))
    out = PRODUCTS[product](*pt.linalg.eigh(pt.linalg.kron(*factors)), x_var)
    function = compile_py([*factors, x_var], out)
    assert not has_kron(function.maker.fgraph)
    assert largest_size_in(function, *arrays, x) <= 49

    _, V = np.linalg.eigh(K)
    # The sign that the rewritten program gives each eigenvector
    V_var = pt.linalg.eigh(pt.linalg.kron(*factors))[1]
    V = V * np.sign((V * compile_py(factors, V_var)(*arrays)).sum(0))
    expected = {
        "V' x": lambda: V.T @ x,
        "x V": lambda: V.T @ x,
        "V x": lambda: V @ x,
        "V / w (V' x)": lambda: np.linalg.solve(K, x),
        "V_k (V_k' x)": lambda: V[:, -5:] @ (V[:, -5:].T @ x),
    }.get(product, lambda: K @ x)()
    assert_allclose(function(*arrays, x), expected, atol=1e-9)


def test_products_with_eigenvectors_of_unknown_size():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (7, 6)]
    A, B = pt.dmatrices("A", "B")
    x, x_var = rng.normal(size=42), pt.dvector("x")
    _, V = pt.linalg.eigh(pt.linalg.kron(assume(A, symmetric=True), B))
    assert largest_size_in(compile_py([A, B, x_var], V.T @ x_var), *arrays, x) <= 49


def test_generalised_problem():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, 3), random_symmetric(rng, 4)]
    metrics = [-random_spd(rng, 3), -random_spd(rng, 4)]
    A, B, C, D = factors = square_matrices([*arrays, *metrics])
    K, M = pt.linalg.kron(A, B), pt.linalg.kron(C, D)
    w, V, values = compile_py(factors, [*pt.linalg.eigh(K, M), pt.linalg.eigvalsh(K, M)])(
        *arrays, *metrics
    )
    expected_w, expected_V = scipy.linalg.eigh(dense_kron(*arrays), dense_kron(*metrics))
    assert_allclose(w, expected_w, atol=1e-12)
    assert_allclose(values, expected_w, atol=1e-12)
    assert_allclose(V.T @ dense_kron(*metrics) @ V, np.eye(12), atol=1e-12)
    same_up_to_signs(V, expected_V, 1e-10)
    function = compile_py(factors, pt.linalg.eigvalsh(K, M))
    assert not has_kron(function.maker.fgraph)


def test_generalised_problem_with_factors_of_other_sizes():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (3, 2, 4)]
    metrics = [random_spd(rng, n) for n in (6, 4)]
    A, B, C, D, E = factors = square_matrices([*arrays, *metrics])
    K, M = pt.linalg.kron(pt.linalg.kron(A, B), C), pt.linalg.kron(D, E)
    values = compile_py(factors, pt.linalg.eigvalsh(K, M))(*arrays, *metrics)
    expected = scipy.linalg.eigvalsh(dense_kron(*arrays), dense_kron(*metrics))
    assert_allclose(values, expected, atol=1e-12)


def test_symmetric_factors_need_no_static_shape():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (3, 4)]
    A, B = pt.dmatrices("A", "B")
    K = pt.linalg.kron(assume(A, symmetric=True), B)
    function = compile_py([A, B], pt.linalg.eigvalsh(K))
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays), np.linalg.eigvalsh(dense_kron(*arrays)), atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_skew_symmetric_factors_are_not_mistaken_for_symmetric_ones(dtype):
    # Their product is symmetric, and one triangle of each says nothing about it
    skew = np.array([[0, 2], [-2, 0]], dtype=dtype)
    other = np.array([[0, 1, 3], [-1, 0, 2], [-3, -2, 0]], dtype=dtype)
    factors = square_matrices([skew, other])
    K = pt.linalg.kron(*factors)
    for values in compile_py(factors, [pt.linalg.eigvalsh(K), pt.linalg.eigh(K)[0]])(skew, other):
        assert np.isnan(values).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("generalised", [False, True])
def test_factors_that_are_not_finite(generalised, bad):
    """LAPACK alone may never return."""
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (3, 2)]
    arrays[0][1, 1] = bad
    factors = square_matrices(arrays)
    metrics = [pt.linalg.kron(pt.eye(3), 2 * pt.eye(2))] if generalised else []
    K = pt.linalg.kron(*factors)
    outputs = [pt.linalg.eigvalsh(K, *metrics), pt.linalg.eigh(K, *metrics)[0]]
    for values in compile_py(factors, outputs)(*arrays):
        assert np.isnan(values).all()


def row_and_column():
    # A symmetric product of rectangular factors, u (x) u' = u u'
    u = np.array([1.0, 2.0, 3.0])
    K = pt.linalg.kron(*pt.dmatrices("A", "B"))
    return K.owner.inputs, [K], [u[:, None], u[None, :]]


def rectangular():
    # A symmetric square product of rectangular factors of the same shape as its transpose
    rng = np.random.default_rng(1)
    A, B = pt.tensor("A", shape=(2, 3)), pt.tensor("B", shape=(3, 2))
    u = rng.normal(size=(2, 3))
    return [A, B], [pt.linalg.kron(A, B)], [u, u.T * 0]


def one_kron():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, 2), random_symmetric(rng, 3), random_spd(rng, 6)]
    A, B, M = factors = square_matrices(arrays)
    return factors, [pt.linalg.kron(A, B), M], arrays


def other_sizes():
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, 2), random_symmetric(rng, 3)]
    arrays += [random_spd(rng, 3), random_spd(rng, 2)]
    A, B, C, D = factors = square_matrices(arrays)
    return factors, [pt.linalg.kron(A, B), pt.linalg.kron(C, D)], arrays


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (row_and_column, "factors 1 and 2 aren't known to be square"),
        (rectangular, "factor 1 is 2 x 3, not square"),
        (one_kron, "only one of the two matrices is a Kronecker product"),
        (other_sizes, "the sizes of the factors of the two products aren't known to agree"),
    ],
)
def test_refusals(case, reason):
    factors, matrices, arrays = case()
    w, V = pt.linalg.eigh(*matrices)
    with listening() as entries:
        function = compile_py(factors, [w, V, pt.linalg.eigvalsh(*matrices)])
    refusals = {entry.rewrite: entry.refusal for entry in entries if "eig" in entry.rewrite}
    assert {name: refusal.reason for name, refusal in refusals.items()} == {
        "eigh_of_kron": reason,
        "eigvalsh_of_kron": reason,
    }
    dense = compile_py(factors, [w, V, pt.linalg.eigvalsh(*matrices)], mode=WITHOUT_KRON)
    for result, expected in zip(function(*arrays), dense(*arrays), strict=True):
        assert_allclose(result, expected, atol=1e-12)


def test_refuses_hermitian_products():
    factors = [pt.tensor(dtype="complex128", shape=(n, n)) for n in (2, 3)]
    with listening() as entries:
        compile_py(factors, pt.linalg.eigvalsh(pt.linalg.kron(*factors)))
    assert entries[0].refusal.reason == "the product is of dtype complex128"


@pytest.mark.parametrize("which", ["eigvalsh", "eigh", "function of the matrix"])
def test_gradient(which):
    rng = np.random.default_rng(1)
    arrays = [random_spd(rng, 3), random_spd(rng, 2)]
    weights, x = rng.normal(size=6), rng.normal(size=6)
    A, B = factors = square_matrices(arrays)
    # Symmetric whatever the entries are
    K = pt.linalg.kron((A + A.T) / 2, (B + B.T) / 2)
    if which == "eigvalsh":
        cost = (weights * pt.linalg.eigvalsh(K)).sum()
    else:
        w, V = pt.linalg.eigh(K)
        exponential = (V * pt.exp(w)) @ (V.T @ x)
        cost = (weights * (w if which == "eigh" else exponential)).sum()
    assert_gradient_after_rewrites(cost, factors, arrays)


@pytest.mark.parametrize("mode", [pytest.param("NUMBA", marks=pytest.mark.nightly), "JAX"])
def test_backends(mode):
    rng = np.random.default_rng(1)
    arrays = [random_symmetric(rng, n) for n in (3, 4)]
    factors = square_matrices(arrays)
    x, x_var = rng.normal(size=12), pt.vector("x", shape=(12,))
    w, V = pt.linalg.eigh(pt.linalg.kron(*factors))
    outputs = [w, V, (V * pt.abs(w)) @ (V.T @ x_var)]
    function = pytensor.function([*factors, x_var], outputs, mode=mode)
    w, V, product = map(np.asarray, function(*arrays, x))
    K = dense_kron(*arrays)
    assert_allclose(w, np.linalg.eigvalsh(K), atol=1e-10)
    assert_allclose(V * w @ V.T, K, atol=1e-10)
    assert_allclose(product, V * abs(w) @ V.T @ x, atol=1e-10)
