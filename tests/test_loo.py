import re

import arviz as az
import numpy as np
import pymc as pm
import pymc.dims as pmd
import pytensor.tensor as pt
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from xarray import DataArray

import pymc_kron.dims as pkd
from pymc_kron import KroneckerMvNormal, TensorNormal, loo_pointwise
from pymc_kron.covariances import KroneckerCovariance, KronSumCovariance
from pymc_kron.distributions.arguments import read_factors, read_noise
from pymc_kron.loo import leave_one_out
from tests.helpers import PY, dense_kron, largest_computed_size, random_spd

OPTIONS = {"progressbar": False, "compile_kwargs": {"mode": PY}}
RNG = np.random.default_rng(3)
SIZES = (2, 3, 4)
A, B, C = (random_spd(RNG, n) for n in SIZES)
D = random_spd(RNG, 3)
K = dense_kron(A, B, C)
X = RNG.normal(size=SIZES)
SIGMAS = np.array([[0.5, 0.8, 1.2], [0.4, 1.0, 2.0]])


def brute_force(x, mu, cov):
    """Return the log-density of each entry given all others, from its conditional distribution."""
    densities = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        weights = np.linalg.solve(cov[np.ix_(rest, rest)], cov[rest, i])
        mean = mu[i] + weights @ (x - mu)[rest]
        variance = cov[i, i] - weights @ cov[rest, i]
        densities.append(scipy.stats.norm(mean, variance**0.5).logpdf(x[i]))
    return np.array(densities)


def points(**values):
    """Return arrays with dimensions of chains and draws as a posterior."""
    return az.from_dict({"posterior": {name: np.asarray(value) for name, value in values.items()}})


COVARIANCES = {
    "covs": ({"covs": [A, B, C]}, K),
    "chols": ({"chols": [np.linalg.cholesky(M) for M in (A, B, C)]}, K),
    "taus": ({"taus": [np.linalg.inv(M) for M in (A, B, C)]}, K),
    "evds": ({"evds": [tuple(np.linalg.eigh(M)) for M in (A, B, C)]}, K),
    "one factor": ({"covs": [K]}, K),
    "sigma": ({"covs": [A, B, C], "sigma": 0.7}, K + 0.49 * np.eye(24)),
    "noise_covs": (
        {"covs": [A, B, C], "noise_covs": [np.array([0.5, 2.0]), D, None]},
        K + dense_kron(np.diag([0.5, 2.0]), D, np.eye(4)),
    ),
}


@pytest.mark.parametrize("name", COVARIANCES)
def test_against_brute_force(name):
    arguments, dense = COVARIANCES[name]
    with pm.Model() as model:
        level = pm.Normal("level", shape=24)
        KroneckerMvNormal("y", level, **arguments, observed=X.ravel())
    levels = RNG.normal(size=(2, 3, 24))
    loo = loo_pointwise(points(level=levels), model, extend_inferencedata=False, **OPTIONS)
    assert loo["y"].sizes == {"chain": 2, "draw": 3, "y_dim_0": 24}
    for chain, draw in np.ndindex(2, 3):
        expected = brute_force(X.ravel(), levels[chain, draw], dense)
        assert_allclose(loo["y"][chain, draw], expected, rtol=1e-9)


# One likelihood as each of the variables that may stand for it

COORDS = {"station": ["Malin Head", "Dublin", "Valentia"], "day": range(4)}
GRID = X[0]
LEVELS = RNG.normal(size=(2, 3, 3))


def tensor_normal(level, sigma):
    TensorNormal("y", level[:, None], [B, C], sigma=sigma, dims=("station", "day"), observed=GRID)


def kronecker_mvnormal(level, sigma):
    KroneckerMvNormal("y", pt.repeat(level, 4), [B, C], sigma=sigma, observed=GRID.ravel())


def plain_mvnormal(level, sigma):
    cov = pt.linalg.kron(B, C) + sigma**2 * pt.eye(12)
    pm.MvNormal("y", pt.repeat(level, 4), cov=cov, observed=GRID.ravel())


def named_dims(dims):
    def build(level, sigma):
        pkd.KroneckerMvNormal(
            "y",
            pmd.as_xtensor(level, dims=("station",)),
            [DataArray(B, dims=("station", "station_")), DataArray(C, dims=("day", "day_"))],
            sigma=pmd.as_xtensor(sigma, dims=()),
            core_dims=[("station", "station_"), ("day", "day_")],
            dims=dims,
            observed=DataArray(GRID, dims=("station", "day")),
        )

    return build


VARIABLES = {
    "TensorNormal": (tensor_normal, ("station", "day")),
    "KroneckerMvNormal": (kronecker_mvnormal, None),
    "MvNormal": (plain_mvnormal, None),
    "dims": (named_dims(("station", "day")), ("station", "day")),
    "transposed dims": (named_dims(("day", "station")), ("day", "station")),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_one_likelihood_of_each_kind(name):
    build, dims = VARIABLES[name]
    with pm.Model(coords=COORDS) as model:
        level = pm.Normal("level", dims="station")
        sigma = pm.HalfNormal("sigma")
        build(level, sigma)
    idata = points(level=LEVELS, sigma=SIGMAS)
    assert loo_pointwise(idata, model, **OPTIONS) is idata
    loo = idata["log_likelihood"]["y"]
    if dims is not None:
        assert loo.dims == ("chain", "draw", *dims)
        assert list(loo.coords["station"].values) == COORDS["station"]
        loo = loo.transpose("chain", "draw", "station", "day")
    for chain, draw in np.ndindex(2, 3):
        mu = np.repeat(LEVELS[chain, draw], 4)
        cov = dense_kron(B, C) + SIGMAS[chain, draw] ** 2 * np.eye(12)
        expected = brute_force(GRID.ravel(), mu, cov)
        assert_allclose(loo[chain, draw].values.ravel(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["dims", "TensorNormal"])
def test_batches(name):
    stack = random_spd(RNG, 3, batch=(5,))
    y = RNG.normal(size=(5, 3, 4))
    with pm.Model(coords=COORDS | {"year": range(5)}) as model:
        sigma = pm.HalfNormal("sigma")
        if name == "dims":
            pkd.KroneckerMvNormal(
                "y",
                covs=[
                    DataArray(stack, dims=("year", "station", "station_")),
                    DataArray(C, dims=("day", "day_")),
                ],
                sigma=pmd.as_xtensor(sigma, dims=()),
                core_dims=[("station", "station_"), ("day", "day_")],
                dims=("station", "year", "day"),
                observed=DataArray(y, dims=("year", "station", "day")),
            )
        else:
            TensorNormal(
                "y", 0, [stack, C], sigma=sigma, dims=("year", "station", "day"), observed=y
            )
    loo = loo_pointwise(points(sigma=SIGMAS), model, extend_inferencedata=False, **OPTIONS)
    grids = loo["y"].transpose("chain", "draw", "year", "station", "day").values
    for year in range(5):
        cov = dense_kron(stack[year], C) + SIGMAS[1, 2] ** 2 * np.eye(12)
        expected = brute_force(y[year].ravel(), np.zeros(12), cov)
        assert_allclose(grids[1, 2, year].ravel(), expected, rtol=1e-9)


def build_pair():
    """Return a model of two Kronecker likelihoods, of which one has a latent field, and another."""
    with pm.Model() as model:
        sigma = pm.HalfNormal("sigma")
        field = KroneckerMvNormal("field", 0, [B, C])
        KroneckerMvNormal("y", field, [B, C], sigma=sigma, observed=GRID.ravel())
        TensorNormal("z", 0, [A, B], sigma=sigma, observed=X[:, :, 1])
        pm.Normal("w", field, sigma, observed=GRID.ravel())
    return model


def test_several_likelihoods():
    model = build_pair()
    field = RNG.normal(size=(2, 3, 12))
    idata = points(sigma=SIGMAS, field=field)
    pm.compute_log_likelihood(idata, var_names=["w", "y"], model=model, **OPTIONS)
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw")
    other = idata["log_likelihood"]["w"].copy()
    loo_pointwise(idata, model, **OPTIONS)
    assert set(idata["log_likelihood"].data_vars) == {"w", "y", "z"}
    assert idata["log_likelihood"]["w"].identical(other)
    expected = brute_force(
        GRID.ravel(), field[1, 2], dense_kron(B, C) + SIGMAS[1, 2] ** 2 * np.eye(12)
    )
    assert_allclose(idata["log_likelihood"]["y"][1, 2], expected, rtol=1e-9)
    # Without the parameters of likelihoods that aren't asked for
    with model:
        [name] = loo_pointwise(
            points(sigma=SIGMAS), var_names=["z"], extend_inferencedata=False, **OPTIONS
        )
    assert name == "z"


Y = RNG.multivariate_normal(np.full(12, 0.5), dense_kron(B, C))


@pytest.fixture(scope="module")
def posteriors():
    """Return posteriors of the level of a grid, with its covariance and with another one."""
    idatas = {}
    for name, covs in {"true": [B, C], "independent": [np.eye(3), 2 * np.eye(4)]}.items():
        with pm.Model(coords=COORDS):
            level = pm.Normal("level", 0, 0.3)
            TensorNormal("y", level, covs, dims=("station", "day"), observed=Y.reshape(3, 4))
            # The posterior is normal
            solved = np.linalg.solve(dense_kron(*covs), np.stack([Y, np.ones(12)]).T)
            precision = 0.3**-2 + solved[:, 1].sum()
            levels = RNG.normal(solved[:, 0].sum() / precision, precision**-0.5, size=(2, 100))
            idatas[name] = points(level=levels)
            loo_pointwise(idatas[name], progressbar=False, compile_kwargs={"mode": PY})
    return idatas


def test_arviz_leaves_one_cell_out(posteriors):
    loo = az.loo(posteriors["true"], var_name="y", pointwise=True)
    assert loo.n_data_points == 12
    assert loo.pareto_k.dims == ("station", "day")

    # The posterior without a cell, by quadrature over the level
    levels, cov = np.linspace(-2, 2, 81), dense_kron(B, C)
    log_cells = np.array([brute_force(Y, np.full(12, level), cov) for level in levels])
    log_all = scipy.stats.multivariate_normal(np.zeros(12), cov).logpdf(Y - levels[:, None])
    prior = scipy.stats.norm(0, 0.3).logpdf(levels)
    without = np.exp((prior + log_all)[:, None] - log_cells)
    expected = np.log((without * np.exp(log_cells)).sum(axis=0) / without.sum(axis=0))
    log_sd = log_cells[np.abs(levels) < 1].std(axis=0).max()
    assert_allclose(loo.elpd_i.values.ravel(), expected, atol=4 * log_sd / 200**0.5)


def test_arviz_compares_models(posteriors):
    table = az.compare(posteriors, var_name="y", round_to="none")
    assert list(table.index) == ["true", "independent"]
    for name, idata in posteriors.items():
        assert_allclose(table["elpd"][name], az.loo(idata, var_name="y").elpd)


def test_progress_bar(capsys):
    with pm.Model() as model:
        sigma = pm.HalfNormal("sigma")
        KroneckerMvNormal("y", 0, [B, C], sigma=sigma, observed=GRID.ravel())
    for progressbar in (False, True):
        options = OPTIONS | {"progressbar": progressbar}
        loo_pointwise(points(sigma=SIGMAS), model, **options)
        assert bool(capsys.readouterr().out) == progressbar


@pytest.mark.parametrize("noise", [{}, {"sigma": 0.5}])
def test_no_array_with_n_x_n_entries(noise):
    covs = [pt.tensor(f"K{i}", shape=(n, n)) for i, n in enumerate((6, 9, 10))]
    arrays = [random_spd(RNG, n) for n in (6, 9, 10)]
    factors = read_factors(covs, None, None, None, lower=True)
    kron_sum = read_noise(factors, noise.get("sigma"), None)
    covariance = KroneckerCovariance(factors) if not noise else KronSumCovariance(kron_sum)
    densities = leave_one_out(covariance, pt.as_tensor(RNG.normal(size=540)))
    assert largest_computed_size(covs, [densities], arrays) == 540


def test_errors():
    model = build_pair()
    idata = points(sigma=SIGMAS, field=RNG.normal(size=(2, 3, 12)))
    for var_names, message in (
        (["w"], "got var_names w (Normal). pm.compute_log_likelihood is for other likelihoods"),
        (["y", "w"], "got var_names w (Normal)"),
        (["field"], "which are ['y', 'z', 'w'], got ['field']"),
        (["nothing"], "which are ['y', 'z', 'w'], got ['nothing']"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            loo_pointwise(idata, model, var_names=var_names, **OPTIONS)


def test_errors_without_a_kronecker_likelihood():
    with pm.Model() as empty:
        sigma = pm.HalfNormal("sigma")
    with pytest.raises(ValueError, match="got observed variables none"):
        loo_pointwise(points(sigma=SIGMAS), empty, **OPTIONS)
    with empty:
        pm.Normal("w", 0, sigma, observed=1.0)
        pm.MvNormal("v", np.zeros(2), cov=sigma * A, observed=X[:, 0, 0])
    message = "got observed variables w (Normal), v (MultivariateNormal)"
    with pytest.raises(ValueError, match=re.escape(message)):
        loo_pointwise(points(sigma=SIGMAS), empty, **OPTIONS)


def test_errors_about_missing_cells():
    y = GRID.ravel().copy()
    y[3] = np.nan
    with pm.Model() as model:
        sigma = pm.HalfNormal("sigma")
        with pytest.warns(pm.exceptions.ImputationWarning):
            KroneckerMvNormal("y", 0, [B, C], sigma=sigma, observed=y)
        KroneckerMvNormal("z", 0, [B, C], sigma=sigma, observed=GRID.ravel())
    idata = points(sigma=SIGMAS)
    with pytest.raises(ValueError, match="y_observed has missing cells, which PyMC imputes"):
        loo_pointwise(idata, model, **OPTIONS)
    loo_pointwise(idata, model, var_names=["z"], **OPTIONS)
    assert list(idata["log_likelihood"].data_vars) == ["z"]
