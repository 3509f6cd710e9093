"""Gradients in closed form against derivatives of the dense log-density, at any spectrum."""

from functools import reduce

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.graph.replace import vectorize_graph
from scipy.linalg import cho_factor, cho_solve

from pymc_kron import KroneckerMvNormal
from pymc_kron.distributions.arguments import read_noise
from pymc_kron.factors import Factor, factors_of
from pymc_kron.kron_sum_logp import KronSumLogp
from pymc_kron.kronecker_logp import KroneckerLogp
from tests.helpers import PY, compile_py, crossed, dense_kron, random_spd

SIZES = (3, 4)


def spectra():
    """Return pairs of covariances, by name."""
    rng = np.random.default_rng(41)
    A, B = (random_spd(rng, n) for n in SIZES)
    v = rng.normal(size=(3, 1))
    Q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    return {
        "well-conditioned": (A, B),
        "identity": (np.eye(3), B),
        "two identities": (np.eye(3), np.eye(4)),
        "compound symmetry": (0.4 + 0.6 * np.eye(3), 0.3 + 0.7 * np.eye(4)),
        "repeated eigenvalue": (A, (Q * [0.5, 2, 2, 2]) @ Q.T),
        "nearly repeated eigenvalue": (A, (Q * [0.5, 2, 2 + 1e-9, 2 - 1e-12]) @ Q.T),
        "rank one": (v @ v.T, B),
        "rank deficient twice": (v @ v.T, (Q * [0, 1, 2, 0]) @ Q.T),
        "condition 1e12": (A, (Q * [1, 1e-4, 1e-8, 1e-12]) @ Q.T),
        "condition 1e12 twice": (np.diag([1, 1e-6, 1e-12]), (Q * [1, 1e-4, 1e-8, 1e-12]) @ Q.T),
        "size one": (np.array([[1.7]]), B),
        "three factors": (A, B, random_spd(rng, 2)),
    }


SPECTRA = spectra()
WITHOUT_NOISE = [name for name in SPECTRA if "rank" not in name and "condition" not in name]


def dense_logp(covs, noise_cov, mu, x):
    M = reduce(np.kron, covs) + noise_cov
    chol = cho_factor(M, lower=True)
    delta = x - mu
    logdet = 2 * np.log(np.diag(chol[0])).sum()
    return -0.5 * (delta @ cho_solve(chol, delta) + logdet + len(x) * np.log(2 * np.pi))


def derivative(function, arrays, position, direction):
    """Return a directional derivative, by differences of the fourth order."""
    step = 1e-3

    def moved(t):
        return function(*(a + t * direction if i == position else a for i, a in enumerate(arrays)))

    near, far = (moved(t) - moved(-t) for t in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def directions(rng, array):
    """Yield directions that keep a matrix symmetric."""
    for _ in range(3):
        direction = rng.normal(size=array.shape)
        yield direction + direction.T if array.ndim == 2 else direction


def assert_directional(function, arrays, gradients):
    """Compare gradients with derivatives of the dense log-density in a few directions."""
    rng = np.random.default_rng(43)
    for i, gradient in enumerate(gradients):
        for direction in directions(rng, arrays[i]):
            expected = derivative(function, arrays, i, direction)
            assert_allclose((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SPECTRA)
def test_with_noise(name):
    covs = SPECTRA[name]
    N = np.prod([len(cov) for cov in covs])
    rng = np.random.default_rng(47)
    mu, x = rng.normal(size=(2, N))
    arrays = [*covs, np.array(0.8), mu, x]

    def dense(*arrays):
        *covs, sigma, mu, x = arrays
        return dense_logp(covs, sigma**2 * np.eye(N), mu, x)

    inputs = [pt.tensor(shape=array.shape) for array in arrays]
    *cov_vars, sigma, mu_var, x_var = inputs
    rv = KroneckerMvNormal.dist(mu_var, cov_vars, sigma=sigma)
    logp = pm.logp(rv, x_var)
    results = compile_py(inputs, [logp, *pt.grad(rewrite_pregrad(logp), inputs)])(*arrays)
    assert_allclose(results[0], dense(*arrays), rtol=1e-10)
    assert_directional(dense, arrays, results[1:])


@pytest.mark.parametrize("name", ["well-conditioned", "identity", "rank one", "three factors"])
def test_with_noise_of_covariances(name):
    covs = SPECTRA[name]
    rng = np.random.default_rng(53)
    noise_covs = [random_spd(rng, len(cov)) for cov in covs]
    # Generalised eigenvalues repeat where the signal is a multiple of the metric
    noise_covs[1] = 0.5 * covs[1]
    mu, x = rng.normal(size=(2, np.prod([len(cov) for cov in covs])))
    arrays = [*covs, *noise_covs, mu, x]

    def dense(*arrays):
        *matrices, mu, x = arrays
        signals, noise = matrices[: len(covs)], matrices[len(covs) :]
        return dense_logp(signals, reduce(np.kron, noise), mu, x)

    inputs = [pt.tensor(shape=array.shape) for array in arrays]
    *matrices, mu_var, x_var = inputs
    rv = KroneckerMvNormal.dist(mu_var, matrices[: len(covs)], noise_covs=matrices[len(covs) :])
    logp = pm.logp(rv, x_var)
    results = compile_py(inputs, [logp, *pt.grad(rewrite_pregrad(logp), inputs)])(*arrays)
    assert_allclose(results[0], dense(*arrays), rtol=1e-10)
    assert_directional(dense, arrays, results[1:])


@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_without_noise(name):
    covs = SPECTRA[name]
    mu, x = np.random.default_rng(47).normal(size=(2, np.prod([len(cov) for cov in covs])))
    arrays = [*covs, mu, x]

    def dense(*arrays):
        *covs, mu, x = arrays
        return dense_logp(covs, 0, mu, x)

    inputs = [pt.tensor(shape=array.shape) for array in arrays]
    *cov_vars, mu_var, x_var = inputs
    logp = pm.logp(KroneckerMvNormal.dist(mu_var, cov_vars), x_var)
    results = compile_py(inputs, [logp, *pt.grad(rewrite_pregrad(logp), inputs)])(*arrays)
    assert_allclose(results[0], dense(*arrays), rtol=1e-10)
    assert_directional(dense, arrays, results[1:])


def test_a_free_factor_beside_a_constant_one():
    A, B = SPECTRA["identity"]
    x = np.arange(12.0)
    B_var = pt.tensor(shape=B.shape)
    logp = pm.logp(KroneckerMvNormal.dist(0, [A, B_var], sigma=0.5), x)
    gradient = compile_py([B_var], pt.grad(rewrite_pregrad(logp), B_var))(B)
    assert_directional(
        lambda B: dense_logp([A, B], 0.25 * np.eye(12), np.zeros(12), x), [B], [gradient]
    )


# What PyMC's own distribution returns there


@pytest.mark.parametrize(
    ("name", "is_nan"), [("two identities", True), ("compound symmetry", False)]
)
@pytest.mark.filterwarnings("ignore:.*divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")
def test_beside_the_kronecker_normal_of_pymc(name, is_nan):
    arrays = SPECTRA[name]
    x = np.random.default_rng(59).normal(size=12)

    def dense(*covs):
        return dense_logp(covs, 0.25 * np.eye(12), np.zeros(12), x)

    def gradients_of(distribution):
        covs = [pt.tensor(shape=array.shape) for array in arrays]
        logp = pm.logp(distribution.dist(np.zeros(12), covs, sigma=0.5), x)
        return compile_py(covs, pt.grad(rewrite_pregrad(logp), covs))(*arrays)

    assert_directional(dense, arrays, gradients_of(KroneckerMvNormal))
    theirs = gradients_of(pm.KroneckerNormal)
    assert np.isnan(theirs[0]).any() == is_nan
    direction = np.diag([1.0, 0, -1])
    direction[0, 1] = direction[1, 0] = 0.5
    expected = derivative(dense, arrays, 0, direction)
    # NaN, or finite and wrong
    assert not abs((theirs[0] * direction).sum() - expected) < 1e-2


# Every form of a factor, in batches, and second derivatives

FORMS = [("cov",) * 3, ("chol",) * 3, ("tau",) * 3, ("evd",) * 3, ("tau", "evd", "chol")]
BATCHES = {
    "none": ((), (), ()),
    "stack of vectors": ((5,), (), ()),
    "factor": ((5,), (5,), ()),
    "factor with a shared vector": ((), (5,), ()),
    "crossed": ((7, 2, 5), (2, 1), (5,)),
}
PARTS = {
    "cov": lambda cov: [cov],
    "chol": lambda cov: [np.linalg.cholesky(cov)],
    "tau": lambda cov: [np.linalg.inv(cov)],
    "evd": lambda cov: list(np.linalg.eigh(cov)),
}


def parts_of(forms, batches, seed=61):
    rng = np.random.default_rng(seed)
    covs = [random_spd(rng, n, batch=batch) for n, batch in zip((2, 4, 3), batches, strict=True)]
    return [part for form, cov in zip(forms, covs, strict=True) for part in PARTS[form](cov)]


def graph_form(forms, delta, parts):
    """Return the log-density by a formula that is no operation, for PyTensor to differentiate."""
    K = reduce(
        lambda a, b: (a[..., :, None, :, None] * b[..., None, :, None, :]).reshape(
            (
                *pt.broadcast_shape(a[..., 0, 0], b[..., 0, 0]),
                a.shape[-2] * b.shape[-2],
                a.shape[-1] * b.shape[-1],
            )
        ),
        [factor.covariance() for factor in factors_of(forms, parts)],
    )
    chol = pt.linalg.cholesky(K)
    whitened = pt.linalg.solve_triangular(chol, delta, lower=True, b_ndim=1)
    logdet = 2.0 * pt.log(pt.diagonal(chol, axis1=-2, axis2=-1)).sum(axis=-1)
    return -0.5 * ((whitened**2).sum(axis=-1) + logdet + 24 * np.log(2 * np.pi))


NAMES = {"evd": ["eigenvalues", "eigenvectors"]}


def along_structure(form, part, gradient):
    """Return what of a gradient doesn't depend on conventions."""
    if form == "chol":
        return np.tril(gradient)
    if form in ("cov", "tau"):
        return gradient + np.swapaxes(gradient, -1, -2)
    if form == "eigenvectors":
        # Along rotations, dQ = Q S with skew-symmetric S
        rotated = np.swapaxes(part, -1, -2) @ gradient
        return rotated - np.swapaxes(rotated, -1, -2)
    return gradient


@pytest.mark.parametrize(
    ("forms", "batch"),
    crossed(FORMS, list(BATCHES)),
    ids=lambda value: "-".join(sorted(set(value))) if value in FORMS else value,
)
def test_forms_and_batches(forms, batch):
    x_batch, *factor_batches = BATCHES[batch]
    parts = parts_of(forms, [*factor_batches, ()])
    rng = np.random.default_rng(67)
    delta = rng.normal(size=(*x_batch, 24))
    inputs = [pt.tensor(shape=array.shape) for array in (delta, *parts)]
    logp, exists = KroneckerLogp(forms=forms)(*inputs)
    weights = rng.normal(size=np.broadcast_shapes(x_batch, *factor_batches))
    gradients = pt.grad((logp * weights).sum(), inputs)
    reference = graph_form(forms, inputs[0], inputs[1:])
    expected_gradients = pt.grad((reference * weights).sum(), inputs)
    *results, positive = compile_py(inputs, [logp, *gradients, exists])(delta, *parts)
    plain = compile_py(inputs, [reference, *expected_gradients], mode=PY.excluding("kron"))
    expected = plain(delta, *parts)
    assert positive.all()
    assert_allclose(results[0], expected[0], rtol=1e-10)
    names = ["delta", *(name for form in forms for name in NAMES.get(form, [form]))]
    for name, array, result, exact in zip(
        names, (delta, *parts), results[1:], expected[1:], strict=True
    ):
        assert_allclose(
            along_structure(name, array, result),
            along_structure(name, array, exact),
            rtol=1e-7,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("well-conditioned", False),
        ("well-conditioned", True),
        ("identity", True),
        ("compound symmetry", False),
        pytest.param("identity", False, marks=pytest.mark.nightly),
        pytest.param("compound symmetry", True, marks=pytest.mark.nightly),
    ],
)
def test_second_derivatives(name, noise):
    covs = SPECTRA[name]
    x = np.random.default_rng(71).normal(size=12)
    scales = pt.vector("scales", shape=(3,))
    values = np.array([1.1, 0.9, 0.6])
    bumps = [np.diag(np.arange(1.0, n + 1)) + 0.1 for n in SIZES]

    def moved(scales):
        return [
            cov + scales[i] * bump for i, (cov, bump) in enumerate(zip(covs, bumps, strict=True))
        ]

    sigma = {"sigma": scales[2]} if noise else {}
    logp = pm.logp(KroneckerMvNormal.dist(0, moved(scales), **sigma), x)
    gradient = pt.grad(rewrite_pregrad(logp), scales)
    hessian = pt.stack([pt.grad(gradient[i], scales) for i in range(2 + noise)])
    result = compile_py([scales], hessian)(values)

    def dense_gradient(scales):
        def dense(scales):
            noise_cov = scales[2] ** 2 * np.eye(12) if noise else 0
            return dense_logp(moved(scales), noise_cov, np.zeros(12), x)

        return np.array([derivative(dense, [scales], 0, e) for e in np.eye(3)])

    expected = np.stack([derivative(dense_gradient, [values], 0, e) for e in np.eye(3)])
    assert_allclose(result, expected[: 2 + noise], rtol=1e-5, atol=1e-6)


def test_vectorized_log_densities():
    # As for a batch of posterior draws
    rng = np.random.default_rng(73)
    A, B = random_spd(rng, 2, batch=(6,)), random_spd(rng, 3)
    x = rng.normal(size=(4, 6))
    A_var, x_var = pt.matrix("A", shape=(2, 2)), pt.matrix("x", shape=(4, 6))
    A_batch = pt.tensor(shape=(6, 2, 2))
    for sigma in (None, 0.5):
        logp = pm.logp(KroneckerMvNormal.dist(0, [A_var, B], sigma=sigma, size=4), x_var)
        batched = vectorize_graph(logp, {A_var: A_batch})
        result = compile_py([A_batch, x_var], batched)(A, x)
        noise_cov = 0.25 * np.eye(6) if sigma else 0
        expected = [[dense_logp([a, B], noise_cov, np.zeros(6), row) for row in x] for a in A]
        assert_allclose(result, expected, rtol=1e-10)


def test_the_operations_on_a_sum_agree_with_the_log_density():
    rng = np.random.default_rng(79)
    factors = [Factor("cov", (pt.as_tensor(random_spd(rng, n)),)) for n in SIZES]
    kron_sum = read_noise(factors, 0.5, None)
    x = rng.normal(size=12)
    logp, exists = KronSumLogp(layout=kron_sum.layout)(*kron_sum.inputs, x)
    dense = dense_kron(*(factor.parts[0].data for factor in factors))
    expected = dense_logp([dense], 0.25 * np.eye(12), np.zeros(12), x)
    assert_allclose(logp.eval(mode=PY), expected, rtol=1e-10)
    assert exists.eval(mode=PY)
