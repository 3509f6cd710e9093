import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    WITHOUT_KRON,
    assert_gradient_after_rewrites,
    compile_py,
    dense_kron,
    has_kron,
)

batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")


def known_matrices(arrays):
    return [pt.tensor(dtype=array.dtype, shape=array.shape) for array in arrays]


def check_triangles(L, U):
    assert_allclose(L, np.tril(L))
    assert_allclose(np.diagonal(L, axis1=-2, axis2=-1), 1)
    # LAPACK compares complex pivots by |Re| + |Im|
    assert abs(L).max() <= (2**1.5 if np.iscomplexobj(L) else 1)
    assert_allclose(U, np.triu(U))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "int64"])
def test_lu(dtype):
    rng = np.random.default_rng(6)
    arrays = [(3 * rng.normal(size=(n, n))).astype(dtype) for n in (3, 2, 4)]
    if dtype == "complex128":
        arrays = [array + 1j * rng.normal(size=array.shape) for array in arrays]
    # A permutation that isn't its own inverse
    arrays[2][[1, 2, 3], [0, 1, 2]] = 20
    A, B, C = factors = known_matrices(arrays)
    K_var = -pt.linalg.kron(A, pt.linalg.kron(B, C).T).T
    A_, B_, C_ = arrays
    K = -dense_kron(A_.T, B_, C_)
    outputs = [
        *pt.linalg.lu(K_var),
        *pt.linalg.lu(K_var, p_indices=True),
        *pt.linalg.lu(K_var, permute_l=True),
    ]
    with listening() as entries:
        function = compile_py(factors, outputs)
    assert sum(entry.rewrite == "lu_of_kron" and not entry.refusal for entry in entries) == 3
    results = function(*arrays)
    for result, output in zip(results, outputs, strict=True):
        assert result.dtype == output.type.dtype
    P, L, U, p, L_of_p, U_of_p, PL, U_of_PL = results
    rtol = {"rtol": 2e-4, "atol": 2e-4} if dtype == "float32" else {"rtol": 1e-10, "atol": 1e-12}
    assert_allclose(P @ L @ U, K, **rtol)
    assert_allclose(L_of_p[p] @ U_of_p, K, **rtol)
    assert_allclose(PL @ U_of_PL, K, **rtol)
    check_triangles(L, U)
    check_triangles(L_of_p, U_of_p)
    assert sorted(p) == list(range(24))
    assert not np.array_equal(p, np.argsort(p))
    assert_allclose(P.sum(0), 1)


@pytest.mark.parametrize("batches", [((5,), (5,)), ((5,), ()), ((), (5,))], ids=str)
def test_batches(batches):
    rng = np.random.default_rng(6)
    arrays = [rng.normal(size=(*batch, n, n)) for n, batch in zip((3, 4), batches, strict=True)]
    factors = known_matrices(arrays)
    K_var, K = batched_kron(*factors), dense_kron(*arrays)
    P, L, U, p = compile_py(
        factors, [*pt.linalg.lu(K_var), pt.linalg.lu(K_var, p_indices=True)[0]]
    )(*arrays)
    assert_allclose(P @ L @ U, K, atol=1e-12)
    assert_allclose(np.take_along_axis(L, p[..., None], axis=-2) @ U, K, atol=1e-12)


def test_solving_with_the_decomposition_forms_no_product():
    rng = np.random.default_rng(6)
    arrays = [rng.normal(size=(n, n)) for n in (3, 4)]
    factors = known_matrices(arrays)
    x, x_var = rng.normal(size=12), pt.vector("x", shape=(12,))
    P, L, U = pt.linalg.lu(pt.linalg.kron(*factors))
    solution = pt.linalg.solve_triangular(L, P.T @ x_var, lower=True, unit_diagonal=True)
    solution = pt.linalg.solve_triangular(U, solution, lower=False)
    function = compile_py([*factors, x_var], solution)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays, x), np.linalg.solve(dense_kron(*arrays), x), rtol=1e-9)


@pytest.mark.parametrize(
    ("shapes", "dtype", "reason"),
    [
        (((None, None),) * 2, "float64", "factors 1 and 2 aren't known to be square"),
        (((3, 2), (2, 3)), "float64", "factor 1 is 3 x 2, not square"),
        (((0, 0), (2, 2)), "float64", "factor 1 is empty"),
        (((2, 2), (3, 3)), "bool", "the product is of dtype bool"),
    ],
)
def test_refusals(shapes, dtype, reason):
    factors = [pt.tensor(dtype=dtype, shape=shape) for shape in shapes]
    outputs = pt.linalg.lu(pt.linalg.kron(*factors))
    with listening() as entries:
        function = compile_py(factors, outputs)
    reasons = {entry.refusal.reason for entry in entries if entry.rewrite == "lu_of_kron"}
    assert reasons == {reason}
    if dtype == "float64" and "empty" not in reason:
        arrays = [np.arange(6.0).reshape(3, 2), np.arange(6.0).reshape(2, 3)]
        dense = compile_py(factors, outputs, mode=WITHOUT_KRON)
        np.testing.assert_equal(function(*arrays), dense(*arrays))


def test_one_factor_of_unknown_shape_is_square_too():
    rng = np.random.default_rng(6)
    arrays = [rng.normal(size=(n, n)) for n in (3, 4)]
    A, B = pt.tensor("A", shape=(3, 3)), pt.dmatrix("B")
    with listening() as entries:
        function = compile_py([A, B], pt.linalg.lu(pt.linalg.kron(A, B)))
    assert all(entry.refusal is None for entry in entries)
    P, L, U = function(*arrays)
    assert_allclose(P @ L @ U, dense_kron(*arrays), atol=1e-12)


def test_packed_decomposition_is_refused():
    rng = np.random.default_rng(6)
    arrays = [rng.normal(size=(n, n)) for n in (3, 4)]
    factors = known_matrices(arrays)
    outputs = pt.linalg.lu_factor(pt.linalg.kron(*factors))
    with listening() as entries:
        function = compile_py(factors, outputs)
    [reason] = {entry.refusal.reason for entry in entries if entry.rewrite == "lu_of_kron"}
    assert reason == "L and U packed into one matrix aren't a Kronecker product"
    dense = compile_py(factors, outputs, mode=WITHOUT_KRON)
    np.testing.assert_equal(function(*arrays), dense(*arrays))


def test_gradient_of_the_diagonal():
    rng = np.random.default_rng(6)
    # No pivoting, here and in the dense product, whose decomposition is the same then
    arrays = [rng.normal(size=(n, n)) / 10 + np.eye(n) for n in (3, 2)]
    factors = known_matrices(arrays)
    weights = rng.normal(size=6)
    _, _, U = pt.linalg.lu(pt.linalg.kron(*factors))
    cost = (weights * pt.log(pt.abs(pt.diagonal(U)))).sum()
    assert_gradient_after_rewrites(cost, factors, arrays)
