import numpy as np
import pytensor.tensor as pt
import pytest
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
    random_matrix,
    random_spd,
    symbolic_matrices,
)

batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}

SQUARE = ((3, 3), (2, 2), (2, 2))
TALL = ((3, 2), (4, 1), (2, 2))
WIDE = ((2, 3), (1, 4), (2, 2))
MIXED = ((3, 2), (2, 3), (2, 2))


def known_matrices(arrays):
    return [pt.tensor(dtype=array.dtype, shape=array.shape) for array in arrays]


def nested(A, B, C):
    return pt.linalg.kron(A, pt.linalg.kron(B, C))


def check(K, Q, R, dtype="float64"):
    tolerance = TOLERANCE[dtype] * max(1, abs(K).max()) * 10
    assert Q.dtype == R.dtype == dtype
    assert_allclose(Q @ R, K, atol=tolerance)
    assert_allclose(R, np.triu(R), atol=0)
    gram = np.swapaxes(Q, -1, -2) @ Q
    assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", ["full", "economic"])
@pytest.mark.parametrize(
    ("shapes", "modes"),
    [(SQUARE, {"full", "economic"}), (TALL, {"economic"}), (WIDE, {"full", "economic"})],
    ids=["square", "tall", "wide"],
)
def test_qr(shapes, modes, mode, dtype):
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    factors = known_matrices(arrays)
    K_var = (-2 * nested(*factors)).astype(dtype)
    with listening() as entries:
        function = compile_py(factors, pt.linalg.qr(K_var, mode=mode))
    fired = [entry for entry in entries if entry.rewrite == "qr_of_kron" and not entry.refusal]
    assert bool(fired) == (mode in modes)
    Q, R = function(*arrays)
    K = -2 * dense_kron(*arrays)
    m, n = K.shape
    k = min(m, n)
    assert (Q.shape, R.shape) == (((m, m), (m, n)) if mode == "full" else ((m, k), (k, n)))
    check(K, Q, R, dtype)


@pytest.mark.parametrize("shapes", [SQUARE, WIDE], ids=["square", "wide"])
def test_triangle_alone(shapes):
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = known_matrices(arrays)
    R = compile_py(factors, pt.linalg.qr(nested(*factors).copy(), mode="r"))(*arrays)
    K = dense_kron(*arrays)
    assert R.shape == K.shape
    assert_allclose(R, np.triu(R))
    assert_allclose(R.T @ R, K.T @ K, atol=1e-12)


def test_transposed_product():
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=shape) for shape in WIDE]
    factors = known_matrices(arrays)
    with listening() as entries:
        function = compile_py(factors, pt.linalg.qr(nested(*factors).T, mode="economic"))
    assert all(entry.refusal is None for entry in entries)
    check(dense_kron(*arrays).T, *function(*arrays))


def test_symmetric_factors_need_no_static_shape():
    rng = np.random.default_rng(4)
    arrays = [random_spd(rng, n) for n in (3, 2)]
    factors = symbolic_matrices(arrays)
    K = pt.linalg.kron(*(assume(factor, symmetric=True) for factor in factors))
    with listening() as entries:
        function = compile_py(factors, [*pt.linalg.qr(K), *pt.linalg.svd(K)])
    # The singular vectors are asked for as arrays
    assert {entry.rewrite for entry in entries if entry.refusal} <= {"subtensor_of_kron"}
    Q, R, U, s, Vh = function(*arrays)
    check(dense_kron(*arrays), Q, R)
    assert_allclose(U * s @ Vh, Q @ R, atol=1e-12)


@pytest.mark.parametrize("shapes", [((5, 3, 3), (2, 2)), ((4, 2), (5, 3, 2))], ids=str)
def test_batches(shapes):
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = known_matrices(arrays)
    function = compile_py(factors, pt.linalg.qr(batched_kron(*factors), mode="economic"))
    check(dense_kron(*arrays), *function(*arrays))


def test_least_squares_forms_neither_factor():
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=(7, 5)), rng.normal(size=(6, 4))]
    factors = known_matrices(arrays)
    x, x_var = rng.normal(size=42), pt.vector("x", shape=(42,))
    Q, R = pt.linalg.qr(pt.linalg.kron(*factors), mode="economic")
    solution = pt.linalg.solve_triangular(R, Q.T @ x_var, lower=False)
    function = compile_py([*factors, x_var], solution)
    assert not has_kron(function.maker.fgraph)
    assert largest_size_in(function, *arrays, x) <= 49
    expected, *_ = np.linalg.lstsq(dense_kron(*arrays), x)
    assert_allclose(function(*arrays, x), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("shapes", "known", "options", "reason"),
    [
        (TALL, True, {"mode": "full"}, "a factor may have more rows than columns"),
        (TALL, True, {"mode": "r"}, "a factor may have more rows than columns"),
        (SQUARE, False, {"mode": "full"}, "a factor may have more rows than columns"),
        (MIXED, True, {"mode": "full"}, "a factor may have more rows than columns"),
        (MIXED, True, {"mode": "economic"}, "the factors aren't known to be all tall or all wide"),
        (SQUARE, True, {"mode": "raw"}, "the reflections of a product aren't products of"),
        (SQUARE, True, {"pivoting": True}, "pivoting orders the columns of the whole product"),
    ],
)
def test_refusals(shapes, known, options, reason):
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = (known_matrices if known else symbolic_matrices)(arrays)
    # PyTensor takes the raw reflections of a product of known shape for square
    outputs = pt.linalg.qr(nested(*factors), **options)
    with listening() as entries:
        function = compile_py(factors, outputs)
    reasons = {entry.refusal.reason for entry in entries if entry.rewrite == "qr_of_kron"}
    assert all(found.startswith(reason) for found in reasons)
    assert len(reasons) == 1
    dense = compile_py(factors, outputs, mode=WITHOUT_KRON)
    np.testing.assert_equal(function(*arrays), dense(*arrays))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((0, 2), "float64", "a factor is empty"), ((3, 3), "bool", "the product is of dtype bool")],
)
def test_refuses_empty_and_boolean_factors(shape, dtype, reason):
    factors = [pt.tensor(dtype=dtype, shape=shape), pt.tensor(dtype=dtype, shape=(2, 2))]
    with listening() as entries:
        compile_py(factors, pt.linalg.qr(pt.linalg.kron(*factors)))
    assert entries[0].refusal.reason == reason


def test_gradient_of_the_diagonal():
    rng = np.random.default_rng(4)
    arrays = [random_matrix(rng, 3, 3), random_matrix(rng, 2, 2)]
    factors = known_matrices(arrays)
    weights = rng.normal(size=6)
    _, R = pt.linalg.qr(pt.linalg.kron(*factors))
    cost = (weights * pt.log(pt.abs(pt.diagonal(R)))).sum()
    assert_gradient_after_rewrites(cost, factors, arrays)
