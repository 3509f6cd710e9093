"""Gradients through decompositions that are taken before the rewrites."""

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions import assume
from pytensor.graph.traversal import explicit_graph_inputs

from pymc_kron.rewriting.journal import journal_of
from tests.helpers import (
    AS_WRITTEN,
    PY,
    compile_py,
    crossed,
    finite_differences,
    has_kron,
    largest_size_in,
    random_spd,
    symbolic_dense_kron,
)

cholesky, solve_triangular = pt.linalg.cholesky, pt.linalg.solve_triangular


def whitened(K, x):
    return solve_triangular(cholesky(K), x, lower=True, b_ndim=1)


def log_density(K, x):
    L = cholesky(K)
    w = solve_triangular(L, x, lower=True, b_ndim=1)
    return -(w**2).sum() / 2 - pt.log(pt.diagonal(L)).sum()


def mvnormal(K, x):
    return pm.logp(pm.MvNormal.dist(mu=pt.zeros(x.shape[-1:]), cov=K), x).sum()


def in_eigenvectors(K, x):
    w, Q = pt.linalg.eigh(K)
    return (pt.exp(w / 9) * (Q.T @ x) ** 2).sum()


def in_singular_vectors(K, x):
    U, s, Vh = pt.linalg.svd(K, full_matrices=False)
    return (s * (U.T @ x) ** 2).sum() + (pt.cos(s) * (Vh @ x) ** 2).sum()


# Losses of the product and a vector. Those of a Cholesky factor need no sizes to be known
CHOLESKY_LOSSES = {
    "whitened norm": lambda K, x: (whitened(K, x) ** 2).sum(),
    "logdet": lambda K, x: pt.log(pt.diagonal(cholesky(K))).sum(),
    "log density": log_density,
    "MvNormal": mvnormal,
    "cho_solve": lambda K, x: (pt.linalg.cho_solve((cholesky(K), True), x) ** 3).sum(),
    "both solves": lambda K, x: (
        solve_triangular(cholesky(K).T, whitened(K, x), lower=False) ** 3
    ).sum(),
    "upper": lambda K, x: (solve_triangular(cholesky(K, lower=False), x, lower=False) ** 3).sum(),
    "draws": lambda K, x: ((cholesky(K) @ x) ** 3).sum(),
    "two factors": lambda K, x: (
        (whitened(K, x) ** 2).sum() + 2 * pt.log(pt.diagonal(cholesky(K))).sum()
    ),
    "with others": lambda K, x: log_density(K, x) + pt.linalg.slogdet(K)[1] + (K @ x).sum(),
}
STATIC_LOSSES = {
    "eigenvalue": lambda K, x: pt.linalg.eigvalsh(K)[3] ** 2,
    "eigenvalues": lambda K, x: (pt.linalg.eigvalsh(K) ** 3).sum(),
    "eigenvalues of eigh": lambda K, x: pt.log(pt.linalg.eigh(K)[0]).sum(),
    "eigenvectors": in_eigenvectors,
    "R": lambda K, x: pt.log(pt.abs(pt.diagonal(pt.linalg.qr(K)[1]))).sum(),
    "U": lambda K, x: pt.log(pt.abs(pt.diagonal(pt.linalg.lu(K)[2]))).sum(),
    "singular values": lambda K, x: (pt.linalg.svd(K, compute_uv=False) ** 3).sum(),
    "singular values of svd": lambda K, x: pt.log(pt.linalg.svd(K, full_matrices=False)[1]).sum(),
    "singular vectors": in_singular_vectors,
}
LOSSES = {**CHOLESKY_LOSSES, **STATIC_LOSSES}

PRODUCTS = {
    "A (x) B": lambda kron, A, B, c: kron(A, B),
    "c (A (x) B).T": lambda kron, A, B, c: c**2 * kron(A, B).T,
    "-A (x) -B": lambda kron, A, B, c: kron(-A, -B),
    "c A (x) B": lambda kron, A, B, c: kron(c * A, B),
    "(A (x) B) (x) A": lambda kron, A, B, c: kron(kron(A, B), A),
    "A (x) (B (x) A)": lambda kron, A, B, c: kron(A, kron(B, A)),
    "A (x) A": lambda kron, A, B, c: kron(A, A),
    "c (A (x) B) / c / 2c": lambda kron, A, B, c: c * kron(A, B) / c / (2 * c),
    "A (x) (B (x) A).T / c": lambda kron, A, B, c: kron(A, kron(B, A).T / c),
}


def program(product, loss, *, static=True, shape=None, dtype="float64", kron=pt.linalg.kron):
    rng = np.random.default_rng(9)
    arrays = [random_spd(rng, 3), random_spd(rng, 2), np.array(1.2)]
    dense = PRODUCTS[product](np.kron, *arrays)
    values = [a.astype(dtype) for a in (*arrays, rng.normal(size=(*(shape or ()), len(dense))))]
    A, B, c, x = inputs = [
        pt.tensor(name, dtype=dtype, shape=value.shape if static else (None,) * value.ndim)
        for name, value in zip("ABcx", values, strict=True)
    ]
    return inputs, loss(PRODUCTS[product](kron, A, B, c), x), values


def along_symmetric_changes(gradient):
    return gradient + gradient.T if gradient.ndim == 2 else gradient


def check(product, loss, *, mode=PY, rtol=1e-9, **options):
    inputs, cost, values = program(product, loss, **options)
    size = len(values[-1].T) ** 2
    wrt = [var for var in inputs if var in inputs_of(cost)]
    function = compile_py(inputs, pt.grad(cost, wrt), mode=mode)
    fgraph = function.maker.fgraph
    assert not has_kron(fgraph)
    assert largest_size_in(function, *values) < size

    inputs, cost, _ = program(product, loss, kron=symbolic_dense_kron, **options)
    wrt = [var for var in inputs if var in inputs_of(cost)]
    expected = compile_py(inputs, pt.grad(cost, wrt), mode=AS_WRITTEN)(*values)
    for var, result, other in zip(wrt, function(*values), expected, strict=True):
        if var.name in "AB":
            result, other = along_symmetric_changes(result), along_symmetric_changes(other)
        assert result.dtype == values[0].dtype
        assert_allclose(result, other, rtol=rtol, atol=rtol * np.abs(other).max())


def inputs_of(cost):
    return list(explicit_graph_inputs([cost]))


@pytest.mark.parametrize(("name", "static"), crossed(list(CHOLESKY_LOSSES), [False, True]))
def test_cholesky_factors(name, static):
    check("A (x) B", CHOLESKY_LOSSES[name], static=static)


@pytest.mark.parametrize("name", STATIC_LOSSES)
def test_decompositions_where_sizes_have_to_be_known(name):
    check("A (x) B", STATIC_LOSSES[name])


@pytest.mark.parametrize("product", list(PRODUCTS)[1:])
@pytest.mark.parametrize(
    "name", ["log density", pytest.param("MvNormal", marks=pytest.mark.nightly)]
)
def test_multiples_transposes_signs_and_more_factors(name, product):
    check(product, LOSSES[name], static=name == "MvNormal")


@pytest.mark.parametrize("product", ["c (A (x) B).T", "c (A (x) B) / c / 2c"])
def test_two_factors_of_a_multiple(product):
    check(product, LOSSES["two factors"])


@pytest.mark.parametrize("product", ["c (A (x) B).T", "-A (x) -B", "A (x) (B (x) A)"])
def test_eigenvalues_of_other_products(product):
    check(product, LOSSES["eigenvalues"])


@pytest.mark.parametrize("static", [True, False])
def test_several_observations(static):
    check("A (x) B", mvnormal, static=static, shape=(4,))


def test_observations_with_means_of_their_own():
    # A batch of one covariance, which one of matrices without a batch is made of
    def own_means(K, x):
        return pm.logp(pm.MvNormal.dist(mu=x**2, cov=K), x).sum()

    check("A (x) B", own_means, shape=(4,))


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (2, 3, 3, 4)], ids=["tall", "wide"])
def test_singular_values_of_rectangular_factors(shape):
    m, n, p, q = shape
    rng = np.random.default_rng(9)
    values = [rng.normal(size=(m, n)), rng.normal(size=(p, q))]
    A, B = (pt.tensor(name, shape=v.shape) for name, v in zip("AB", values, strict=True))

    def gradient(kron):
        _, s, _ = pt.linalg.svd(kron(A, B), full_matrices=False)
        return pt.grad((s**3).sum(), [A, B])

    function = compile_py([A, B], gradient(pt.linalg.kron))
    assert not has_kron(function.maker.fgraph)
    expected = compile_py([A, B], gradient(symbolic_dense_kron), mode=AS_WRITTEN)(*values)
    for result, other in zip(function(*values), expected, strict=True):
        assert_allclose(result, other, rtol=1e-9, atol=1e-10)


def test_decompositions_without_a_gradient_beside_another_one():
    A, B = pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(2, 2))
    K = pt.linalg.kron(A, B)
    values = [*pt.linalg.qr(K, mode="raw"), *pt.linalg.svd(K, full_matrices=True)]
    gradient = pt.grad(pt.log(pt.diagonal(cholesky(K))).sum(), [A, B])
    function = compile_py([A, B], [*gradient, *values])
    a, b = (random_spd(np.random.default_rng(9), n) for n in (3, 2))
    A_bar, B_bar, *_ = function(a, b)
    # The sum is log(det(A)**2 det(B)**3) / 2
    assert_allclose(along_symmetric_changes(A_bar), 2 * np.linalg.inv(a), rtol=1e-9)
    assert_allclose(along_symmetric_changes(B_bar), 3 * np.linalg.inv(b), rtol=1e-9)


def test_single_precision():
    check("A (x) B", log_density, dtype="float32", rtol=2e-3)


@pytest.mark.parametrize("fact", ["symmetric", "positive_definite"])
def test_what_is_known_of_the_factors_is_used(fact):
    # Eigenvalues want to know that factors are square
    def kron(A, B):
        return pt.linalg.kron(assume(A, **{fact: True}), assume(B, **{fact: True}))

    A, B = pt.dmatrix("A"), pt.dmatrix("B")
    gradient = pt.grad((pt.linalg.eigvalsh(kron(A, B)) ** 3).sum(), [A, B])
    function = compile_py([A, B], gradient)
    assert not has_kron(function.maker.fgraph)
    a, b = (random_spd(np.random.default_rng(9), n) for n in (3, 2))
    # sum of cubes = trace(A^3) trace(B^3)
    expected = 3 * a @ a * np.trace(b @ b @ b), 3 * b @ b * np.trace(a @ a @ a)
    for result, other in zip(function(a, b), expected, strict=True):
        assert_allclose(*map(along_symmetric_changes, (result, other)), rtol=1e-10)


@pytest.mark.parametrize("name", ["log density", "eigenvectors", "R", "singular vectors"])
def test_finite_differences(name):
    inputs, cost, values = program("c (A (x) B).T", LOSSES[name])
    gradients = compile_py(inputs, pt.grad(cost, inputs, disconnected_inputs="ignore"))(*values)
    value = compile_py(inputs, cost)
    for i, gradient in enumerate(gradients):

        def loss(array, i=i):
            # Along symmetric changes
            symmetric = (array + array.T) / 2 if array.ndim == 2 else array
            return value(*values[:i], symmetric, *values[i + 1 :])

        expected = finite_differences(loss, values[i])
        result = along_symmetric_changes(gradient) / (2 if gradient.ndim == 2 else 1)
        assert_allclose(result, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


# What stays dense


def test_a_gradient_in_the_factor_that_is_not_known_is_left_with_the_smaller_factors():
    inputs, _, values = program("A (x) B", log_density)
    A, B, *_ = inputs
    weights = np.random.default_rng(9).normal(size=(6, 6))

    def loss(kron):
        return (weights * cholesky(kron(A, B))).sum()

    function = compile_py(inputs, pt.grad(loss(pt.linalg.kron), [A, B]))
    expected = pt.grad(loss(symbolic_dense_kron), [A, B])
    for result, other in zip(
        function(*values), compile_py(inputs, expected, mode=AS_WRITTEN)(*values), strict=True
    ):
        assert_allclose(*map(along_symmetric_changes, (result, other)), rtol=1e-10)
    assert "isn't a sum of outer products" in last_refusal(function, "pullback_of_kron")


def last_refusal(function, name):
    refusals = [
        entry.refusal
        for entry in journal_of(function.maker.fgraph).entries
        if entry.rewrite == name and entry.refusal is not None
    ]
    return str(refusals[-1])


@pytest.mark.parametrize("decomposition", ["qr", "eigh", "svd"])
def test_signs_of_a_factor_that_a_batch_shares(decomposition):
    rng = np.random.default_rng(9)
    a, b, x = random_spd(rng, 2), random_spd(rng, 3, batch=(4,)), rng.normal(size=(4, 6))
    A, B = pt.tensor("A", shape=a.shape), pt.tensor("B", shape=b.shape)
    operation = {
        "qr": lambda K: pt.linalg.qr(K)[0],
        "eigh": lambda K: pt.linalg.eigh(K)[1],
        "svd": lambda K: pt.linalg.svd(K, full_matrices=False)[0],
    }[decomposition]
    kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
    gradient = pt.grad((pt.vecmat(x, operation(kron(A, B))) ** 3).sum(), [A, B])
    function = compile_py([A, B], gradient)
    assert has_kron(function.maker.fgraph)
    refusal = last_refusal(function, "pullback_of_kron_decomposition")
    assert refusal.startswith("a batch shares a factor, and the signs of its decomposition are a ")
    assert "pt.broadcast_to(A, (n, *A.shape))" in refusal


def test_factors_of_unknown_size_are_the_reason():
    A, B = pt.dmatrix("A"), pt.dmatrix("B")
    gradient = pt.grad(pt.linalg.eigvalsh(pt.linalg.kron(A, B)).max(), [A, B])
    function = compile_py([A, B], gradient)
    assert has_kron(function.maker.fgraph)
    refusal = last_refusal(function, "pullback_of_kron_decomposition")
    assert "aren't known to be square" in refusal


@pytest.mark.parametrize("name", ["qr_of_kron", "eigh_of_kron", "cholesky_of_kron"])
def test_turned_off_with_the_rewrite_of_the_decomposition(name):
    # The signs of Q differ: the gradient has to be that of the same Q
    inputs, _, values = program("A (x) B", log_density)
    A, B, _, x = inputs

    def loss(kron):
        return ((pt.linalg.qr(kron(A, B))[0] @ x) ** 3).sum()

    function = compile_py(inputs, pt.grad(loss(pt.linalg.kron), [A, B]), mode=PY.excluding(name))
    assert journal_of(function.maker.fgraph) is None or not any(
        entry.rewrite == "pullback_of_kron_decomposition"
        for entry in journal_of(function.maker.fgraph).entries
    )
    if name == "qr_of_kron":
        expected = compile_py(inputs, pt.grad(loss(symbolic_dense_kron), [A, B]), mode=AS_WRITTEN)
        for result, other in zip(function(*values), expected(*values), strict=True):
            assert_allclose(result, other, rtol=1e-9, atol=1e-10)
