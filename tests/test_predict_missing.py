import re
import warnings

import arviz as az
import numpy as np
import pymc as pm
import pymc.dims as pmd
import pytest
from numpy.testing import assert_allclose
from pymc.exceptions import ImputationWarning
from xarray import DataArray

import pymc_kron as pk
import pymc_kron.dims as pkd
from tests.helpers import PY, dense_kron, random_spd

OPTIONS = {
    "progressbar": False,
    "random_seed": 1,
    "compile_kwargs": {"mode": PY},
}
RNG = np.random.default_rng(21)
SIZES = (3, 4)
N = 12
COORDS = {"station": ["Malin Head", "Dublin", "Valentia"], "day": [10, 20, 30, 40]}
DIMS = ("station", "day")
A, B = random_spd(RNG, 3), random_spd(RNG, 4)
Y = RNG.normal(size=SIZES)
FEW = np.zeros(SIZES, dtype=bool)
FEW[[0, 2, 2], [1, 3, 1]] = True
MANY = np.ones(SIZES, dtype=bool)
MANY[[0, 1, 1], [2, 0, 3]] = False


def posterior(n, **values):
    return az.from_dict({"posterior": {name: np.reshape(v, (1, n)) for name, v in values.items()}})


def conditional(x, mu, cov, missing):
    """Return the mean and the covariance of the missing entries given the others."""
    m, o = np.flatnonzero(missing), np.flatnonzero(~missing)
    weights = np.linalg.solve(cov[np.ix_(o, o)], cov[np.ix_(o, m)]).T
    return mu + weights @ (x - mu)[o], cov[np.ix_(m, m)] - weights @ cov[np.ix_(o, m)]


def tensor_normal(level, sigma, missing):
    data = np.where(missing, np.nan, Y)
    pk.TensorNormal(
        "y", level, [A, B], sigma=sigma, observed=data, dims=DIMS, marginalize_missing=True
    )


def kronecker_mvnormal(level, sigma, missing):
    data = np.where(missing, np.nan, Y).ravel()
    pk.KroneckerMvNormal("y", level, [A, B], sigma=sigma, observed=data, marginalize_missing=True)


def named_dims(level, sigma, missing):
    space, time = ("station", "station_"), ("day", "day_")
    pkd.KroneckerMvNormal(
        "y",
        pmd.as_xtensor(level, dims=()),
        [DataArray(A, dims=space), DataArray(B, dims=time)],
        sigma=pmd.as_xtensor(sigma, dims=()),
        core_dims=[space, time],
        dims=DIMS[::-1],
        observed=DataArray(np.where(missing, np.nan, Y), dims=DIMS),
        marginalize_missing=True,
    )


KINDS = {
    "TensorNormal": (tensor_normal, DIMS),
    "KroneckerMvNormal": (kronecker_mvnormal, None),
    "transposed dims": (named_dims, DIMS[::-1]),
}


@pytest.mark.parametrize("missing", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_draws(kind, missing):
    build, dims = KINDS[kind]
    with pm.Model(coords=COORDS) as model:
        level, sigma = pm.Normal("level"), pm.HalfNormal("sigma")
        build(level, sigma, missing)
    n = 1000
    levels, sigmas = np.resize([0.5, -1.0], n), np.resize([0.4, 0.9], n)
    prediction = pk.predict_missing(posterior(n, level=levels, sigma=sigmas), model, **OPTIONS)

    moments = [
        conditional(Y.ravel(), mu, dense_kron(A, B) + s**2 * np.eye(N), missing.ravel())
        for mu, s in zip(levels[:2], sigmas[:2], strict=True)
    ]
    means = np.array([mean for mean, _ in moments])
    variances = np.array([cov.diagonal() for _, cov in moments])
    mean, sd = prediction["y_mean"], prediction["y_sd"]
    draws = prediction["y_unobserved"].values[0]
    if dims is None:
        assert mean.dims == ("y_dim_0",)
        cells = np.ravel_multi_index(np.nonzero(missing), SIZES)
        assert_allclose(prediction["y_unobserved_y_dim_0"], cells)
    else:
        assert mean.dims == sd.dims == dims
        station = np.array(COORDS["station"])[np.nonzero(missing)[0]]
        day = np.array(COORDS["day"])[np.nonzero(missing)[1]]
        # In the order of the cells of the variable
        order = np.arange(day.size) if dims == DIMS else np.lexsort((np.nonzero(missing)[0], day))
        assert list(prediction["y_unobserved_station"].values) == list(station[order])
        assert_allclose(prediction["y_unobserved_day"], day[order])
        mean, sd = mean.transpose(*DIMS), sd.transpose(*DIMS)
        draws = draws[:, np.argsort(order)]
    mean, sd = mean.values.reshape(SIZES), sd.values.reshape(SIZES)
    assert_allclose(mean[~missing], Y[~missing])
    assert_allclose(sd[~missing], 0, atol=0)
    assert_allclose(mean[missing], means.mean(axis=0), rtol=1e-9)
    total = variances.mean(axis=0) + means.var(axis=0)
    assert_allclose(sd[missing], np.sqrt(total), rtol=1e-9)
    for i, (mu, cov) in enumerate(moments):
        own = draws[i::2]
        errors = np.sqrt(cov.diagonal() / len(own))
        assert np.abs((own.mean(axis=0) - mu) / errors).max() < 4.5
        errors = np.sqrt((cov**2 + np.outer(cov.diagonal(), cov.diagonal())) / len(own))
        assert np.abs((np.cov(own.T) - cov) / errors).max() < 4.5


def test_batches_and_two_grids():
    stack = np.stack([A, 2 * A])
    data = RNG.normal(size=(2, *SIZES))
    with pm.Model() as model:
        level = pm.Normal("level")
        for name in ("y", "z"):
            pk.TensorNormal(
                name,
                level,
                [stack, B],
                observed=np.where(FEW, np.nan, data),
                marginalize_missing=True,
            )
        pm.Normal("other", level, observed=1.0)
    prediction = pk.predict_missing(posterior(3, level=[0.5] * 3), model, **OPTIONS)
    for i, K in enumerate(stack):
        mean, cov = conditional(data[i].ravel(), 0.5, dense_kron(K, B), FEW.ravel())
        assert_allclose(prediction["y_mean"].values[i][FEW], mean, rtol=1e-9)
        assert_allclose(prediction["z_sd"].values[i][FEW], cov.diagonal() ** 0.5, rtol=1e-9)
    assert prediction["y_unobserved"].shape == (1, 3, 6)
    only = pk.predict_missing(posterior(3, level=[0.5] * 3), model, var_names=["z"], **OPTIONS)
    assert set(only.data_vars) == {"z_mean", "z_sd", "z_unobserved"}
    with pytest.raises(ValueError, match=re.escape("got var_names ['other']")):
        pk.predict_missing(
            posterior(3, level=[0.5] * 3), model, var_names=["z", "other"], **OPTIONS
        )


def test_nothing_to_predict():
    idata = posterior(3, level=[0.5] * 3)
    with pm.Model() as model:
        level = pm.Normal("level")
        pk.TensorNormal("y", level, [A, B], observed=Y, marginalize_missing=True)
    with pytest.raises(ValueError, match=re.escape("got observed variables ['y']")):
        pk.predict_missing(idata, model, **OPTIONS)
    with pytest.raises(ValueError, match=re.escape("which are ['y'], got ['x']")):
        pk.predict_missing(idata, model, var_names=["x"], **OPTIONS)
    with pm.Model() as model, warnings.catch_warnings():
        warnings.simplefilter("ignore", ImputationWarning)
        level = pm.Normal("level")
        pk.TensorNormal("y", level, [A, B], observed=np.where(FEW, np.nan, Y))
    with pytest.raises(ValueError, match="they are in the posterior group as y_unobserved"):
        pk.predict_missing(idata, model, **OPTIONS)
