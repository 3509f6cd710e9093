"""Gradients through Cholesky factors of sums with noise."""

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.graph.traversal import explicit_graph_inputs
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.decomposition.eigen import Eigh

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    AS_WRITTEN,
    compile_py,
    count_ops,
    finite_differences,
    has_kron,
    largest_size_in,
    symbolic_dense_kron,
)
from tests.rewriting.test_noise import SUMS, N, arrays_of, batched_kron, dense_value, symbols

cholesky, solve_triangular = pt.linalg.cholesky, pt.linalg.solve_triangular


def whitened(M, x):
    return solve_triangular(cholesky(M), x, lower=True, b_ndim=1)


def log_density(M, x):
    L = cholesky(M)
    w = solve_triangular(L, x, lower=True, b_ndim=1)
    return -(w**2).sum() / 2 - pt.log(pt.diagonal(L)).sum()


def upper(M, x):
    R = cholesky(M, lower=False)
    w = solve_triangular(R.T, x, lower=True, b_ndim=1)
    return -0.5 * pt.sqr(w).sum() - pt.sum(pt.log(pt.diagonal(R)))


def cho_solve(M, x):
    return pt.linalg.cho_solve((cholesky(M), True), x, b_ndim=1)


def with_itself(operation):
    return lambda M, x: (lambda w: operation(w, w))(whitened(M, x))


LOSSES = {
    "whitened norm": lambda M, x: 3 * (whitened(M, x) ** 2).sum(),
    "function of a whitened norm": lambda M, x: pt.log1p((whitened(M, x) ** 2).sum(axis=-1)).sum(),
    "product": with_itself(lambda w, v: (w * v).sum() / 2),
    "dot": with_itself(lambda w, v: 3 * (w @ v)),
    "logdet": lambda M, x: pt.log(pt.diagonal(cholesky(M))).sum() * 2 + pt.sin(x).sum(),
    "log density": log_density,
    "upper": upper,
    "solution": lambda M, x: (cho_solve(M, x) ** 3).sum(),
    "form": lambda M, x: (x * cho_solve(M, x)).sum(),
    "two vectors": lambda M, x: log_density(M, x) + log_density(M, pt.cos(x)),
    "with others": lambda M, x: (
        log_density(M, x) + (M @ x).sum() + (x * pt.linalg.solve(M, x, assume_a="pos")).sum()
    ),
    "MvNormal": lambda M, x: pm.logp(pm.MvNormal.dist(pt.ones(x.shape[-1]), cov=M), x).sum(),
    "means of their own": lambda M, x: (pm.logp(pm.MvNormal.dist(x**2, cov=M), x) ** 2).sum(),
}


def along_symmetric_changes(gradient):
    is_square = gradient.ndim == 2 and len(gradient) == len(gradient.T)
    return gradient + gradient.T if is_square else gradient


def programs(loss, name, shape=(), *, static=True, kron=pt.linalg.kron):
    """Return the inputs, the loss and what it is differentiated by, and values."""
    variables, arrays = symbols(static), arrays_of(definite=True)
    size = len(dense_value(SUMS[name], variables, arrays))
    values = [*arrays, np.random.default_rng(2).normal(size=(*shape, size))]
    x = pt.tensor("x", shape=values[-1].shape)
    cost = LOSSES[loss](SUMS[name](kron, *variables), x)
    used = set(explicit_graph_inputs([cost]))
    return [*variables, x], cost, [var for var in (*variables, x) if var in used], values


def check(loss, name, shape=(), *, when="before", static=True):
    inputs, cost, wrt, values = programs(loss, name, shape, static=static)
    if when == "after":
        cost = rewrite_pregrad(cost)
    outputs = [cost, *pt.grad(cost, wrt)]
    function = compile_py(inputs, outputs)
    assert not has_kron(function.maker.fgraph)
    size = values[-1].shape[-1]
    # No decomposition of an array with N x N entries, nor the array itself
    assert largest_size_in(function, *values) < size**2

    *dense, wrt, _ = programs(loss, name, shape, kron=symbolic_dense_kron)
    expected = compile_py(dense[0], [dense[1], *pt.grad(dense[1], wrt)], mode=AS_WRITTEN)(*values)
    for result, other in zip(function(*values), expected, strict=True):
        result, other = along_symmetric_changes(result), along_symmetric_changes(other)
        assert_allclose(result, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())
    return function


@pytest.mark.parametrize("loss", LOSSES)
def test_uses_of_a_cholesky_factor(loss):
    check(loss, "s**2")


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("log density", "s**2"),
        ("solution", "s**2"),
        # Only the factors' decompositions show that what s is multiplied with is square
        ("log density", "identity_like"),
    ],
)
def test_factors_of_unknown_size(loss, name):
    check(loss, name, static=False)


@pytest.mark.parametrize(
    "name",
    [
        "diag(full)",
        "jitter and noise",
        "multiple of the sum",
        "transposed",
        "nested to the left",
        "scaled kron + kron",
        "one factor",
        "Kronecker sum with noise",
    ],
)
def test_sums(name):
    check("with others", name)


@pytest.mark.parametrize("loss", ["function of a whitened norm", "product", "solution", "MvNormal"])
def test_several_observations(loss):
    check(loss, "s**2", (4,))


def test_observations_with_means_of_their_own():
    # A batch of one covariance, which a sum without a batch is made of
    check("means of their own", "s**2", (4,))


def test_after_the_rewrites():
    check("log density", "s**2", when="after")


@pytest.mark.parametrize("name", ["s**2", "kron of symbolic identities"])
def test_only_the_gradient_in_the_vector(name):
    inputs, cost, _, values = programs("dot", name, static=name == "s**2")
    function = compile_py(inputs, pt.grad(cost, inputs[-1]))
    assert not has_kron(function.maker.fgraph)
    M = dense_value(SUMS["s**2"], inputs[:-1], values[:-1])
    assert_allclose(function(*values), 6 * np.linalg.solve(M, values[-1]), rtol=1e-10)


def test_value_and_gradient_share_their_decompositions():
    function = check("log density", "s**2")
    assert count_ops(function.maker.fgraph, Eigh) == 2
    assert count_ops(function.maker.fgraph, Cholesky) == 0


@pytest.mark.parametrize("loss", ["log density", "solution"])
def test_finite_differences_at_repeated_eigenvalues(loss):
    inputs, cost, wrt, values = programs(loss, "s**2")
    values[0] = np.eye(3)
    value = compile_py(inputs, cost)
    for var, gradient in zip(wrt, compile_py(inputs, pt.grad(cost, wrt))(*values), strict=True):
        i = inputs.index(var)

        def along(array, i=i):
            symmetric = (array + array.T) / 2 if array.ndim == 2 else array
            return value(*values[:i], symmetric, *values[i + 1 :])

        expected = finite_differences(along, values[i])
        result = along_symmetric_changes(gradient) / (2 if gradient.ndim == 2 else 1)
        assert_allclose(result, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_gradient_is_nan_where_the_factor_is():
    inputs, cost, wrt, values = programs("log density", "s**2")
    values[0] = -values[0]
    for gradient in compile_py(inputs, pt.grad(cost, wrt))(*values):
        assert np.isnan(gradient).any()


# What is refused


REFUSED = {
    "draws": lambda M, x: ((cholesky(M) @ x) ** 3).sum(),
    "beside a density": lambda M, x: log_density(M, x) + (whitened(M, x) ** 3).sum(),
    "norm with the other triangle": lambda M, x: (
        solve_triangular(cholesky(M, lower=False), x, lower=False) ** 2
    ).sum(),
}


@pytest.mark.parametrize("use", REFUSED)
def test_other_uses_stay_dense(use):
    variables, values = symbols(static=True), [*arrays_of(definite=True), np.linspace(-1, 1, N)]
    x = pt.tensor("x", shape=(N,))
    wrt = [variables[0], variables[-1], x]
    costs = [
        REFUSED[use](SUMS["s**2"](kron, *variables), x)
        for kron in (pt.linalg.kron, symbolic_dense_kron)
    ]
    with listening() as entries:
        function = compile_py([*variables, x], pt.grad(costs[0], wrt))
    refusals = [
        entry.refusal
        for entry in entries
        if entry.refusal is not None and entry.rewrite == "pullback_of_kron_sum_cholesky"
    ]
    assert "is used for more than whitened norms" in refusals[0].reason
    expected = compile_py([*variables, x], pt.grad(costs[1], wrt))(*values)
    for result, other in zip(function(*values), expected, strict=True):
        result, other = along_symmetric_changes(result), along_symmetric_changes(other)
        assert_allclose(result, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())


def test_a_sum_that_is_refused_stays_dense():
    A, B, *_ = symbols(static=True)
    x = pt.tensor("x", shape=(N,))
    M = pt.linalg.kron(A, B) + pt.diag(pt.exp(x))
    with listening() as entries:
        compile_py([A, B, x], pt.grad(log_density(M, x), A))
    refusals = {entry.rewrite: entry.refusal for entry in entries}
    assert "isn't known to be a multiple" in refusals["pullback_of_kron_sum_cholesky"].reason


def test_a_batch_of_sums_is_left_alone():
    A, B, x = pt.tensor("A", shape=(2, 3, 3)), pt.dmatrix("B"), pt.tensor("x", shape=(2, N))
    M = batched_kron(A, B) + pt.eye(N)
    gradient = pt.grad((whitened(M, x) ** 2).sum(), A)
    assert has_kron(compile_py([A, B, x], gradient).maker.fgraph)
