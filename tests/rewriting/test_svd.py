import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    assert_gradient_after_rewrites,
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    symbolic_matrices,
)

batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")

TOLERANCE = {"float64": 1e-12, "float32": 2e-4}

WRAPPERS = {
    "plain": lambda K: K,
    "transposed": lambda K: K.mT,
    "negated": lambda K: -K,
    "scaled": lambda K: -2.5 * K / 3,
}

SQUARE = ((3, 3), (2, 2), (2, 2))
TALL = ((3, 2), (4, 1), (2, 2))
WIDE = ((2, 3), (1, 4), (2, 2))
MIXED = ((3, 2), (2, 3), (2, 2))


def known_matrices(arrays):
    return [pt.tensor(dtype=array.dtype, shape=array.shape) for array in arrays]


def nested(A, B, C):
    return pt.linalg.kron(A.T, pt.linalg.kron(B, C).T).T  # A (x) B (x) C


def check(K, U, s, Vh, dtype="float64"):
    tolerance = TOLERANCE[dtype] * abs(K).max() * 10
    expected = np.linalg.svd(K, compute_uv=False)
    assert_allclose(s, expected, atol=tolerance)
    assert (np.diff(s) <= 0).all()
    n = s.shape[-1]
    assert_allclose((U[..., :n] * s[..., None, :]) @ Vh[..., :n, :], K, atol=tolerance)
    for vectors in (U, np.swapaxes(Vh, -1, -2)):
        gram = np.swapaxes(vectors, -1, -2) @ vectors
        assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=tolerance)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("full_matrices", [True, False])
@pytest.mark.parametrize("shapes", [SQUARE, TALL, WIDE], ids=["square", "tall", "wide"])
def test_singular_vectors(shapes, full_matrices, wrapper):
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = known_matrices(arrays)
    wrap = WRAPPERS[wrapper]
    K_var = wrap(nested(*factors))
    A, B, C = arrays
    K = wrap(dense_kron(A, B, C))
    with listening() as entries:
        function = compile_py(factors, pt.linalg.svd(K_var, full_matrices=full_matrices))
    fired = [entry for entry in entries if entry.rewrite == "svd_of_kron" and not entry.refusal]
    assert bool(fired) == (shapes is SQUARE or not full_matrices)
    U, s, Vh = function(*arrays)
    m, n = K.shape
    k = min(m, n)
    assert (U.shape, Vh.shape) == (((m, m), (n, n)) if full_matrices else ((m, k), (k, n)))
    check(K, U, s, Vh)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shapes", [SQUARE, TALL, WIDE, MIXED], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_singular_values(dtype, shapes, known):
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    factors = (known_matrices if known else symbolic_matrices)(arrays)
    values = pt.linalg.svd((-3 * nested(*factors)).astype(dtype), compute_uv=False)
    function = compile_py(factors, values)
    assert not has_kron(function.maker.fgraph)
    s = function(*arrays)
    assert s.dtype == dtype
    expected = np.linalg.svd(-3 * dense_kron(*arrays), compute_uv=False)
    assert_allclose(s, expected, atol=TOLERANCE[dtype] * expected.max())


def test_values_of_a_decomposition_whose_vectors_are_not_used():
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=shape) for shape in ((7, 5), (4, 6))]
    factors = symbolic_matrices(arrays)
    _, s, _ = pt.linalg.svd(pt.linalg.kron(*factors))
    with listening() as entries:
        function = compile_py(factors, s)
    assert all(entry.refusal is None for entry in entries)
    assert not has_kron(function.maker.fgraph)
    assert largest_size_in(function, *arrays) <= 49
    expected = np.linalg.svd(dense_kron(*arrays), compute_uv=False)
    assert_allclose(function(*arrays), expected, atol=1e-12)


@pytest.mark.parametrize(
    "shapes", [((5, 3, 3), (2, 2)), ((4, 2), (5, 3, 2)), ((2, 1, 3, 2), (5, 2, 1))], ids=str
)
def test_batches(shapes):
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = known_matrices(arrays)
    K_var, K = batched_kron(*factors), dense_kron(*arrays)
    U, s, Vh = pt.linalg.svd(K_var, full_matrices=False)
    values = pt.linalg.svd(K_var, compute_uv=False)
    with listening() as entries:
        function = compile_py(factors, [U, s, Vh, values])
    assert any(entry.rewrite == "svd_of_kron" and not entry.refusal for entry in entries)
    U, s, Vh, values = function(*arrays)
    check(K, U, s, Vh)
    assert_allclose(values, s, atol=1e-12)


def test_complex_and_integer_factors():
    rng = np.random.default_rng(2)
    for arrays in (
        [rng.normal(size=(n, n)) + 1j * rng.normal(size=(n, n)) for n in (3, 2)],
        [rng.integers(-3, 4, size=(n, n)) for n in (3, 2)],
    ):
        factors = known_matrices(arrays)
        K = dense_kron(*arrays)
        U, s, Vh = compile_py(factors, pt.linalg.svd(pt.linalg.kron(*factors)))(*arrays)
        assert s.dtype == "float64"
        assert_allclose(U * s @ Vh, K, atol=1e-12)
        assert_allclose(s, np.linalg.svd(K, compute_uv=False), atol=1e-12)


def test_products_with_the_singular_vectors_do_not_form_them():
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=(7, 6)), rng.normal(size=(6, 5))]
    factors = known_matrices(arrays)
    x, x_var = rng.normal(size=42), pt.vector("x", shape=(42,))
    U, s, Vh = pt.linalg.svd(pt.linalg.kron(*factors), full_matrices=False)
    solution = Vh.T @ ((U.T @ x_var) / s)
    function = compile_py([*factors, x_var], solution)
    assert not has_kron(function.maker.fgraph)
    assert largest_size_in(function, *arrays, x) <= 49
    expected, *_ = np.linalg.lstsq(dense_kron(*arrays), x)
    assert_allclose(function(*arrays, x), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("shapes", "known", "full_matrices", "reason"),
    [
        (TALL, True, True, "not all factors are known to be square"),
        (SQUARE, False, True, "not all factors are known to be square"),
        (MIXED, True, False, "the factors aren't known to be all tall or all wide"),
        (SQUARE, False, False, "the factors aren't known to be all tall or all wide"),
    ],
)
def test_refusals(shapes, known, full_matrices, reason):
    rng = np.random.default_rng(2)
    # PyTensor's own rewrite of three factors of unknown shape doesn't come to an end
    arrays = [rng.normal(size=shape) for shape in shapes[:2]]
    factors = (known_matrices if known else symbolic_matrices)(arrays)
    K = pt.linalg.kron(*factors)
    with listening() as entries:
        function = compile_py(factors, pt.linalg.svd(K, full_matrices=full_matrices))
    refusals = {entry.refusal.reason for entry in entries if entry.refusal}
    assert reason in refusals
    check(dense_kron(*arrays), *function(*arrays))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((0, 2), "float64", "a factor is empty"), ((3, 3), "bool", "the product is of dtype bool")],
)
def test_refuses_empty_and_boolean_factors(shape, dtype, reason):
    factors = [pt.tensor(dtype=dtype, shape=shape), pt.tensor(dtype=dtype, shape=(2, 2))]
    with listening() as entries:
        compile_py(factors, pt.linalg.svd(pt.linalg.kron(*factors), compute_uv=False))
    assert entries[0].refusal.reason == reason


def test_gradient_of_the_singular_values():
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=(3, 2)), rng.normal(size=(2, 3))]
    factors = known_matrices(arrays)
    weights = rng.normal(size=6)
    cost = (weights * pt.linalg.svd(pt.linalg.kron(*factors), compute_uv=False)).sum()
    assert_gradient_after_rewrites(cost, factors, arrays)
