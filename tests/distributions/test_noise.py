"""`KroneckerMvNormal` with noise, and factors given by their eigenvectors."""

import re
from functools import reduce

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from pymc.distributions.moments import mean
from pymc.logprob.utils import ParameterValueError
from pymc.pytensorf import rewrite_pregrad
from pymc.testing import assert_support_point_is_expected
from pytensor.compile.mode import get_mode
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.decomposition.eigen import Eigh
from pytensor.tensor.linalg.inverse import MatrixInverse
from pytensor.tensor.linalg.solvers.core import SolveBase
from pytensor.tensor.math import Dot

from pymc_kron import KroneckerMvNormal
from pymc_kron.routines import LapackFiniteEigh
from tests.helpers import (
    PY,
    compile_py,
    count_ops,
    dense_kron,
    has_kron,
    largest_computed_size,
    largest_jax_size,
    random_spd,
)

SIZES = (2, 4, 3)
N = 24


def covariances(seed=17, sizes=SIZES, batch=()):
    rng = np.random.default_rng(seed)
    return [random_spd(rng, n, batch=batch) for n in sizes]


def described(forms, covs):
    """Return the lists of arguments that describe covariances in these forms."""
    parameters = {
        "cov": lambda cov: cov,
        "chol": np.linalg.cholesky,
        "tau": np.linalg.inv,
        "evd": lambda cov: tuple(np.linalg.eigh(cov)),
    }
    return {
        f"{kind}s": [
            parameters[kind](cov) if form == kind else None
            for form, cov in zip(forms, covs, strict=True)
        ]
        for kind in parameters
        if kind in forms
    }


FORMS = {
    "covs": ("cov",) * 3,
    "chols": ("chol",) * 3,
    "taus": ("tau",) * 3,
    "evds": ("evd",) * 3,
    "mixture": ("evd", "tau", "chol"),
}


def noises():
    """Return the arguments for noise and the dense covariances of the noise, by name."""
    rng = np.random.default_rng(23)
    D = [random_spd(rng, n) for n in SIZES]
    variances = rng.uniform(0.5, 2, size=4)
    return {
        "none": ({}, np.zeros((N, N))),
        "sigma": ({"sigma": 0.7}, 0.49 * np.eye(N)),
        "matrices": ({"noise_covs": D}, dense_kron(*D)),
        "task noise": ({"noise_covs": [D[0], None, None]}, dense_kron(D[0], np.eye(12))),
        "diagonal": (
            {"noise_covs": [1.3, variances, 0.6]},
            0.78 * dense_kron(np.eye(2), np.diag(variances), np.eye(3)),
        ),
        "numbers": ({"noise_covs": [0.5, 2, 0.7]}, 0.7 * np.eye(N)),
    }


NOISES = noises()


PAIRS = [
    *(("covs", noise) for noise in NOISES),
    *((forms, "matrices") for forms in FORMS),
    *((forms, noise) for forms in ("evds", "mixture") for noise in ("sigma", "none")),
]


@pytest.mark.parametrize(("forms", "noise"), PAIRS)
def test_logp_and_draws_against_dense(forms, noise):
    covs = covariances()
    arguments, noise_cov = NOISES[noise]
    rng = np.random.default_rng(3)
    mu, x = rng.normal(size=(2, N))
    dense = dense_kron(*covs) + noise_cov
    rv = KroneckerMvNormal.dist(mu, **described(FORMS[forms], covs), **arguments)
    expected = scipy.stats.multivariate_normal(mu, dense).logpdf(x)
    assert_allclose(pm.logp(rv, x).eval(mode=PY), expected, rtol=1e-10)
    assert_allclose(mean(rv).eval(mode=PY), mu)

    # Every draw is a linear map of independent normals: the map of the identity is a root
    draws = pm.draw(rv, 4000, random_seed=5, mode=PY)
    whitened = np.linalg.solve(np.linalg.cholesky(dense), (draws - mu).T)
    statistic = (whitened**2).sum(axis=0)
    assert scipy.stats.kstest(statistic, scipy.stats.chi2(N).cdf).pvalue > 1e-3
    error = np.cov(whitened) - np.eye(N)
    # The standard error of a sample covariance of independent normals is 1 / sqrt(draws)
    assert np.abs(error).max() < 5 * np.sqrt(2 / 4000)


BATCHES = {
    "sigma": {"sigma": (5,)},
    "factor": {"covs": (5,)},
    "both": {"sigma": (5,), "covs": (5,)},
    "mean": {"mu": (5,)},
    "crossed": {"sigma": (2, 1), "covs": (5,)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_against_a_loop_of_dense(name):
    rng = np.random.default_rng(29)
    shapes = BATCHES[name]
    A = random_spd(rng, 3, batch=shapes.get("covs", ()))
    B = random_spd(rng, 2)
    sigma = rng.uniform(0.5, 1.5, size=shapes.get("sigma", ()))
    mu = rng.normal(size=(*shapes.get("mu", ()), 6))
    batch = np.broadcast_shapes(*shapes.values())
    x = rng.normal(size=(7, *batch, 6))
    variables = [pt.tensor(shape=value.shape) for value in (A, B, sigma, mu, x)]
    A_var, B_var, sigma_var, mu_var, x_var = variables
    rv = KroneckerMvNormal.dist(mu_var, [A_var, B_var], sigma=sigma_var, size=x.shape[:-1])
    logp = pm.logp(rv, x_var)
    weights = rng.normal(size=x.shape[:-1])
    gradients = pt.grad((logp * weights).sum(), variables)
    values = [A, B, sigma, mu, x]
    result, *gradients = compile_py(variables, [logp, *gradients])(*values)

    expected = np.empty(x.shape[:-1])
    in_mean = np.empty(x.shape)
    in_sigma, in_A = np.empty(x.shape[:-1]), np.empty((*x.shape[:-1], 3, 3))
    for index in np.ndindex(x.shape[:-1]):
        cell = index[1:]
        A_i = np.broadcast_to(A, (*batch, 3, 3))[cell]
        sigma_i = np.broadcast_to(sigma, batch)[cell]
        K = np.kron(A_i, B) + sigma_i**2 * np.eye(6)
        delta = x[index] - np.broadcast_to(mu, (*batch, 6))[cell]
        expected[index] = scipy.stats.multivariate_normal(cov=K).logpdf(delta)
        alpha = np.linalg.solve(K, delta)
        G = 0.5 * weights[index] * (np.outer(alpha, alpha) - np.linalg.inv(K))
        in_mean[index] = weights[index] * alpha
        in_sigma[index] = 2 * sigma_i * np.trace(G)
        in_A[index] = np.einsum("ikjl,kl->ij", G.reshape(3, 2, 3, 2), B)
    assert_allclose(result, expected, rtol=1e-10)
    dA, _, dsigma, dmu, dx = gradients
    assert_allclose(dx, -in_mean, rtol=1e-8, atol=1e-10)
    assert_allclose(dmu, summed_like(in_mean, mu), rtol=1e-8, atol=1e-10)
    assert_allclose(dsigma, summed_like(in_sigma, sigma), rtol=1e-8, atol=1e-10)
    assert_allclose(dA, summed_like(in_A, A), rtol=1e-8, atol=1e-10)


def summed_like(gradient, like):
    extra = gradient.ndim - like.ndim
    gradient = gradient.sum(axis=tuple(range(extra)))
    axes = tuple(i for i, n in enumerate(like.shape) if n == 1 and gradient.shape[i] > 1)
    return gradient.sum(axis=axes, keepdims=True)


# In models


def model(kind, observed=None, **noise):
    """Return a model with free length-scales, written in one of the ways that mean the same."""
    lags = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in (3, 4)]
    with pm.Model() as model:
        length_scale = pm.LogNormal("length_scale", shape=2)
        s = pm.HalfNormal("s")
        A, B = (pt.exp(-lag / length_scale[i]) for i, lag in enumerate(lags))
        match kind:
            case "sigma":
                KroneckerMvNormal("y", 0, [A, B], sigma=s, observed=observed)
            case "noise_covs":
                KroneckerMvNormal("y", 0, [A, B], noise_covs=[s, s], observed=observed)
            case "plain":
                cov = pt.linalg.kron(A, B) + s**2 * pt.eye(12)
                pm.MvNormal("y", np.zeros(12), cov, observed=observed)
            case "dense":
                product = (A[:, None, :, None] * B[None, :, None, :]).reshape((12, 12))
                cov = product + s**2 * pt.eye(12)
                pm.MvNormal("y", np.zeros(12), cov, observed=observed)
    return model


def test_all_doors_lead_to_the_same_posterior_density():
    y = np.random.default_rng(1).normal(size=12)
    point = None
    results = {}
    for kind in ("sigma", "noise_covs", "plain", "dense"):
        kronecker = model(kind, observed=y)
        point = kronecker.initial_point() if point is None else point
        results[kind] = [
            kronecker.compile_logp(mode=PY)(point),
            kronecker.compile_dlogp(mode=PY)(point),
        ]
    for kind in ("sigma", "noise_covs", "plain"):
        for result, expected in zip(results[kind], results["dense"], strict=True):
            assert_allclose(result, expected, rtol=1e-9)


def test_the_plain_door_has_the_same_decompositions_and_products():
    # It has besides what finds out that the factors are symmetric, which nothing promises
    y = np.random.default_rng(1).normal(size=12)
    counts = []
    for kind in ("sigma", "plain"):
        fgraph = program(model(kind, observed=y), PY)
        assert not has_kron(fgraph)
        counts.append([count_ops(fgraph, op) for op in (Eigh, Cholesky, SolveBase, Dot)])
    assert counts[0] == counts[1]


def test_as_a_prior():
    y = np.random.default_rng(1).normal(size=12)
    with model("sigma") as kronecker:
        pm.Normal("z", kronecker["y"], 0.5, observed=y)
    with model("dense") as dense:
        pm.Normal("z", dense["y"], 0.5, observed=y)
    point = kronecker.initial_point()
    point["y"] = np.random.default_rng(2).normal(size=12)
    for compile_one in ("compile_logp", "compile_dlogp"):
        result, expected = (getattr(m, compile_one)(mode=PY)(point) for m in (kronecker, dense))
        assert_allclose(result, expected, rtol=1e-9)


@pytest.mark.nightly
def test_sampling_and_predictive_sampling():
    y = np.random.default_rng(1).normal(size=12)
    with model("sigma", observed=y):
        idata = pm.sample(
            50,
            tune=50,
            chains=1,
            cores=1,
            random_seed=1,
            progressbar=False,
            compute_convergence_checks=False,
        )
        pm.sample_posterior_predictive(
            idata, random_seed=1, progressbar=False, extend_inferencedata=True
        )
    draws = idata.posterior_predictive["y"]
    assert draws.shape == (1, 50, 12)
    assert np.isfinite(draws).all()
    assert np.isfinite(idata.posterior["s"]).all()


@pytest.mark.nightly
def test_hessian():
    # Of the closed form, `test_closed_forms.py` has the second derivatives
    y = np.random.default_rng(1).normal(size=12)
    kronecker, dense = (model(kind, observed=y) for kind in ("sigma", "dense"))
    point = kronecker.initial_point()
    result, expected = (
        m.compile_d2logp(mode=PY, negate_output=False)(point) for m in (kronecker, dense)
    )
    assert_allclose(result, expected, rtol=1e-8)


# PyMC's own call of PyTensor is deprecated there
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["advi", "fullrank_advi"])
def test_variational_inference(method):
    y = np.random.default_rng(1).normal(size=12)
    losses = []
    for kind in ("sigma", "dense"):
        with model(kind, observed=y):
            fit = pm.fit(
                20, method=method, progressbar=False, random_seed=1, fn_kwargs={"mode": PY}
            )
        losses.append(fit.hist)
    assert_allclose(*losses, rtol=1e-6)


def test_support_point():
    with pm.Model() as kronecker:
        KroneckerMvNormal("x", np.arange(6.0), covariances(sizes=(2, 3)), sigma=1)
    assert_support_point_is_expected(kronecker, np.arange(6.0))


# What is computed once


def program(kronecker, mode="NUMBA"):
    """Return the rewritten graph of the log-density and its gradient."""
    fgraph = FunctionGraph(kronecker.value_vars, [kronecker.logp(), kronecker.dlogp()], clone=True)
    get_mode(mode).excluding("inplace").optimizer.rewrite(fgraph)
    return fgraph


def decompositions(fgraph):
    return count_ops(fgraph, Eigh | LapackFiniteEigh), count_ops(fgraph, Cholesky)


FREE = {
    "cov": lambda scale, cov: {"covs": [cov[0] * scale, cov[1] * scale]},
    "tau": lambda scale, cov: {"taus": [cov[0] * scale, cov[1] * scale]},
    "chol": lambda scale, cov: {"chols": [np.linalg.cholesky(c) * scale for c in cov]},
}


@pytest.mark.parametrize("mode", ["NUMBA", "JAX", PY], ids=["numba", "jax", "py"])
@pytest.mark.parametrize(
    ("form", "noise", "expected"),
    [
        ("cov", {}, (0, 2)),
        ("tau", {}, (0, 2)),
        ("chol", {}, (0, 0)),
        ("cov", {"sigma": 0.3}, (2, 0)),
        ("chol", {"sigma": 0.3}, (2, 0)),
        ("cov", {"noise_covs": [np.eye(2) + 1, None]}, (2, 0)),
    ],
    ids=str,
)
def test_one_decomposition_a_factor_in_value_and_gradient(form, noise, expected, mode):
    with pm.Model() as kronecker:
        scale = pm.HalfNormal("scale")
        arguments = FREE[form](scale, covariances(sizes=(2, 3)))
        KroneckerMvNormal("y", 0, **arguments, **noise, observed=np.arange(6.0))
    if mode == "JAX" and noise:
        pytest.skip("on JAX the operation is kept whole")
    assert decompositions(program(kronecker, mode)) == expected


@pytest.mark.parametrize("mode", ["NUMBA", PY], ids=["numba", "py"])
@pytest.mark.parametrize(
    "noise", [{}, {"sigma": 1}, {"noise_covs": [np.eye(2) + 1, None]}], ids=str
)
@pytest.mark.parametrize("form", ["cov", "chol", "tau", "evd"])
def test_constant_factors_are_decomposed_once(form, noise, mode):
    # Known covariances, such as pedigrees, pay matrix products alone
    covs = covariances(sizes=(2, 3))
    with pm.Model() as kronecker:
        mu = pm.Normal("mu", shape=6)
        noise = {
            key: pm.HalfNormal("s") if key == "sigma" else value for key, value in noise.items()
        }
        KroneckerMvNormal("y", mu, **described((form, form), covs), **noise, observed=np.ones(6))
    fgraph = program(kronecker, mode)
    assert decompositions(fgraph) == (0, 0)
    assert count_ops(fgraph, MatrixInverse) == 0


def test_a_constant_factor_beside_a_free_one():
    A, B = covariances(sizes=(2, 3))
    with pm.Model() as kronecker:
        scale = pm.HalfNormal("scale")
        KroneckerMvNormal("y", 0, [A, scale * B], sigma=0.5, observed=np.ones(6))
    assert decompositions(program(kronecker)) == (1, 0)


@pytest.mark.parametrize("noise", ["none", "sigma"])
def test_given_eigenvectors_are_not_decomposed(noise):
    arguments, _ = NOISES[noise]
    pairs = [(pt.vector(f"w{i}"), pt.matrix(f"Q{i}")) for i in range(2)]
    inputs = [part for pair in pairs for part in pair]
    x = pt.vector("x")
    logp = pm.logp(KroneckerMvNormal.dist(evds=pairs, **arguments), x)
    gradients = pt.grad(rewrite_pregrad(logp), [*inputs, x])
    fgraph = FunctionGraph([*inputs, x], [logp, *gradients], clone=True)
    get_mode("NUMBA").excluding("inplace").optimizer.rewrite(fgraph)
    assert decompositions(fgraph) == (0, 0)
    assert count_ops(fgraph, SolveBase) == 0


@pytest.mark.parametrize("what", ["logp", "gradient", "draws"])
@pytest.mark.parametrize(
    "noise", [{"sigma": 0.5}, {"noise_covs": [np.full(30, 2.0), np.eye(40)]}], ids=["sigma", "covs"]
)
def test_no_array_with_n_x_n_entries(what, noise):
    rng = np.random.default_rng(31)
    arrays = [random_spd(rng, 30), random_spd(rng, 40), rng.normal(size=1200)]
    A, B, x = pt.matrix("A"), pt.matrix("B"), pt.vector("x")
    rv = KroneckerMvNormal.dist(x, [A, B], **noise)
    if what == "draws":
        assert largest_computed_size([A, B, x], rv, arrays) <= 1600
        return
    logp = pm.logp(rv, 2 * x + 1)
    outputs = logp if what == "logp" else pt.grad(rewrite_pregrad(logp), [A, B, x])
    assert largest_computed_size([A, B, x], outputs, arrays) <= 1600


# Gradients on JAX


@pytest.mark.parametrize("kind", ["sigma", "plain"])
def test_gradients_on_jax_at_repeated_eigenvalues(kind):
    jax = pytest.importorskip("jax")
    from pymc.sampling.jax import get_jaxified_logp

    y = np.random.default_rng(1).normal(size=12)
    lag = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))

    def identity_model(kind):
        with pm.Model() as model:
            length_scale, scale, s = (
                pm.HalfNormal(name) for name in ("length_scale", "scale", "s")
            )
            A, B = pt.exp(-lag / length_scale), scale * pt.eye(4)
            if kind == "sigma":
                KroneckerMvNormal("y", 0, [A, B], sigma=s, observed=y)
            else:
                kron = pt.linalg.kron(A, B)
                if kind == "dense":
                    kron = (A[:, None, :, None] * B[None, :, None, :]).reshape((12, 12))
                pm.MvNormal("y", np.zeros(12), kron + s**2 * pt.eye(12), observed=y)
        return model

    point = [np.array(0.3), np.array(-0.2), np.array(0.1)]
    expected, dense_gradient = jax.value_and_grad(get_jaxified_logp(identity_model("dense")))(point)
    value, gradient = jax.value_and_grad(get_jaxified_logp(identity_model(kind)))(point)
    assert_allclose(value, expected, rtol=1e-10)
    assert_allclose(gradient, dense_gradient, rtol=1e-8)
    largest = largest_jax_size(jax.value_and_grad(get_jaxified_logp(identity_model(kind))), point)
    assert largest < 12 * 12


# What is refused

A, B = np.eye(2), np.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"sigma": np.ones(6)},
            ValueError,
            "got shape (6,), one for each of the N = 2 * 3 = 6 cells. What exists instead is noise "
            "with a covariance of its own along each axis, noise_covs=",
        ),
        ({"sigma": 1j}, ValueError, "sigma must be real, got dtype complex128"),
        ({"sigma": 1, "noise_covs": [A, B]}, ValueError, "sigma and noise_covs can't be given"),
        ({"noise_covs": A}, TypeError, "noise_covs must be a list or tuple"),
        (
            {"noise_covs": [A]},
            ValueError,
            "noise_covs must have one entry for each of the 2 factors, got 1",
        ),
        (
            {"noise_covs": [B, A]},
            ValueError,
            "noise_covs[0] must be a matrix (2, 2), the diagonal (2,) of one, a number or None, "
            "to fit factor 0, got shape (3, 3)",
        ),
        (
            {"noise_covs": [None, np.ones(4)]},
            ValueError,
            "noise_covs[1] must be a matrix (3, 3), the diagonal (3,) of one, a number or None, "
            "to fit factor 1, got shape (4,)",
        ),
    ],
)
def test_errors_about_noise(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        KroneckerMvNormal.dist(0, [A, B], **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"evds": (np.ones(2), A)}, TypeError, "evds[0] must be a pair (w, Q) of eigenvalues"),
        ({"evds": np.eye(2)}, TypeError, "evds must be a list or tuple with one pair"),
        ({"evds": [(np.ones(2), A, A)]}, TypeError, "got 3 entries"),
        (
            {"evds": [(np.ones(3), A)]},
            ValueError,
            "The eigenvalues evds[0][0] must be as many as the eigenvectors evds[0][1] are, got "
            "shapes (3,) and (2, 2)",
        ),
        ({"evds": [(np.ones(2), np.ones((2, 3)))]}, ValueError, "evds[0][1] must be a square"),
        (
            {"covs": [A], "evds": [(np.ones(2), A)]},
            ValueError,
            "Factor 0 needs exactly one of covs, chols, taus and evds, got covs[0] and evds[0]",
        ),
    ],
)
def test_errors_about_eigenvectors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        KroneckerMvNormal.dist(0, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"covs": [A, -B], "sigma": 0.5},
        {"covs": [A, B], "noise_covs": [A, -B]},
        {"evds": [(np.array([1.0, -1.0]), A), (np.ones(3), B)]},
    ],
)
def test_a_covariance_that_is_not_positive_definite(arguments):
    with pytest.raises(ParameterValueError, match="posdef covariance"):
        pm.logp(KroneckerMvNormal.dist(0, **arguments), np.ones(6)).eval(mode=PY)


def test_a_singular_factor_with_noise():
    rank_one = np.ones((2, 2))
    rv = KroneckerMvNormal.dist(0, [rank_one, B], sigma=0.5)
    dense = np.kron(rank_one, B) + 0.25 * np.eye(6)
    x = np.arange(6.0)
    expected = scipy.stats.multivariate_normal(cov=dense).logpdf(x)
    assert_allclose(pm.logp(rv, x).eval(mode=PY), expected, rtol=1e-10)
    assert np.isfinite(pm.draw(rv, 10, random_seed=1, mode=PY)).all()


def test_float32():
    with pytensor.config.change_flags(floatX="float32"):
        covs = [cov.astype("float32") for cov in covariances(sizes=(2, 3))]
        rv = KroneckerMvNormal.dist(np.float32(0), covs, sigma=np.float32(0.5))
        x = np.arange(6, dtype="float32")
        logp = pm.logp(rv, x)
        assert rv.type.dtype == logp.type.dtype == "float32"
        dense = reduce(np.kron, covs) + 0.25 * np.eye(6)
        expected = scipy.stats.multivariate_normal(cov=dense).logpdf(x)
        assert_allclose(logp.eval(mode=PY), expected, rtol=1e-5)
