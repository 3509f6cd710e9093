"""Missing cells: imputed as PyMC does, or integrated out."""

import re
import warnings
from contextlib import contextmanager
from functools import cache

import numpy as np
import pandas as pd
import pymc as pm
import pymc.dims as pmd
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.distributions.shape_utils import change_dist_size
from pymc.exceptions import ImputationWarning
from pymc.logprob.utils import ParameterValueError
from pymc.pytensorf import rewrite_pregrad
from pytensor.graph.replace import vectorize_graph
from scipy.stats import multivariate_normal
from xarray import DataArray

import pymc_kron as pk
import pymc_kron.dims as pkd
from tests.helpers import (
    PY,
    WITHOUT_KRON,
    crossed,
    dense_kron,
    largest_computed_size,
    random_spd,
    symbolic_dense_kron,
)

RNG = np.random.default_rng(11)
SIZES = (3, 4)
N = 12
COORDS = {"station": ["Malin Head", "Dublin", "Valentia"], "day": range(4)}
DIMS = ("station", "day")
A, B = random_spd(RNG, 3), random_spd(RNG, 4)
D = random_spd(RNG, 4)
Y = RNG.normal(size=SIZES)


def pattern(*cells, shape=SIZES):
    missing = np.zeros(shape, dtype=bool)
    for cell in cells:
        missing[cell] = True
    return missing


PATTERNS = {
    "single cells": pattern((0, 1), (2, 3), (2, 1)),
    "a whole row": pattern(1),
    "a whole column": pattern((slice(None), 2)),
    "more than half": pattern(0, 2, (1, 1)),
    "scattered and more than half": ~pattern((0, 0), (1, 1), (2, 2), (0, 3), (2, 0)),
    "all but one": ~pattern((1, 2)),
    "a row and a cell": pattern(1, (0, 2)),
}
NOISES = ("none", "sigma", "noise_covs")
FORMS = {
    "covs": lambda K: K,
    "chols": pt.linalg.cholesky,
    "taus": pt.linalg.inv,
    "evds": lambda K: tuple(pt.linalg.eigh(K)),
}


def with_holes(missing, y=Y):
    return np.where(missing, np.nan, y)


def parameters(noise):
    """Create the parameters of a model: the mean, the factors and the noise."""
    level = pm.Normal("level", shape=3)
    amplitude = pm.HalfNormal("amplitude")
    length_scale = pm.LogNormal("length_scale")
    lag = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    factors = [amplitude**2 * A, pm.math.exp(-lag / length_scale)]
    if noise == "sigma":
        return level, factors, {"sigma": pm.HalfNormal("sigma")}
    if noise == "noise_covs":
        return level, factors, {"noise_covs": [pm.HalfNormal("nugget", shape=3), D]}
    return level, factors, {}


def dense_covariance(factors, noise):
    K = symbolic_dense_kron(*factors)
    if "sigma" in noise:
        return K + noise["sigma"] ** 2 * np.eye(N)
    if "noise_covs" in noise:
        nugget, D = noise["noise_covs"]
        return K + symbolic_dense_kron(pt.diag(nugget), D)
    return K


@cache
def dense_function(noise):
    """Compile the model of some cells alone, with a dense covariance: value and gradient."""
    with pm.Model() as model:
        level, factors, noise_arguments = parameters(noise)
        cells = pm.Data("cells", np.arange(N))
        data = pm.Data("data", Y.ravel())
        K = dense_covariance(factors, noise_arguments)
        pm.MvNormal("y", pt.repeat(level, 4)[cells], K[cells][:, cells], observed=data[cells])
    return model, value_and_gradient(model, WITHOUT_KRON)


def dense(noise, missing, point, y=Y):
    """Return the log-density of the observed cells of a model, and its gradient."""
    model, function = dense_function(noise)
    model.set_data("cells", np.flatnonzero(~missing))
    model.set_data("data", y.ravel())
    return function(point)


def value_and_gradient(model, mode):
    return model.compile_fn([model.logp(), model.dlogp()], mode=mode)


def marginal_model(noise, missing, form="covs", y=Y, *, grid=True):
    data = with_holes(missing, y)
    with pm.Model(coords=COORDS) as model:
        level, factors, noise_arguments = parameters(noise)
        arguments = {form: list(map(FORMS[form], factors)), **noise_arguments}
        if grid:
            options = {"mu": level[:, None], "observed": data, "dims": DIMS}
            pk.TensorNormal("y", **arguments, **options, marginalize_missing=True)
        else:
            options = {"mu": pt.repeat(level, 4), "observed": data.ravel()}
            pk.KroneckerMvNormal("y", **arguments, **options, marginalize_missing=True)
    return model


@contextmanager
def imputing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImputationWarning)
        yield


def point_of(model, seed=3):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=np.shape(value)) / 2 for name, value in model.initial_point().items()
    }


@pytest.mark.parametrize(("name", "noise"), crossed(list(PATTERNS), NOISES))
def test_log_density_and_gradient_are_those_of_the_observed_cells(name, noise):
    missing = PATTERNS[name]
    model = marginal_model(noise, missing)
    point = point_of(model)
    logp, gradient = value_and_gradient(model, PY)(point)
    expected_logp, expected_gradient = dense(noise, missing, point)
    assert_allclose(logp, expected_logp, rtol=1e-10)
    assert_allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("noise", "names"),
    [
        ("none", ["a row and a cell", "scattered and more than half"]),
        ("sigma", ["a row and a cell"]),
    ],
    ids=["none", "sigma"],
)
@pytest.mark.parametrize("form", ["chols", "taus", "evds"])
def test_forms_of_factors(form, noise, names):
    for name in names:
        missing = PATTERNS[name]
        model = marginal_model(noise, missing, form, grid=False)
        point = point_of(model)
        logp, gradient = value_and_gradient(model, PY)(point)
        expected_logp, expected_gradient = dense(noise, missing, point)
        assert_allclose(logp, expected_logp, rtol=1e-10)
        assert_allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-8)


@pytest.mark.nightly
def test_second_derivatives():
    with pm.Model() as model:
        amplitude, sigma = pm.HalfNormal("amplitude"), pm.HalfNormal("sigma")
        data = with_holes(PATTERNS["single cells"])
        factors = [amplitude**2 * A, B]
        pk.TensorNormal("y", 0, factors, sigma=sigma, observed=data, marginalize_missing=True)
    dlogp = model.compile_dlogp(mode=PY)

    def gradient(x):
        return dlogp({"amplitude_log__": x[0], "sigma_log__": x[1]})

    start = np.array([0.3, -0.5])
    hessian = model.compile_d2logp(mode=PY, negate_output=False)(
        {"amplitude_log__": start[0], "sigma_log__": start[1]}
    )
    rows = [(gradient(start + step) - gradient(start - step)) / 2e-6 for step in 1e-6 * np.eye(2)]
    assert_allclose(hessian, rows, rtol=1e-6, atol=1e-7)


def observed_logp(x, mu, cov, missing):
    """Return the log-density of the observed cells of each vector of a batch."""
    observed = np.flatnonzero(~missing.ravel())
    batch = np.broadcast_shapes(x.shape[:-1], mu.shape[:-1], cov.shape[:-2])
    x, mu = (np.broadcast_to(array, (*batch, N))[..., observed] for array in (x, mu))
    cov = np.broadcast_to(cov, (*batch, N, N))[..., observed[:, None], observed]
    return np.array(
        [multivariate_normal.logpdf(x[i], mu[i], cov[i]) for i in np.ndindex(*batch)]
    ).reshape(batch)


@pytest.mark.parametrize("noise", [None, 0.5])
@pytest.mark.parametrize("missing", [PATTERNS["single cells"], PATTERNS["a row and a cell"]])
@pytest.mark.parametrize(
    ("factor_batch", "mu_batch", "value_batch"),
    [((), (), (5,)), ((), (2,), (5, 2)), ((2,), (), ()), ((2,), (3, 1), (4, 3, 2))],
)
def test_batches(factor_batch, mu_batch, value_batch, missing, noise):
    rng = np.random.default_rng(5)
    A = random_spd(rng, 3, batch=factor_batch)
    mu, x = rng.normal(size=(*mu_batch, N)), rng.normal(size=(*value_batch, N))
    cov = dense_kron(A, B) + (0 if noise is None else noise**2) * np.eye(N)
    rv = pk.KroneckerMvNormal.dist(mu, [A, B], sigma=noise, marginalize_missing=True)
    logp = pm.logp(rv, np.where(missing.ravel(), np.nan, x)).eval(mode=PY)
    assert_allclose(logp, observed_logp(x, mu, cov, missing), rtol=1e-10)


@pytest.mark.parametrize("noise", [None, 0.5])
def test_values_that_are_not_known_before(noise):
    """Which cells are missing is then seen when the program runs."""
    rv = pk.TensorNormal.dist(covs=[A, B], sigma=noise, marginalize_missing=True)
    value = pt.matrix("value", shape=SIZES)
    logp = pytensor.function([value], pm.logp(rv, value), mode=PY)
    cov = dense_kron(A, B) + (0 if noise is None else noise**2) * np.eye(N)
    for missing in (*PATTERNS.values(), np.zeros(SIZES, dtype=bool)):
        expected = observed_logp(Y.ravel(), np.zeros(N), cov, missing)
        assert_allclose(logp(with_holes(missing)), expected, rtol=1e-9)


def test_shared_data_may_have_other_holes_later():
    data = pytensor.shared(with_holes(PATTERNS["all but one"]))
    with pm.Model() as model:
        pk.TensorNormal("y", covs=[A, B], observed=data, marginalize_missing=True)
    logp = model.compile_logp(mode=PY)
    for missing in (PATTERNS["all but one"], PATTERNS["a whole row"]):
        data.set_value(with_holes(missing))
        expected = observed_logp(Y.ravel(), np.zeros(N), dense_kron(A, B), missing)
        assert_allclose(logp({}), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "data",
    [
        with_holes(PATTERNS["single cells"]),
        np.ma.MaskedArray(Y, PATTERNS["single cells"]),
        pd.DataFrame(with_holes(PATTERNS["single cells"])),
        DataArray(with_holes(PATTERNS["single cells"]), dims=DIMS),
    ],
    ids=["NaN", "masked", "DataFrame", "DataArray"],
)
def test_how_missing_cells_are_told(data):
    with pm.Model() as model:
        pk.TensorNormal("y", covs=[A, B], observed=data, marginalize_missing=True)
    missing = PATTERNS["single cells"]
    expected = observed_logp(Y.ravel(), np.zeros(N), dense_kron(A, B), missing)
    assert_allclose(model.compile_logp(mode=PY)({}), expected, rtol=1e-10)


def test_without_missing_cells_the_option_changes_nothing():
    models = []
    for marginalize_missing in (False, True):
        with pm.Model() as model:
            pk.TensorNormal("y", covs=[A, B], observed=Y, marginalize_missing=marginalize_missing)
        models.append(model.compile_logp(mode=PY)({}))
    assert_allclose(*models, rtol=1e-12)


def test_draws_and_predictive_draws_are_whole_grids():
    model = marginal_model("sigma", PATTERNS["a whole row"])
    options = {"random_seed": 1, "compile_kwargs": {"mode": PY}}
    with model:
        idata = pm.sample_prior_predictive(4, **options)
        idata["posterior"] = idata["prior"]
        predictive = pm.sample_posterior_predictive(idata, progressbar=False, **options)
    for group in (idata["prior_predictive"], predictive["posterior_predictive"]):
        assert group["y"].dims == ("chain", "draw", *DIMS)
        assert np.isfinite(group["y"]).all()
    data = idata["observed_data"]["y"]
    assert_allclose(data, with_holes(PATTERNS["a whole row"]))
    assert data.dims == DIMS


def test_the_option_survives_a_change_of_size_and_vectorizing():
    sigma = pt.scalar("sigma")
    rv = pk.TensorNormal.dist(covs=[A, B], sigma=sigma, marginalize_missing=True)
    resized = change_dist_size(rv, 2)
    vectorized = vectorize_graph(rv, {sigma: pt.stack([sigma, sigma])})
    missing = PATTERNS["single cells"]
    value = with_holes(missing)
    cov = dense_kron(A, B) + 0.25 * np.eye(N)
    expected = observed_logp(Y.ravel(), np.zeros(N), cov, missing)
    for batch in (resized, vectorized):
        logp = pm.logp(batch, np.stack([value, value])).eval({sigma: 0.5}, mode=PY)
        assert_allclose(logp, [expected, expected], rtol=1e-10)


@pytest.mark.parametrize("noise", [None, 0.5])
def test_no_array_has_the_square_of_the_number_of_cells(noise):
    rng = np.random.default_rng(7)
    sizes = (9, 13)
    factors = [pt.matrix(f"K{i}", shape=(n, n)) for i, n in enumerate(sizes)]
    arrays = [random_spd(rng, n) for n in sizes]
    few = np.zeros(sizes, dtype=bool)
    few[[0, 3, 8], [2, 7, 12]] = True
    for missing in (few, ~few):
        value = with_holes(missing, rng.normal(size=sizes))
        rv = pk.TensorNormal.dist(covs=factors, sigma=noise, marginalize_missing=True)
        [logp] = rewrite_pregrad([pm.logp(rv, value)])
        outputs = [logp, *pt.grad(logp, factors)]
        largest = largest_computed_size(factors, outputs, arrays)
        assert largest <= 9 * 13**2 < (9 * 13) ** 2


@pytest.mark.parametrize(
    ("mode", "noise"),
    [pytest.param("NUMBA", "sigma", marks=pytest.mark.nightly), ("JAX", "sigma"), ("JAX", "none")],
)
def test_backends(mode, noise):
    missing = PATTERNS["single cells"]
    model = marginal_model(noise, missing)
    point = point_of(model)
    logp, gradient = value_and_gradient(model, mode)(point)
    expected_logp, expected_gradient = dense(noise, missing, point)
    assert_allclose(logp, expected_logp, rtol=1e-9)
    assert_allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("grid", [True, False])
def test_by_default_missing_cells_are_parameters(grid, noise):
    missing = PATTERNS["single cells"]
    with pm.Model(coords=COORDS) as model, imputing():
        level, factors, noise_arguments = parameters(noise)
        arguments = {"covs": factors, **noise_arguments}
        if grid:
            pk.TensorNormal(
                "y", level[:, None], observed=with_holes(missing), dims=DIMS, **arguments
            )
        else:
            data = with_holes(missing).ravel()
            pk.KroneckerMvNormal("y", pt.repeat(level, 4), observed=data, **arguments)
    if grid:
        assert model.named_vars_to_dims["y"] == DIMS
    point = point_of(model)
    y = Y.copy()
    y[missing] = point["y_unobserved"]
    del point["y_unobserved"]
    expected, _ = dense(noise, np.zeros(SIZES, dtype=bool), point, y)
    logp = model.compile_logp(mode=PY)({**point, "y_unobserved": y[missing]})
    assert_allclose(logp, expected, rtol=1e-10)
    with model:
        options = {"random_seed": 1, "compile_kwargs": {"mode": PY}}
        prior = pm.sample_prior_predictive(3, **options)
    shape = (1, 3, *(SIZES if grid else (N,)))
    assert prior["prior"]["y"].shape == shape


@pytest.mark.parametrize("dims", [DIMS, DIMS[::-1]])
@pytest.mark.parametrize("missing", [PATTERNS["single cells"], PATTERNS["all but one"]])
def test_named_dims(missing, dims):
    space, time = ("station", "other_station"), ("day", "other_day")
    data = DataArray(with_holes(missing), dims=DIMS)
    with pm.Model(coords=COORDS) as model:
        level = pmd.Normal("level", dims="station")
        pkd.KroneckerMvNormal(
            "y",
            level,
            [DataArray(A, dims=space), DataArray(B, dims=time)],
            sigma=0.5,
            core_dims=[space, time],
            dims=dims,
            observed=data,
            marginalize_missing=True,
        )
    level = np.array([0.5, -1.0, 2.0])
    cov = dense_kron(A, B) + 0.25 * np.eye(N)
    expected = observed_logp(Y.ravel(), np.repeat(level, 4), cov, missing)
    logp = model.compile_fn(model.logp(model.observed_RVs), mode=PY)({"level": level})
    assert_allclose(logp, expected, rtol=1e-10)


def batch_of(*missing):
    return np.stack([with_holes(entry) for entry in missing])


ONE, OTHER = PATTERNS["single cells"], PATTERNS["a whole row"]
ALL = np.ones(SIZES, dtype=bool)


@pytest.mark.parametrize("marginalize_missing", [True, False])
@pytest.mark.parametrize(
    ("cls", "data", "dims", "message"),
    [
        (
            pk.TensorNormal,
            with_holes(ALL),
            DIMS,
            "All cells are missing, got observed of shape (3, 4) with dims=('station', 'day')",
        ),
        (
            pk.KroneckerMvNormal,
            with_holes(ALL).ravel(),
            None,
            "All cells are missing, got observed of shape (12,). Leave observed out",
        ),
        (pk.TensorNormal, batch_of(ALL, ALL), None, "got observed of shape (2, 3, 4)"),
    ],
)
def test_nothing_is_observed(cls, data, dims, message, marginalize_missing):
    with pm.Model(coords=COORDS), pytest.raises(ValueError, match=re.escape(message)):
        cls(
            "y",
            covs=[A, B],
            observed=data,
            dims=dims,
            marginalize_missing=marginalize_missing,
        )


def test_patterns_of_a_batch_that_differ():
    coords = {**COORDS, "year": range(2)}
    message = (
        "marginalize_missing needs the same missing cells in all observations of a batch, got "
        "observed of shape (2, 3, 4) with dims=('year', 'station', 'day'), whose last 2 are the "
        "grid, and 3 to 4 missing cells in different places."
    )
    with pm.Model(coords=coords), pytest.raises(ValueError, match=re.escape(message)):
        pk.TensorNormal(
            "y",
            covs=[A, B],
            observed=batch_of(ONE, OTHER),
            dims=("year", *DIMS),
            marginalize_missing=True,
        )
    rv = pk.TensorNormal.dist(covs=[A, B], marginalize_missing=True)
    logp = pm.logp(rv, batch_of(ONE, OTHER))
    with pytest.raises(ParameterValueError, match="the same missing cells in all values"):
        logp.eval(mode=PY)


def test_patterns_of_a_batch_that_differ_are_imputed():
    with pm.Model() as model, imputing():
        pk.TensorNormal("y", covs=[A, B], observed=batch_of(ONE, OTHER), size=2)
    x = Y[np.nonzero(ONE)], Y[np.nonzero(OTHER)]
    logp = model.compile_logp(mode=PY)({"y_unobserved": np.concatenate(x)})
    expected = 2 * multivariate_normal.logpdf(Y.ravel(), np.zeros(N), dense_kron(A, B))
    assert_allclose(logp, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("missing", "marginalize_missing", "message"),
    [
        (ONE, False, "has 3 missing cells, which pymc.dims doesn't impute"),
        (ALL, True, "All cells are missing, got observed of shape (3, 4) with dims=('station',"),
    ],
)
def test_errors_of_named_dims(missing, marginalize_missing, message):
    space, time = ("station", "other_station"), ("day", "other_day")
    with pm.Model(coords=COORDS), pytest.raises(ValueError, match=re.escape(message)):
        pkd.KroneckerMvNormal(
            "y",
            0,
            [DataArray(A, dims=space), DataArray(B, dims=time)],
            core_dims=[space, time],
            observed=DataArray(with_holes(missing), dims=DIMS),
            marginalize_missing=marginalize_missing,
        )
