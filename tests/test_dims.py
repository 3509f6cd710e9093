import re

import numpy as np
import pymc as pm
import pymc.dims as pmd
import pytest
from numpy.testing import assert_allclose
from xarray import DataArray

import pymc_kron.dims as pkd
from tests.helpers import PY, dense_kron, random_spd

RNG = np.random.default_rng(9)
A, B, C = random_spd(RNG, 2), random_spd(RNG, 3), random_spd(RNG, 2, batch=(4,))
D = random_spd(RNG, 3)
MU, X = RNG.normal(size=(2, 3)), RNG.normal(size=(4, 2, 3))
COORDS = {"station": ["Malin Head", "Dublin"], "day": range(3), "year": range(4)}
PAIRS = [("station", "other_station"), ("day", "other_day")]
SPACE, TIME = PAIRS


def named(array, *dims):
    return DataArray(array, dims=dims)


def dense_logp(x, mu, cov):
    x, mu = (np.reshape(array, (*np.shape(array)[:-2], 6)) for array in (x, mu))
    return pm.logp(pm.MvNormal.dist(mu, cov), x).eval(mode=PY)


K = dense_kron(A, B)
NOISE = {"noise_covs": [named([0.5, 2.0], "station"), named(D, *TIME)]}
W, Q = np.linalg.eigh(A)
PARAMETERS = {
    "covs": ({"covs": [named(A, *SPACE), named(B, *TIME)]}, K),
    "transposed": ({"covs": [named(A, *SPACE[::-1]), named(B, *TIME[::-1])]}, K),
    "chols": (
        {
            "chols": [
                named(np.linalg.cholesky(A).T, *SPACE[::-1]),
                named(np.linalg.cholesky(B), *TIME),
            ]
        },
        K,
    ),
    "taus": ({"taus": [named(np.linalg.inv(A), *SPACE), named(np.linalg.inv(B), *TIME)]}, K),
    "mixed": (
        {
            "covs": [None, named(B, *TIME)],
            "evds": [(named(W, "other_station"), named(Q.T, *SPACE[::-1])), None],
        },
        K,
    ),
    "sigma": ({"covs": [named(A, *SPACE), named(B, *TIME)], "sigma": 0.5}, K + 0.25 * np.eye(6)),
    "noise_covs": (
        {"covs": [named(A, *SPACE), named(B, *TIME)], **NOISE},
        K + dense_kron(np.diag([0.5, 2.0]), D),
    ),
    "batch": ({"covs": [named(C, "year", *SPACE), named(B, *TIME)]}, dense_kron(C, B)),
    "batch behind": (
        {"covs": [named(np.moveaxis(C, 0, -1), *SPACE, "year"), named(B, *TIME)], "sigma": 0.5},
        dense_kron(C, B) + 0.25 * np.eye(6),
    ),
}


@pytest.mark.parametrize("dims", [("year", "station", "day"), ("day", "year", "station")])
@pytest.mark.parametrize("name", PARAMETERS)
def test_log_density_against_dense(name, dims):
    arguments, dense = PARAMETERS[name]
    with pm.Model(coords=COORDS) as model:
        x = pkd.KroneckerMvNormal(
            "x", named(MU.T, "day", "station"), core_dims=PAIRS, dims=dims, **arguments
        )
    assert x.type.dims == dims
    value = named(X, "year", "station", "day").transpose(*dims).values
    logp = model.compile_logp(mode=PY)({"x": value})
    assert_allclose(logp, dense_logp(X, MU, dense).sum(), rtol=1e-10)
    gradient = model.compile_dlogp(mode=PY)({"x": value})
    delta = (X - MU).reshape(4, 6, 1)
    expected = -np.linalg.solve(np.broadcast_to(dense, (4, 6, 6)), delta).reshape(4, 2, 3)
    expected = named(expected, "year", "station", "day").transpose(*dims).values
    assert_allclose(gradient, expected.ravel(), rtol=1e-8)


def test_a_dim_of_the_model_beside_a_batch_of_a_factor():
    arguments, dense = PARAMETERS["batch"]
    with pm.Model(coords={**COORDS, "sample": range(5)}) as model:
        x = pkd.KroneckerMvNormal(
            "x",
            named([1.0, 2.0], "station"),
            core_dims=PAIRS,
            dims=("sample", "year", "station", "day"),
            **arguments,
        )
    value = RNG.normal(size=(5, 4, 2, 3))
    assert pm.draw(x, random_seed=1, mode=PY).shape == value.shape
    logp = model.compile_logp(mode=PY)({"x": value})
    mean = np.broadcast_to([[1.0], [2.0]], (2, 3))
    assert_allclose(logp, dense_logp(value, mean, dense).sum(), rtol=1e-10)


@pytest.mark.parametrize("mu", [0.5, named([1.0, 2.0], "station"), named([1.0, 2.0, 3.0], "day")])
def test_means(mu):
    arguments, dense = PARAMETERS["sigma"]
    x = pkd.KroneckerMvNormal.dist(mu, core_dims=PAIRS, **arguments)
    assert x.type.dims == ("station", "day")
    mean = (named(np.zeros((2, 3)), "station", "day") + mu).values
    logp = pm.logp(x, pmd.as_xtensor(named(X[0], "station", "day")))
    assert logp.type.dims == ()
    assert_allclose(logp.values.eval(mode=PY), dense_logp(X[0], mean, dense), rtol=1e-10)


def test_draws():
    arguments, dense = PARAMETERS["batch"]
    x = pkd.KroneckerMvNormal.dist(named(MU, "station", "day"), core_dims=PAIRS, **arguments)
    assert x.type.dims == ("year", "station", "day")
    n = 20_000
    draws = pm.draw(x.values, n, random_seed=1, mode=PY).reshape(n, 4, 6)
    for year in range(4):
        M = dense[year]
        errors = np.sqrt((M**2 + np.outer(M.diagonal(), M.diagonal())) / n)
        assert np.abs((np.cov(draws[:, year].T) - M) / errors).max() < 4.5
    assert np.abs(draws.mean(axis=0) - MU.ravel()).max() < 4.5 * np.sqrt(dense.max() / n)


def test_a_model():
    y = named(X[0].T, "day", "station")
    with pm.Model(coords=COORDS) as model:
        level = pmd.Normal("level", dims="station")
        scale = pmd.HalfNormal("scale")
        K_space = scale**2 * pmd.as_xtensor(named(A, *SPACE))
        factors = {"covs": [K_space, named(B, *TIME)], "core_dims": PAIRS}
        field = pkd.KroneckerMvNormal("field", level, **factors)
        pkd.KroneckerMvNormal("y", field, sigma=0.5, observed=y, **factors)
    assert model.named_vars_to_dims["field"] == ("station", "day")
    with pm.Model() as dense_model:
        level = pm.Normal("level", shape=2)
        scale = pm.HalfNormal("scale")
        field = pm.MvNormal("field", level[np.repeat([0, 1], 3)], scale**2 * K)
        cov = scale**2 * K + 0.25 * np.eye(6)
        pm.MvNormal("y", field, cov, observed=X[0].ravel())
    point = {"level": RNG.normal(size=2), "scale_log__": 0.3}
    logp = model.compile_logp(mode=PY)({**point, "field": X[1]})
    expected = dense_model.compile_logp(mode=PY)({**point, "field": X[1].ravel()})
    assert_allclose(logp, expected, rtol=1e-9)

    options = {"random_seed": 1, "compile_kwargs": {"mode": PY}}
    with model:
        idata = pm.sample_prior_predictive(5, **options)
        idata.update({"posterior": idata["prior"]})
        predictive = pm.sample_posterior_predictive(idata, progressbar=False, **options)
    assert idata["prior"]["field"].sel(station="Dublin", day=2).shape == (1, 5)
    assert predictive["posterior_predictive"]["y"].sel(station="Dublin", day=2).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"core_dims": None}, ValueError, "core_dims must name the two dims of each factor"),
        (
            {"core_dims": ["station", "day"]},
            ValueError,
            "must have a pair of names for each factor",
        ),
        (
            {"core_dims": [("station", "other_station"), ("station", "other_day")]},
            ValueError,
            "The dim 'station' comes more than once in core_dims, in that of factor 0 and 1",
        ),
        (
            {"core_dims": [("station", "other_station")]},
            ValueError,
            "covs must have one entry for each of the 1 pairs of core_dims",
        ),
        (
            {"covs": [named(A, "station", "station_2"), named(B, *TIME)]},
            ValueError,
            "covs[0] must have the dims ('station', 'other_station')",
        ),
        (
            {"covs": [named(A, *SPACE), named(np.ones((3, 3, 2)), *TIME, "station")]},
            ValueError,
            "covs[1] must have the dims ('day', 'other_day'), and those of batches, got",
        ),
        ({"covs": [A, named(B, *TIME)]}, ValueError, "covs[0] has no dims."),
        ({"covs": named(A, *SPACE)}, TypeError, "covs must be a list or tuple"),
        ({"evds": [named(A, *SPACE), None], "covs": None}, TypeError, "evds[0] must be a pair"),
        (
            {"covs": [named(B, *SPACE), named(B, *TIME)]},
            ValueError,
            "Dim 'station' is of length 2, but factor 0 is 3 x 3",
        ),
        (
            {"sigma": named([1.0, 2.0], "station")},
            ValueError,
            "sigma must have no core dims",
        ),
    ],
)
def test_errors(arguments, error, message):
    arguments = {"covs": PARAMETERS["covs"][0]["covs"], "core_dims": PAIRS, **arguments}
    with pm.Model(coords=COORDS), pytest.raises(error, match=re.escape(message)):
        pkd.KroneckerMvNormal("x", **arguments)
