"""Whole models: posteriors and predictions of Kronecker and dense models of the same data."""

import arviz as az
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume

from pymc_kron import KroneckerMvNormal
from tests.helpers import PY, has_kron, largest_computed_size, symbolic_dense_kron

# One worker, for the sake of the one dense posterior that all compare with
pytestmark = pytest.mark.xdist_group("models")

LAGS = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float) for n in (4, 6)]
TRUE_LENGTH_SCALES = (1.5, 3.0)


def simulate():
    rng = np.random.default_rng(29)
    K = np.kron(
        *(np.exp(-lags / scale) for lags, scale in zip(LAGS, TRUE_LENGTH_SCALES, strict=True))
    )
    return rng.multivariate_normal(np.full(24, 0.5), K, size=3)


Y = simulate()


def build_model(kind):
    with pm.Model(coords={"replicate": range(3), "cell": range(24)}) as model:
        mu = pm.Normal("mu")
        length_scale = pm.LogNormal("length_scale", 0.5, 0.5, shape=2)
        covs = [pt.exp(-lags / length_scale[i]) for i, lags in enumerate(LAGS)]
        kwargs = {"observed": Y, "dims": ("replicate", "cell")}
        match kind:
            case "KroneckerMvNormal":
                KroneckerMvNormal("y", mu, covs, **kwargs)
            case "MvNormal of kron":
                pm.MvNormal("y", pt.full(24, mu), pt.linalg.kron(*covs), **kwargs)
            case "dense":
                pm.MvNormal("y", pt.full(24, mu), symbolic_dense_kron(*covs), **kwargs)
    return model


def sample(kind, nuts_sampler, *, seed, draws=1000):
    with build_model(kind):
        return pm.sample(
            draws,
            tune=500,
            chains=2,
            cores=1,
            random_seed=seed,
            progressbar=False,
            nuts_sampler=nuts_sampler,
            target_accept=0.9,
        )


@pytest.fixture(scope="module")
def dense_posterior():
    return sample("dense", "nutpie", seed=1)


def assert_posteriors_agree(idata, reference):
    """Compare means and standard deviations within their Monte Carlo errors."""
    for statistic, mcse in (("mean", "mcse_mean"), ("sd", "mcse_sd")):
        summaries = [
            az.summary(data, var_names=["mu", "length_scale"], round_to=None)
            for data in (idata, reference)
        ]
        values, errors = (
            np.array([summary[column].to_numpy(dtype=float) for summary in summaries])
            for column in (statistic, mcse)
        )
        z = (values[0] - values[1]) / np.sqrt((errors**2).sum(axis=0))
        assert np.abs(z).max() < 4, (statistic, z)


@pytest.mark.parametrize(
    ("kind", "nuts_sampler"),
    [
        pytest.param("KroneckerMvNormal", "pymc", marks=pytest.mark.nightly),
        pytest.param("KroneckerMvNormal", "nutpie", marks=pytest.mark.nightly),
        pytest.param("KroneckerMvNormal", "numpyro", marks=pytest.mark.nightly),
        ("MvNormal of kron", "nutpie"),
    ],
)
# JAX has one device here, and NumPyro says that two chains take turns
@pytest.mark.filterwarnings("ignore:There are not enough devices to run parallel chains")
def test_posterior(kind, nuts_sampler, dense_posterior):
    idata = sample(kind, nuts_sampler, seed=2)
    assert (
        (az.rhat(idata, var_names=["mu", "length_scale"]).to_dataset() < 1.02)
        .all()
        .to_array()
        .all()
    )
    assert_posteriors_agree(idata, dense_posterior)


def test_posterior_predictive(dense_posterior):
    draws = {}
    for kind in ("KroneckerMvNormal", "MvNormal of kron", "dense"):
        with build_model(kind):
            predictive = pm.sample_posterior_predictive(
                dense_posterior, random_seed=3, progressbar=False
            )
        y = predictive.posterior_predictive["y"]
        assert y.dims == ("chain", "draw", "replicate", "cell")
        draws[kind] = y.to_numpy().reshape((-1, 24))
    K_dense = np.cov(draws["dense"].T)
    n = len(draws["dense"]) / 3  # one draw of the parameters for three replicates
    scale = np.sqrt(K_dense.diagonal().max())
    variances = np.outer(K_dense.diagonal(), K_dense.diagonal())
    for kind in ("KroneckerMvNormal", "MvNormal of kron"):
        difference = draws[kind].mean(axis=0) - draws["dense"].mean(axis=0)
        assert_allclose(difference, 0, atol=4.5 * scale * np.sqrt(2 / n))
        errors = (np.cov(draws[kind].T) - K_dense) / np.sqrt(2 * (K_dense**2 + variances) / n)
        assert np.abs(errors).max() < 4.5


@pytest.mark.parametrize("kind", ["KroneckerMvNormal", "MvNormal of kron"])
def test_prior_predictive_and_a_latent_field(kind):
    with build_model(kind):
        prior = pm.sample_prior_predictive(20, random_seed=4)
    assert prior.prior_predictive["y"].shape == (1, 20, 3, 24)
    assert np.isfinite(prior.prior_predictive["y"]).all()


@pytest.mark.filterwarnings("ignore::pymc.exceptions.ImputationWarning")
def test_missing_cells_are_imputed_while_sampling():
    y = Y[0].copy()
    missing = [3, 10, 17]
    y[missing] = np.nan
    K = np.kron(np.exp(-LAGS[0] / 1.5), np.exp(-LAGS[1] / 3.0))
    with pm.Model():
        KroneckerMvNormal("y", 0.5, [np.exp(-LAGS[0] / 1.5), np.exp(-LAGS[1] / 3.0)], observed=y)
        idata = pm.sample(
            1500, tune=500, chains=2, cores=1, random_seed=5, progressbar=False, target_accept=0.9
        )
    observed = np.setdiff1d(np.arange(24), missing)
    weights = np.linalg.solve(K[np.ix_(observed, observed)], K[np.ix_(observed, missing)]).T
    mean = 0.5 + weights @ (y[observed] - 0.5)
    variance = (K[np.ix_(missing, missing)] - weights @ K[np.ix_(observed, missing)]).diagonal()
    summary = az.summary(idata, var_names=["y_unobserved"], round_to=None)
    z_mean = (summary["mean"].astype(float) - mean) / summary["mcse_mean"].astype(float)
    z_sd = (summary["sd"].astype(float) - np.sqrt(variance)) / summary["mcse_sd"].astype(float)
    assert np.abs(z_mean).max() < 4
    assert np.abs(z_sd).max() < 4


# Covariances that are a product with something added, or that another distribution takes

N_CELLS = 24
GRID = np.random.default_rng(31).normal(size=(3, N_CELLS))


def factors_and_scales():
    length_scale = pm.HalfNormal("length_scale", shape=2, initval=[1.1, 1.7])
    noise = pm.HalfNormal("noise", initval=0.6)
    variance = pm.HalfNormal("variance", initval=0.8)
    A = pt.exp(-LAGS[0] / length_scale[0])
    B = pt.exp(-((LAGS[1] / length_scale[1]) ** 2))
    return A, B, noise, variance


def with_noise(kron, A, B, s, v):
    return v * kron(A, B) + s**2 * pt.eye(N_CELLS)


def stabilized(kron, A, B, s, v):
    # PyMC's jitter is too little for two ways of computing one number to agree to ten digits
    return pm.gp.util.stabilize(v * kron(A, B), 1e-2)


def stabilized_with_noise(kron, A, B, s, v):
    return pm.gp.util.stabilize(kron(A, B) + s**2 * pt.eye(N_CELLS))


def with_product_noise(kron, A, B, s, v):
    C = assume(pt.eye(4) * s + 0.1, positive_definite=True)
    D = assume(pt.exp(-LAGS[1] / s), positive_definite=True)
    return v * kron(A, B) + kron(C, D)


def kronecker_sum(kron, A, B, s, v):
    return kron(A, np.eye(6)) + kron(np.eye(4), v * B) + s * pt.eye(N_CELLS)


def one_factor(kron, A, B, s, v):
    return v * kron(A, np.eye(6)) + s * np.eye(N_CELLS)


def plain_product(kron, A, B, s, v):
    return v * kron(A, B + 0.1 * np.eye(6))


def mvnormal(cov, **kwargs):
    return pm.MvNormal, {"mu": np.full(N_CELLS, 0.3), "cov": cov, **kwargs}, GRID


def mvstudentt(cov):
    return pm.MvStudentT, {"nu": 30, "mu": np.full(N_CELLS, 0.3), "scale": cov}, GRID


def matrixnormal_rows(cov):
    column_cov = np.eye(3) + 0.1
    return pm.MatrixNormal, {"mu": 0.3, "rowcov": cov, "colcov": column_cov}, GRID.T


def matrixnormal_columns(cov):
    row_cov = np.eye(3) + 0.1
    return pm.MatrixNormal, {"mu": 0.3, "rowcov": row_cov, "colcov": cov}, GRID


CASES = {
    "MvNormal with noise": (mvnormal, with_noise),
    "MvNormal stabilized": (mvnormal, stabilized),
    "MvNormal stabilized with noise": (mvnormal, stabilized_with_noise),
    "MvNormal with noise of a product": (mvnormal, with_product_noise),
    "MvNormal of a Kronecker sum": (mvnormal, kronecker_sum),
    "MvNormal of one factor with noise": (mvnormal, one_factor),
    "MvStudentT": (mvstudentt, plain_product),
    "MvStudentT with noise": (mvstudentt, with_noise),
    "MatrixNormal, rows": (matrixnormal_rows, plain_product),
    "MatrixNormal, columns": (matrixnormal_columns, plain_product),
}


def build_case(name, kron):
    define, covariance = CASES[name]
    with pm.Model() as model:
        distribution, kwargs, observed = define(covariance(kron, *factors_and_scales()))
        if distribution is pm.MatrixNormal:
            kwargs["mu"] = np.full(observed.shape, kwargs["mu"])
        distribution("y", **kwargs, observed=observed)
    return model


def potential_of_a_solve(M):
    form = GRID[0] @ pt.linalg.solve(M, GRID[0], assume_a="pos")
    return -0.5 * form - 0.5 * pt.linalg.slogdet(M)[1]


def potential_of_a_cholesky_factor(M):
    L = pt.linalg.cholesky(M)
    whitened = pt.linalg.solve_triangular(L, GRID[0], lower=True)
    return -0.5 * whitened @ whitened - pt.log(pt.diag(L)).sum()


POTENTIALS = {
    "solve and slogdet": potential_of_a_solve,
    "Cholesky factor": potential_of_a_cholesky_factor,
}


def build_potential(name, kron):
    with pm.Model() as model:
        pm.Potential("p", POTENTIALS[name](with_noise(kron, *factors_and_scales())))
    return model


def points(model):
    rng = np.random.default_rng(7)
    initial = model.initial_point()
    for scale in (0.1, 0.4):
        yield {
            name: np.asarray(value) + scale * rng.normal(size=np.shape(value))
            for name, value in initial.items()
        }


# PyMC's MatrixNormal
@pytest.mark.filterwarnings("ignore:pytensor.tensor.linalg.trace is deprecated")
@pytest.mark.parametrize(
    ("build", "name"),
    [(build_case, name) for name in CASES] + [(build_potential, name) for name in POTENTIALS],
)
def test_logp_and_gradient(build, name):
    model, dense_model = build(name, pt.linalg.kron), build(name, symbolic_dense_kron)
    outputs = [model.logp(), model.dlogp()]
    function = model.compile_fn(outputs, mode=PY)
    assert not has_kron(function.f.maker.fgraph)
    dense = dense_model.compile_fn([dense_model.logp(), dense_model.dlogp()], mode=PY)
    for point in points(model):
        for result, expected in zip(function(point), dense(point), strict=True):
            assert_allclose(result, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    values = [point[value.name] for value in model.value_vars]
    assert largest_computed_size(model.value_vars, outputs, values, mode=PY) < N_CELLS**2


@pytest.mark.parametrize("name", CASES)
def test_draws(name):
    n = 20_000
    define, covariance = CASES[name]
    parameters = [
        np.exp(-LAGS[0] / 1.2),
        np.exp(-((LAGS[1] / 1.5) ** 2)),
        np.array(0.7),
        np.array(0.9),
    ]
    variables = [pt.tensor(shape=parameter.shape) for parameter in parameters]
    cov = covariance(pt.linalg.kron, *variables)
    distribution, kwargs, observed = define(cov)
    if distribution is pm.MatrixNormal:
        kwargs["mu"] = np.full(observed.shape, kwargs["mu"])
    y = distribution.dist(**kwargs, size=n)
    function = pm.compile(variables, y, mode=PY, random_seed=1, on_unused_input="ignore")
    assert not has_kron(function.maker.fgraph)
    draws = function(*parameters)
    largest = largest_computed_size(variables, [y], parameters, mode=PY)
    assert largest == draws.size

    K = covariance(symbolic_dense_kron, *map(pt.as_tensor, parameters)).eval(mode=PY)
    excess = 0
    if define is mvstudentt:
        K, excess = 30 / 28 * K, 2 / 26
    elif define is matrixnormal_rows:
        K = np.kron(K, kwargs["colcov"])
    elif define is matrixnormal_columns:
        K = np.kron(kwargs["rowcov"], K)
    draws = draws.reshape((n, -1))
    variances = np.outer(K.diagonal(), K.diagonal())
    errors = np.sqrt(((1 + 2 * excess) * K**2 + (1 + excess) * variances) / n)
    assert np.abs((np.cov(draws.T) - K) / errors).max() < 4.8
    assert_allclose(draws.mean(axis=0), 0.3, atol=4.8 * np.sqrt(K.diagonal().max() / n))


@pytest.mark.parametrize(
    "name",
    [
        "MvNormal with noise",
        "MvNormal with noise of a product",
        "MvStudentT with noise",
        "MatrixNormal, rows",
    ],
)
def test_predictive_draws(name):
    model = build_case(name, pt.linalg.kron)
    kwargs = {"random_seed": 4, "compile_kwargs": {"mode": PY}}
    with model:
        prior = pm.sample_prior_predictive(20, **kwargs)
        posterior = pm.sample_posterior_predictive(
            prior.prior.to_dataset(), progressbar=False, **kwargs
        )
    shape = GRID.T.shape if "MatrixNormal" in name else GRID.shape
    for group in (prior.prior_predictive, posterior.posterior_predictive):
        assert group["y"].shape == (1, 20, *shape)
        assert np.isfinite(group["y"]).all()


@pytest.mark.nightly
def test_sampling_with_noise():
    with build_case("MvNormal with noise", pt.linalg.kron):
        idata = pm.sample(
            100, tune=200, chains=1, cores=1, random_seed=5, progressbar=False, nuts_sampler="pymc"
        )
    for name in ("length_scale", "noise", "variance"):
        draws = idata.posterior[name]
        assert np.isfinite(draws).all()
        assert draws.std() > 0
    assert idata.sample_stats["diverging"].sum() < 10


def test_logp_and_gradient_on_jax():
    model, dense_model = (
        build_case("MvNormal with noise", kron) for kron in (pt.linalg.kron, symbolic_dense_kron)
    )
    function = model.compile_fn([model.logp(), model.dlogp()], mode="JAX")
    dense = dense_model.compile_fn([dense_model.logp(), dense_model.dlogp()], mode=PY)
    for point in points(model):
        for result, expected in zip(function(point), dense(point), strict=True):
            assert_allclose(result, expected, rtol=1e-8)
