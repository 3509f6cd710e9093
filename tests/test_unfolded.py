"""Constant products and identity matrices in a model aren't computed before they are seen."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.basic import Constant
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.traversal import ancestors
from scipy.special import gammaln

from pymc_kron.unfolded import Unfolded, keep_kron_unfolded, unfolded, without_unfolded
from tests.helpers import PY, compile_py, count_ops, has_kron, largest_static_size

kron = pt.linalg.kron
SIZES = (24, 25)
N = 600
LAGS = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float) for n in SIZES]
A, B = np.exp(-LAGS[0] / 3), np.exp(-LAGS[1] / 5)
Y = np.random.default_rng(11).normal(size=N)
LARGEST = max(N, *(n * n for n in SIZES))


def mvnormal(sigma):
    pm.MvNormal("y", np.zeros(N), kron(A, B), observed=Y)


def mvnormal_with_noise(sigma):
    pm.MvNormal("y", np.zeros(N), kron(A, B) + sigma**2 * pt.eye(N), observed=Y)


def mvnormal_chol(sigma):
    pm.MvNormal("y", np.zeros(N), chol=kron(*map(np.linalg.cholesky, (A, B))), observed=Y)


def scaled_mvnormal(sigma):
    pm.MvNormal("y", np.zeros(N), sigma * kron(A, B), observed=Y)


def mvstudentt(sigma):
    pm.MvStudentT("y", nu=5, mu=np.zeros(N), scale=kron(A, B), observed=Y)


def mvstudentt_with_noise(sigma):
    pm.MvStudentT("y", nu=5, mu=np.zeros(N), scale=kron(A, B) + sigma * pt.eye(N), observed=Y)


def mvstudentt_with_constant_noise(sigma):
    pm.MvStudentT("y", nu=5, mu=np.zeros(N), scale=kron(A, B) + 0.1 * pt.eye(N), observed=Y)


def potential(sigma):
    M = kron(A, B) + sigma * pt.eye(N)
    form = Y @ pt.linalg.solve(M, Y, assume_a="pos")
    pm.Potential("p", -0.5 * form - 0.5 * pt.linalg.slogdet(M)[1])


MODELS = [
    mvnormal,
    mvnormal_with_noise,
    mvnormal_chol,
    scaled_mvnormal,
    mvstudentt,
    mvstudentt_with_noise,
    mvstudentt_with_constant_noise,
    potential,
]


def build_model(define):
    with pm.Model() as model:
        sigma = pm.HalfNormal("sigma", initval=0.7)
        define(sigma)
    return model


def largest_constant(variables):
    """Return the number of entries of the largest constant that some variables depend on."""
    constants = [var for var in ancestors(variables) if isinstance(var, Constant)]
    return max(
        (np.size(var.data) for var in constants if isinstance(var.data, np.ndarray)), default=0
    )


def covariance(define, sigma):
    K = np.kron(A, B)
    match define.__name__:
        case "scaled_mvnormal":
            return sigma * K
        case "mvnormal_with_noise":
            return K + sigma**2 * np.eye(N)
        case "mvstudentt_with_noise" | "potential":
            return K + sigma * np.eye(N)
        case "mvstudentt_with_constant_noise":
            return K + 0.1 * np.eye(N)
    return K


def expected_logp(define, sigma):
    K = covariance(define, sigma)
    form, logdet = Y @ np.linalg.solve(K, Y), np.linalg.slogdet(K)[1]
    prior = pm.logp(pm.HalfNormal.dist(), sigma).eval(mode=PY) + np.log(sigma)
    if define is potential:
        return prior - 0.5 * form - 0.5 * logdet
    if "student" in define.__name__:
        constant = gammaln((5 + N) / 2) - gammaln(5 / 2) - 0.5 * N * np.log(5 * np.pi)
        return prior + constant - 0.5 * logdet - (5 + N) / 2 * np.log1p(form / 5)
    return prior - 0.5 * form - 0.5 * logdet - 0.5 * N * np.log(2 * np.pi)


@pytest.mark.parametrize("define", MODELS)
def test_nothing_is_folded_into_a_product(define):
    model = build_model(define)
    # A potential is a part of the model's graph as it was written
    logp, dlogp = model.logp(), model.dlogp()
    assert largest_constant([logp, dlogp]) == LARGEST
    function = model.compile_fn([logp, dlogp], mode=PY)
    fgraph = function.f.maker.fgraph
    assert not has_kron(fgraph)
    assert count_ops(fgraph, Unfolded) == 0
    assert largest_constant(fgraph.outputs) <= LARGEST
    assert largest_static_size(fgraph) <= 2 * LARGEST
    point = model.initial_point()
    value, gradient = function(point)
    sigma = np.exp(point["sigma_log__"])
    assert_allclose(value, expected_logp(define, sigma), rtol=1e-9)
    step = 1e-5
    expected = [expected_logp(define, sigma * np.exp(sign * step)) for sign in (1, -1)]
    assert_allclose(gradient, (expected[0] - expected[1]) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("linker", ["PY", "NUMBA", "JAX"])
def test_no_marker_is_left_in_a_compiled_program(linker):
    model = build_model(mvstudentt_with_noise)
    mode = PY if linker == "PY" else linker
    # Both a product and an identity matrix are marked in the model's log-density
    assert any(isinstance(var.owner_op, Unfolded) for var in ancestors([model.logp()]))
    function = model.compile_fn([model.logp(), model.dlogp()], mode=mode)
    fgraph = function.f.maker.fgraph
    assert count_ops(fgraph, Unfolded) == 0
    assert not has_kron(fgraph)
    point = model.initial_point()
    value = expected_logp(mvstudentt_with_noise, np.exp(point["sigma_log__"]))
    assert_allclose(function(point)[0], value, rtol=1e-9)


def test_what_stays_dense_is_folded_again():
    # No rewrite needs the product of these: it is computed once, when the function is compiled
    out = kron(unfolded(pt.constant(np.ones((2, 2)))), np.eye(3)) + pt.dmatrix("x")
    x = next(var for var in ancestors([out]) if var.name == "x")
    function = compile_py([x], out)
    assert count_ops(function.maker.fgraph, Unfolded) == 0
    assert_allclose(function(np.ones((6, 6))), np.kron(np.ones((2, 2)), np.eye(3)) + 1)


def test_only_constants_are_marked():
    x = pt.dmatrix("x")
    constant = pt.constant(A[:3, :3])
    fgraph = FunctionGraph(
        outputs=[kron(x, constant), kron(constant, constant), pt.eye(7), pt.eye(x.shape[0])],
        clone=True,
    )
    changed = [
        keep_kron_unfolded.transform(fgraph, out.owner) not in (None, False)
        for out in fgraph.outputs
    ]
    assert changed == [False, True, True, False]
    [product] = keep_kron_unfolded.transform(fgraph, fgraph.outputs[1].owner)
    # A second time it is left alone
    assert not keep_kron_unfolded.transform(
        FunctionGraph([], [product], clone=False), product.owner
    )


def test_the_marker_is_the_identity():
    x = pt.dmatrix("x")
    marked = unfolded(x)
    assert without_unfolded(marked) is x
    assert without_unfolded(x) is x
    out = (marked**2).sum()
    value = np.arange(6.0).reshape(2, 3)
    for mode in (PY, pytensor.compile.mode.Mode(linker="py", optimizer=None)):
        function = pytensor.function([x], [marked, marked.shape, pt.grad(out, x)], mode=mode)
        results = function(value)
        assert_allclose(results[0], value)
        assert_allclose(results[1], [2, 3])
        assert_allclose(results[2], 2 * value)
