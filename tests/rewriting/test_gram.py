import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from tests.helpers import (
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    random_spd,
    symbolic_matrices,
)

kron = pt.linalg.kron
cholesky = pt.linalg.cholesky


def solved_twice(L, gram):
    """Return solve(L', solve(L, gram)), as `pymc.MatrixNormal` writes it."""
    half = pt.linalg.solve_triangular(L, gram, lower=True, b_ndim=2)
    return pt.linalg.solve_triangular(L.mT, half, lower=False, b_ndim=2)


# The factor of the covariance, and how the covariance is made of the factors
ROOTS = {
    "kron of roots": lambda A, B: kron(cholesky(A), cholesky(B)),
    "root of kron": lambda A, B: cholesky(kron(A, B)),
    "scaled": lambda A, B: cholesky(0.5 * kron(2 * A, B)),
}


@pytest.mark.parametrize("rows", [1, 4, 30], ids=["one row", "few rows", "more rows than cells"])
@pytest.mark.parametrize("root", ROOTS)
def test_trace_of_gram_solve(root, rows):
    rng = np.random.default_rng(7)
    arrays, x = [random_spd(rng, 3), random_spd(rng, 5)], rng.normal(size=(rows, 15))
    A, B = symbolic_matrices(arrays)
    x_var = pt.dmatrix("x")
    trace = pt.trace(solved_twice(ROOTS[root](A, B), x_var.T @ x_var))
    function = compile_py([A, B, x_var], trace)
    assert not has_kron(function.maker.fgraph)
    expected = np.trace(np.linalg.solve(dense_kron(*arrays), x.T @ x))
    assert_allclose(function(*arrays, x), expected, rtol=1e-10)
    assert largest_size_in(function, *arrays, x) == max(25, x.size)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient(when):
    rng = np.random.default_rng(7)
    arrays, x = [random_spd(rng, 3), random_spd(rng, 5)], rng.normal(size=(4, 15))
    inputs = A, B, x_var = (
        pt.tensor("A", shape=(3, 3)),
        pt.tensor("B", shape=(5, 5)),
        pt.tensor("x", shape=(4, 15)),
    )
    trace = pt.trace(solved_twice(cholesky(kron(A, B)), x_var.T @ x_var))
    if when == "after":
        trace = pm.pytensorf.rewrite_pregrad(trace)
    function = compile_py(inputs, pt.grad(trace, inputs))
    gradients = function(*arrays, x)
    K_inv = np.linalg.inv(dense_kron(*arrays))
    G = -(K_inv @ x.T @ x @ K_inv).reshape(3, 5, 3, 5)
    expected = [
        np.einsum("iajb,ab->ij", G, arrays[1]),
        np.einsum("iajb,ij->ab", G, arrays[0]),
        2 * x @ K_inv,
    ]
    for gradient, value in zip(gradients[:2], expected[:2], strict=True):
        assert_allclose(gradient + gradient.T, value + value.T, rtol=1e-9, atol=1e-11)
    assert_allclose(gradients[2], expected[2], rtol=1e-9, atol=1e-11)
    if when == "after":
        assert not has_kron(function.maker.fgraph)


def not_a_gram_matrix(L, M, x, y):
    return pt.trace(solved_twice(L, x.T @ y))


def another_matrix_above(L, M, x, y):
    half = pt.linalg.solve_triangular(L, x.T @ x, lower=True, b_ndim=2)
    return pt.trace(pt.linalg.solve_triangular(M.T, half, lower=False, b_ndim=2))


def twice_below(L, M, x, y):
    half = pt.linalg.solve_triangular(L, x.T @ x, lower=True, b_ndim=2)
    return pt.trace(pt.linalg.solve_triangular(L, half, lower=True, b_ndim=2))


def another_diagonal(L, M, x, y):
    return pt.diagonal(solved_twice(L, x.T @ x), offset=1).sum()


def some_of_the_diagonal(L, M, x, y):
    return pt.diagonal(solved_twice(L, x.T @ x))[1:].sum()


def whole_sum(L, M, x, y):
    return solved_twice(L, x.T @ x).sum()


def no_kron(L, M, x, y):
    return pt.trace(solved_twice(M, x.T @ x))


@pytest.mark.parametrize(
    "build",
    [
        not_a_gram_matrix,
        another_matrix_above,
        twice_below,
        another_diagonal,
        some_of_the_diagonal,
        whole_sum,
        no_kron,
    ],
)
def test_what_only_looks_like_it(build):
    rng = np.random.default_rng(7)
    roots = [np.linalg.cholesky(random_spd(rng, n)) for n in (3, 5)]
    M = np.linalg.cholesky(random_spd(rng, 15))
    x, y = rng.normal(size=(2, 4, 15))
    inputs = A, B, M_var, x_var, y_var = [pt.dmatrix(name) for name in "ABMxy"]
    out = build(kron(A, B), M_var, x_var, y_var)
    expected = build(pt.as_tensor(dense_kron(*roots)), M_var, x_var, y_var)
    result, value = compile_py(inputs, [out, expected])(*roots, M, x, y)
    assert_allclose(result, value, rtol=1e-10)


def test_a_batch_of_traces():
    # The trace of each matrix, not the sum of all
    rng = np.random.default_rng(7)
    roots = [np.linalg.cholesky(random_spd(rng, n)) for n in (3, 5)]
    A, B, x_var = pt.dmatrix("A"), pt.dmatrix("B"), pt.tensor("x", shape=(2, 4, 15))
    x = rng.normal(size=(2, 4, 15))
    solved = solved_twice(kron(A, B), x_var.mT @ x_var)
    traces = pt.diagonal(solved, axis1=-2, axis2=-1).sum(axis=-1)
    L = dense_kron(*roots)
    expected = np.trace(np.linalg.solve(L @ L.T, np.swapaxes(x, 1, 2) @ x), axis1=1, axis2=2)
    assert_allclose(compile_py([A, B, x_var], traces)(*roots, x), expected, rtol=1e-10)
