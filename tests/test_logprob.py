"""An unchanged model with ``pm.MvNormal`` against the distribution and against dense."""

import os
import subprocess
import sys

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.distributions.multivariate import MatrixNormalRV
from pymc.logprob.rewriting import construct_ir_fgraph, logprob_rewrites_db
from pymc.pytensorf import rewrite_pregrad
from pytensor.assumptions.specify import assume
from pytensor.graph.rewriting.db import RewriteDatabaseQuery
from pytensor.tensor.random.basic import MvNormalRV

from pymc_kron import KroneckerMvNormal
from pymc_kron.distributions.grid_rv import KroneckerMvNormalRV
from tests.helpers import (
    PY,
    RTOL,
    WITHOUT_KRON,
    count_ops,
    has_kron,
    largest_computed_size,
    random_spd,
    symbolic_dense_kron,
)

kron = pt.linalg.kron
chol = pt.linalg.cholesky
inv = pt.linalg.inv

rng = np.random.default_rng(19)
# No factor of size two: PyTensor takes any 2 x 2 matrix for tridiagonal, and then fails in the
# gradient of its inverse with the Python linker
SIZES = (4, 3, 5)
A, B, C = (random_spd(rng, n) for n in SIZES)
N = 60
MU = rng.normal(size=N)
Y = rng.normal(size=N)

# How people write a covariance of three factors
WRITTEN = {
    "cov": lambda a, b, c: {"cov": kron(kron(a, b), c)},
    "nested to the right": lambda a, b, c: {"cov": kron(a, kron(b, c))},
    "transposed": lambda a, b, c: {"cov": kron(a.T, kron(b, c).T)},
    "negative definite factors": lambda a, b, c: {"cov": kron(-a, kron(-b, c))},
    "scalar multiples": lambda a, b, c: {"cov": 0.5 * kron(a, kron(-2 * b, -c))},
    "chol": lambda a, b, c: {"chol": kron(kron(chol(a), chol(b)), chol(c))},
    "upper chol": lambda a, b, c: {
        "chol": kron(kron(chol(a), chol(b)), chol(c)).T,
        "lower": False,
    },
    "tau": lambda a, b, c: {"tau": kron(kron(inv(a), inv(b)), inv(c))},
    "cov of mixed factors": lambda a, b, c: {
        "cov": kron(chol(a) @ chol(a).T, kron(inv(inv(b)), c))
    },
}


def scaled_factors():
    scale = pm.HalfNormal("scale", initval=0.7)
    nugget = pm.HalfNormal("nugget", initval=1.2)
    return scale * A, B + nugget * np.eye(3), pt.as_tensor(C)


def written_model(name, observed=Y):
    with pm.Model() as model:
        pm.MvNormal("y", MU, **WRITTEN[name](*scaled_factors()), observed=observed)
    return model


def kronecker_model(observed=Y):
    with pm.Model() as model:
        KroneckerMvNormal("y", MU, scaled_factors(), observed=observed)
    return model


def dense_model(observed=Y):
    with pm.Model() as model:
        a, b, c = scaled_factors()
        cov = symbolic_dense_kron(a, symbolic_dense_kron(b, c))
        pm.MvNormal("y", MU, cov, observed=observed)
    return model


def logp_and_gradient(model):
    function = model.compile_fn([model.logp(), model.dlogp()], mode=PY)
    assert not has_kron(function.f.maker.fgraph)
    return function(model.initial_point())


@pytest.mark.parametrize(
    "observed",
    [pytest.param(Y, id="likelihood"), pytest.param(None, id="prior", marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("name", WRITTEN)
def test_logp_and_gradient_of_an_unchanged_model(name, observed):
    logp, gradient = logp_and_gradient(written_model(name, observed))
    for reference in (kronecker_model(observed), dense_model(observed)):
        expected_logp, expected_gradient = logp_and_gradient(reference)
        assert_allclose(logp, expected_logp, rtol=1e-10)
        assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_dense_in_logp_gradient_or_draws(name):
    model = written_model(name)
    point = model.initial_point()
    values = [point[value.name] for value in model.value_vars]
    outputs = [model.logp(), model.dlogp()]
    assert largest_computed_size(model.value_vars, outputs, values, mode=PY) == N
    assert largest_computed_size([], model["y"], [], mode=PY) == N


@pytest.mark.parametrize("name", ["cov", "chol", "tau", "negative definite factors"])
def test_draws_of_an_unchanged_model(name):
    n = 20_000
    with pm.Model():
        a, b, c = (pt.as_tensor(factor) for factor in (A, B, C))
        y = pm.MvNormal.dist(MU, **WRITTEN[name](a, b, c), size=n)
    draws = pm.draw(y, random_seed=1, mode=PY)
    K = np.kron(A, np.kron(B, C))
    errors = np.abs(np.cov(draws.T) - K) / np.sqrt(
        (K**2 + np.outer(K.diagonal(), K.diagonal())) / n
    )
    assert errors.max() < 4.5
    assert_allclose(draws.mean(axis=0), MU, atol=4.5 * np.sqrt(K.diagonal().max() / n))


def test_draws_equal_the_dense_ones_for_one_seed():
    # Both multiply the same standard normals by the same Cholesky factor
    covs = {"kron": kron(pt.as_tensor(A), B), "dense": np.kron(A, B)}
    draws = {
        name: pm.draw(pm.MvNormal.dist(np.zeros(12), cov, size=3), random_seed=1, mode=PY)
        for name, cov in covs.items()
    }
    assert_allclose(draws["kron"], draws["dense"], rtol=1e-10)


def test_batched_covariances():
    batch = random_spd(np.random.default_rng(1), 3, batch=(5,))
    cov = pt.vectorize(kron, "(i,j),(k,l)->(m,n)")(pt.as_tensor(batch), pt.as_tensor(B))
    x = rng.normal(size=(5, 9))
    with pm.Model() as model:
        pm.MvNormal("x", np.zeros(9), cov)
    logp = model.compile_fn(model.logp(sum=False), mode=PY)({"x": x})[0]
    dense = np.stack([np.kron(a, B) for a in batch])
    expected = pm.logp(pm.MvNormal.dist(np.zeros((5, 9)), dense), x).eval(mode=PY)
    assert_allclose(logp, expected, rtol=1e-10)
    assert largest_computed_size([], model["x"], [], mode=PY) == 5 * 9


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_of_the_variable(dtype):
    observed = Y[:12].astype(dtype)
    with pm.Model() as model:
        cov = kron(pt.as_tensor(A), B)
        y = pm.MvNormal("y", np.zeros(12), cov, dtype=dtype, observed=observed)
    assert pm.draw(y, random_seed=1, mode=PY).dtype == dtype
    expected = pm.logp(pm.MvNormal.dist(np.zeros(12), np.kron(A, B)), observed.astype(float))
    logp = model.compile_logp(mode=PY)(model.initial_point())
    assert_allclose(logp, expected.eval(mode=PY), rtol=1e-10)


def test_chol_with_a_negative_diagonal():
    # PyMC squares what is given
    L = np.array([[1.3, 0.0], [0.4, -0.9]])
    chols = {"kron": kron(pt.as_tensor(L), np.linalg.cholesky(B))}
    chols["dense"] = np.kron(L, np.linalg.cholesky(B))
    logps = {}
    for name, chol in chols.items():
        with pm.Model() as model:
            pm.MvNormal("y", np.zeros(6), chol=chol, observed=Y[:6])
        logps[name] = model.compile_logp(mode=PY)({})
    assert_allclose(logps["kron"], logps["dense"], rtol=1e-10)


@pytest.mark.parametrize(
    "cov",
    [
        kron(pt.tensor("A", shape=(3, 2)), pt.tensor("B", shape=(2, 3))),
        pt.dmatrix("A") @ pt.dmatrix("B"),
    ],
    ids=["rectangular factors", "a matrix product"],
)
def test_refusals(cov):
    x = pm.MvNormal.dist(np.zeros(6), cov)
    ir = construct_ir_fgraph({x: x.clone()})
    assert count_ops(ir, KroneckerMvNormalRV) == 0


def test_the_other_methods_of_drawing_are_left_dense():
    # For semidefinite covariances, which a Cholesky factor doesn't exist for
    cov = kron(pt.ones((2, 2)), pt.eye(3))
    x = pm.MvNormal.dist(np.zeros(6), cov, method="eigh")
    draws = pm.draw(x, 5, random_seed=1, mode=PY)
    assert_allclose(draws[:, :3], draws[:, 3:], atol=1e-6)


def test_turned_off_by_mode():
    model = written_model("cov")
    for mode in (WITHOUT_KRON, PY.excluding("mvnormal_of_kron_draws")):
        assert has_kron(pm.compile([], model["y"], mode=mode).maker.fgraph)


def test_turned_off_in_the_intermediate_representation():
    y = pm.MvNormal.dist(np.zeros(12), kron(pt.as_tensor(A), B))
    without_kron = RewriteDatabaseQuery(include=["basic"], exclude=["kron"])
    for rewriter, count in ((None, 1), (logprob_rewrites_db.query(without_kron), 0)):
        ir = construct_ir_fgraph({y: y.clone()}, ir_rewriter=rewriter)
        assert count_ops(ir, KroneckerMvNormalRV) == count


_HAS_KRON = """
import numpy as np, pymc as pm, pytensor.tensor as pt, pymc_kron
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.linalg.products import KroneckerProduct
with pm.Model() as model:
    s = pm.HalfNormal("s")
    pm.MvNormal("y", np.zeros(6), pt.linalg.kron(s * (np.eye(3) + 1), np.eye(2) + 1))
gradient = FunctionGraph(outputs=[model.dlogp()])
assert any(isinstance(node.op, KroneckerProduct) for node in gradient.apply_nodes)
"""


def test_turned_off_for_a_program():
    # PyMC doesn't ask the configuration before it takes a gradient
    environment = {**os.environ, "PYTENSOR_FLAGS": "optimizer_excluding=kron"}
    subprocess.run([sys.executable, "-c", _HAS_KRON], env=environment, check=True)


def test_pm_logp_of_a_variable_is_factorwise_too():
    # It doesn't pass through PyMC's intermediate representation
    a, b = pt.dmatrices("a", "b")
    logp = pm.logp(pm.MvNormal.dist(np.zeros(12), kron(a, b)), np.arange(12.0))
    assert largest_computed_size([a, b], [logp], [A, B], mode=PY) <= 16


# Sums of products, which have no factorwise Cholesky factor

S = 0.7
K12 = np.kron(A, B)
BATCH = random_spd(np.random.default_rng(1), 4, batch=(5,))


def noisy(a, s):
    return kron(a, B) + s * pt.eye(12)


def count_in_representation(*variables):
    ir = construct_ir_fgraph({var: var.clone() for var in variables})
    return count_ops(ir, KroneckerMvNormalRV)


def assert_covariance(draws, K, n):
    errors = np.sqrt((K**2 + np.outer(K.diagonal(), K.diagonal())) / n)
    assert np.abs((np.cov(draws.T) - K) / errors).max() < 4.5


@pytest.mark.parametrize(
    ("cov", "expected"),
    [
        (noisy(pt.as_tensor(A), S), K12 + S * np.eye(12)),
        (noisy(pt.as_tensor(A), 0.0), K12),
        (noisy(pt.as_tensor(A), S).T, K12 + S * np.eye(12)),
        (
            kron(A, np.eye(3)) + kron(np.eye(4), B),
            np.kron(A, np.eye(3)) + np.kron(np.eye(4), B),
        ),
        (
            kron(pt.as_tensor(A), B) + kron(2 * pt.eye(4), assume(B @ B, positive_definite=True)),
            K12 + 2 * np.kron(np.eye(4), B @ B),
        ),
    ],
    ids=["noise", "no noise", "transposed", "Kronecker sum", "product"],
)
def test_sums_of_products(cov, expected):
    n = 20_000
    mu, y = MU[:12], Y[:12]
    with pm.Model() as model:
        x = pm.MvNormal("x", mu, cov)
    assert count_in_representation(x) == 1
    logp = model.compile_logp(mode=PY)({"x": y})
    reference = pm.logp(pm.MvNormal.dist(mu, expected), y).eval(mode=PY)
    assert_allclose(logp, reference, rtol=1e-10)

    variable = pm.MvNormal.dist(mu, cov, size=n)
    draws = pm.draw(variable, random_seed=1, mode=PY)
    assert draws.shape == (n, 12)
    assert_covariance(draws, expected, n)
    assert_allclose(draws.mean(axis=0), mu, atol=4.5 * np.sqrt(expected.diagonal().max() / n))
    assert largest_computed_size([], [variable], [], mode=PY) == n * 12


SHAPES = {
    # of mu, the factor and the noise, and size
    "one": ((12,), (4, 4), (), None),
    "means": ((3, 12), (4, 4), (), None),
    "size": ((12,), (4, 4), (), (2, 3)),
    "size of means": ((3, 12), (4, 4), (), (2, 3)),
    "covariances": ((12,), (5, 4, 4), (), None),
    "covariances and means": ((5, 12), (5, 4, 4), (), None),
    "covariances and broadcast means": ((3, 1, 12), (5, 4, 4), (), None),
    "noises": ((12,), (4, 4), (5, 1, 1), None),
    "size of covariances": ((12,), (5, 4, 4), (5, 1, 1), (2, 5)),
    "one mean for all cells": ((1,), (4, 4), (), None),
    "a number for the mean": ((), (4, 4), (), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_sums_of_products(name):
    mu_shape, factor_shape, noise_shape, size = SHAPES[name]
    mu = np.random.default_rng(2).normal(size=mu_shape)
    a = pt.as_tensor(BATCH if len(factor_shape) == 3 else A)
    s = pt.as_tensor(np.random.default_rng(3).uniform(0.5, 1, size=noise_shape))
    batched_kron = pt.vectorize(kron, "(i,j),(k,l)->(m,n)")
    covs = {
        "kron": batched_kron(a, pt.as_tensor(B)) + s * pt.eye(12),
        "dense": pt.vectorize(symbolic_dense_kron, "(i,j),(k,l)->(m,n)")(a, pt.as_tensor(B))
        + s * pt.eye(12),
    }
    logps, draws = {}, {}
    for kind, cov in covs.items():
        with pm.Model() as model:
            x = pm.MvNormal("x", mu, cov, size=size)
        draws[kind] = pm.draw(x, random_seed=1, mode=PY)
        value = np.random.default_rng(4).normal(size=draws[kind].shape)
        logps[kind] = model.compile_fn(model.logp(sum=False), mode=PY)({"x": value})[0]
        if kind == "kron":
            assert count_in_representation(x) == 1
            assert largest_computed_size([], [x], [], mode=PY) <= max(value.size, a.data.size)
    assert draws["kron"].shape == draws["dense"].shape
    assert logps["kron"].shape == logps["dense"].shape
    assert_allclose(logps["kron"], logps["dense"], rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_of_a_variable_with_noise(dtype):
    observed = Y[:12].astype(dtype)
    a, b = pt.as_tensor(A.astype(dtype)), pt.as_tensor(B.astype(dtype))
    with pm.Model() as model:
        cov = kron(a, b) + pt.constant(S, dtype=dtype) * pt.eye(12, dtype=dtype)
        y = pm.MvNormal("y", np.zeros(12, dtype), cov, dtype=dtype, observed=observed)
    assert y.dtype == dtype
    assert pm.draw(y, random_seed=1, mode=PY).dtype == dtype
    expected = pm.logp(pm.MvNormal.dist(np.zeros(12), K12 + S * np.eye(12)), observed.astype(float))
    logp = model.compile_logp(mode=PY)(model.initial_point())
    assert_allclose(logp, expected.eval(mode=PY), rtol=RTOL[dtype])


@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_other_methods_of_drawing_with_noise_are_left_dense(method):
    x = pm.MvNormal.dist(np.zeros(12), noisy(pt.as_tensor(A), S), method=method)
    function = pm.compile([], x, mode=PY, random_seed=1)
    assert count_ops(function.maker.fgraph, MvNormalRV) == 1
    assert np.isfinite(function()).all()


@pytest.mark.parametrize(
    "cov",
    [
        kron(pt.tensor("A", shape=(4, 4)), B) + pt.diag(pt.dvector("d")),
        kron(pt.tensor("A", shape=(4, 4)), B) + pt.dmatrix("W"),
        kron(pt.tensor("A", shape=(4, 4)), B)
        + kron(pt.tensor("C", shape=(4, 4)), pt.eye(3))
        + pt.eye(12),
    ],
    ids=["diagonal noise", "a matrix", "three matrices"],
)
def test_refused_sums(cov):
    x = pm.MvNormal.dist(np.zeros(12), cov)
    assert count_in_representation(x) == 0


def test_a_covariance_with_noise_that_is_not_positive_definite():
    logps = {}
    for name, product in (("kron", kron), ("dense", symbolic_dense_kron)):
        with pm.Model() as model:
            s = pm.Normal("s")
            cov = product(pt.as_tensor(A), pt.as_tensor(B)) + s * pt.eye(12)
            pm.MvNormal("y", np.zeros(12), cov, observed=Y[:12])
        logp = model.compile_logp(mode=PY)
        logps[name] = [logp({"s": np.array(value)}) for value in (0.3, -2.0, -50.0)]
    assert logps["kron"][1:] == logps["dense"][1:] == [-np.inf, -np.inf]
    assert_allclose(logps["kron"][0], logps["dense"][0], rtol=1e-10)


def test_sums_turned_off_by_mode():
    x = pm.MvNormal.dist(np.zeros(12), noisy(pt.as_tensor(A), S))
    for mode in (WITHOUT_KRON, PY.excluding("mvnormal_of_kron_sum_draws")):
        function = pm.compile([], x, mode=mode, random_seed=1)
        assert count_ops(function.maker.fgraph, MvNormalRV) == 1


def test_pm_logp_of_a_variable_with_noise_is_factorwise_too():
    a, b, s = pt.tensor("a", shape=(4, 4)), pt.tensor("b", shape=(3, 3)), pt.dscalar("s")
    y = np.arange(12.0)
    logp = pm.logp(pm.MvNormal.dist(np.zeros(12), kron(a, b) + s * pt.eye(12)), y)
    inputs, values = [a, b, s], [A, B, np.array(S)]
    # Of the Cholesky factor that PyMC writes the gradient isn't factorwise, unless it is taken last
    for outputs in ([logp], pt.grad(rewrite_pregrad(logp), inputs)):
        assert largest_computed_size(inputs, outputs, values, mode=PY) < 144
    expected = pm.logp(pm.MvNormal.dist(np.zeros(12), K12 + S * np.eye(12)), y).eval(mode=PY)
    assert_allclose(pm.compile(inputs, logp, mode=PY)(*values), expected, rtol=1e-10)


@pytest.mark.parametrize("which", ["rows", "columns", "both"])
@pytest.mark.parametrize("size", [None, (2,)])
def test_draws_of_a_matrix_normal(which, size):
    a, b, c = (pt.as_tensor(factor) for factor in (A, B, C))
    covs = {"rowcov": kron(a, b), "colcov": c} if which == "rows" else {"rowcov": c}
    if which != "rows":
        covs["colcov"] = kron(a, b)
    if which == "both":
        covs["rowcov"] = kron(c, b)
    rows, columns = covs["rowcov"].type.shape[0], covs["colcov"].type.shape[0]
    dense = {name: cov.eval(mode=PY) for name, cov in covs.items()}
    draws = []
    for arguments in (covs, dense):
        x = pm.MatrixNormal.dist(mu=np.zeros((rows, columns)), **arguments, size=size)
        draws.append(pm.draw(x, random_seed=1, mode=PY))
    # Both multiply the same standard normals by the same Cholesky factors
    assert draws[0].shape == (*(size or ()), rows, columns)
    assert_allclose(draws[0], draws[1], rtol=1e-9, atol=1e-12)


def test_a_matrix_normal_of_dense_covariances_is_left_alone():
    x = pm.MatrixNormal.dist(mu=np.zeros((4, 3)), rowcov=A, colcov=B)
    function = pm.compile([], x, mode=PY, random_seed=1)
    assert count_ops(function.maker.fgraph, MatrixNormalRV) == 1
