import re

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.traversal import ancestors
from xarray import DataArray

import pymc_kron.dims as pkd
from pymc_kron import KroneckerMvNormal, TensorNormal, conditional, loo_pointwise
from tests.helpers import PY, compile_py, dense_kron, largest_computed_size, random_spd

RNG = np.random.default_rng(12)
SIZES, NEW_SIZES = (2, 3, 4), (3, 1, 2)
# Of the points of the grid and the new ones together
JOINT = [random_spd(RNG, n + m) for n, m in zip(SIZES, NEW_SIZES, strict=True)]
S = [joint[:n, :n] for joint, n in zip(JOINT, SIZES, strict=True)]
CROSS = [joint[n:, :n] for joint, n in zip(JOINT, SIZES, strict=True)]
NEW = [joint[n:, n:] for joint, n in zip(JOINT, SIZES, strict=True)]
D = random_spd(RNG, 3)
Y, MU = RNG.normal(size=SIZES), RNG.normal(size=SIZES)

COVARIANCES = {
    "covs": ({"covs": S}, 0),
    "chols": ({"chols": [np.linalg.cholesky(M) for M in S]}, 0),
    "taus": ({"taus": [np.linalg.inv(M) for M in S]}, 0),
    "evds": ({"evds": [tuple(np.linalg.eigh(M)) for M in S]}, 0),
    "sigma": ({"covs": S, "sigma": 0.7}, 0.49 * np.eye(24)),
    "evds and sigma": ({"evds": [tuple(np.linalg.eigh(M)) for M in S], "sigma": 1}, np.eye(24)),
    "noise_covs": (
        {"covs": S, "noise_covs": [np.array([0.5, 2.0]), D, 1.5]},
        dense_kron(np.diag([0.5, 2.0]), D, 1.5 * np.eye(4)),
    ),
}
# On which axes there are new points
AXES = {"station": (0,), "day": (2,), "two": (0, 2), "all": (0, 1, 2), "none": ()}


def on(axes, new, old):
    """Return what there is on axes with new points, and on those without."""
    return [new[i] if i in axes else old[i] for i in range(len(new))]


def dense_conditional(delta, axes, noise):
    """Return the mean and the covariance of new cells given a residual of the grid."""
    K = dense_kron(*S) + noise
    C, T = dense_kron(*on(axes, CROSS, S)), dense_kron(*on(axes, NEW, S))
    return C @ np.linalg.solve(K, delta), T - C @ np.linalg.solve(K, C.T)


def moments(variables):
    """Return the mean, the variances, and the mean and covariance of the draws, as vectors.

    The draws are a linear map of standard normal variables, which shows both.
    """
    [whitened] = {var for var in ancestors([variables.draws]) if var.name == "f_whitened"}
    function = compile_py([whitened], [variables.mean, variables.variance, variables.draws], PY)
    [n] = whitened.type.shape
    mean, variance, drawn_mean = (value.ravel() for value in function(np.zeros(n)))
    root = np.stack([function(unit)[2].ravel() - drawn_mean for unit in np.eye(n)])
    return mean, variance, drawn_mean, root.T @ root


def assert_moments_are(variables, mean, cov):
    computed_mean, variance, drawn_mean, drawn_cov = moments(variables)
    assert_allclose(computed_mean, mean, rtol=1e-9, atol=1e-12)
    assert_allclose(variance, cov.diagonal(), rtol=1e-9)
    assert_allclose(drawn_mean, mean, rtol=1e-9, atol=1e-12)
    assert_allclose(drawn_cov, cov, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *((name, "two") for name in COVARIANCES),
        *(("covs", axes) for axes in ("station", "day", "all")),
        *(("noise_covs", axes) for axes in ("station", "day", "all", "none")),
        ("sigma", "none"),
    ],
)
def test_against_dense(name, axes):
    arguments, noise = COVARIANCES[name]
    axes = AXES[axes]
    nothing = [None] * 3
    new_mu = RNG.normal(size=on(axes, NEW_SIZES, SIZES))
    with pm.Model():
        y = KroneckerMvNormal("y", MU.ravel(), **arguments, observed=Y.ravel())
        variables = conditional(
            "f", y, on(axes, CROSS, nothing), on(axes, NEW, nothing), mu=new_mu.ravel()
        )
    mean, cov = dense_conditional((Y - MU).ravel(), axes, noise)
    assert variables.draws.type.shape == mean.shape
    assert_moments_are(variables, new_mu.ravel() + mean, cov)


NEW_D = random_spd(RNG, 1)
NEW_NOISE = {
    "nothing": ({}, 0),
    "sigma": ({"sigma": 0.3}, 0.09),
    "noise_covs": (
        {"noise_covs": [[0.5, 2.0], NEW_D, 1.5]},
        dense_kron(np.diag([0.5, 2.0]), NEW_D, 1.5 * np.eye(2)),
    ),
}


@pytest.mark.parametrize(
    ("of_grid", "of_new"),
    [
        ("covs", "sigma"),
        ("sigma", "nothing"),
        ("sigma", "noise_covs"),
        ("noise_covs", "noise_covs"),
    ],
)
def test_noise_of_new_observations(of_grid, of_new):
    arguments, noise = COVARIANCES[of_grid]
    new_arguments, new_noise = NEW_NOISE[of_new]
    with pm.Model():
        y = TensorNormal("y", MU, **arguments, observed=Y)
        variables = conditional(
            "f", y, [None, *CROSS[1:]], [None, *NEW[1:]], mu=[[[0.5]], [[2.0]]], **new_arguments
        )
    assert variables.draws.type.shape == variables.variance.type.shape == (2, 1, 2)
    mean, cov = dense_conditional((Y - MU).ravel(), (1, 2), noise)
    mean = mean + np.repeat([0.5, 2.0], 2)
    cov = cov + (new_noise if np.ndim(new_noise) else new_noise * np.eye(4))
    assert_moments_are(variables, mean, cov)


@pytest.mark.parametrize("noise", [{}, {"sigma": 0.5}])
def test_a_new_point_may_be_one_of_the_grid(noise):
    # The first new station is the second one of the grid
    joint = JOINT[0]
    cross, new = joint[[1, 3], :2], joint[np.ix_([1, 3], [1, 3])]
    with pm.Model():
        y = TensorNormal("y", MU, S, observed=Y, **noise)
        at_grid = conditional("f", y, [cross, None, None], [new, None, None], mu=MU[[1, 1]])
    mean, variance, draws = (
        var.eval(mode=PY)[0] for var in (at_grid.mean, at_grid.variance, at_grid.draws)
    )
    if not noise:
        assert_allclose(mean, Y[1], rtol=1e-12)
        assert_allclose(variance, 0, atol=1e-14)
        assert (variance >= 0).all()
        assert_allclose(draws, Y[1], atol=1e-6)
    else:
        with pm.Model():
            y = TensorNormal("y", MU, S, observed=Y, **noise)
            smooth = conditional("f", y, [None] * 3, [None] * 3, mu=MU)
        assert_allclose(mean, smooth.mean.eval(mode=PY)[1], rtol=1e-9)
        assert_allclose(variance, smooth.variance.eval(mode=PY)[1], rtol=1e-9)


def test_singular_and_smooth_factors_with_noise():
    # Without a jitter: the eigenvalues of the second matrix are zero to rounding
    x, new_x = np.linspace(0, 1, 12), np.array([0.31, 1.1])

    def smooth(a, b):
        return np.exp(-0.5 * np.subtract.outer(a, b) ** 2 / 0.5**2)

    signals = [np.ones((2, 2)), smooth(x, x)]
    crosses, news = [np.ones((3, 2)), smooth(new_x, x)], [np.ones((3, 3)), smooth(new_x, new_x)]
    grid = RNG.normal(size=(2, 12))
    with pm.Model():
        y = TensorNormal("y", 0, signals, sigma=0.1, observed=grid)
        variables = conditional("f", y, crosses, news)
    K, C, T = dense_kron(*signals) + 0.01 * np.eye(24), dense_kron(*crosses), dense_kron(*news)
    cov = T - C @ np.linalg.solve(K, C.T)
    assert_moments_are(variables, C @ np.linalg.solve(K, grid.ravel()), cov)


@pytest.mark.parametrize(
    ("noise", "is_batch"), [(None, False), (0.5, True)], ids=["values", "everything"]
)
def test_batches(noise, is_batch):
    rng = np.random.default_rng(2)
    joint = random_spd(rng, 5, batch=(4,) if is_batch else ())
    signal, cross, new = joint[..., :3, :3], joint[..., 3:, :3], joint[..., 3:, 3:]
    grids = rng.normal(size=(4, 2, 3))
    sigma = None if noise is None else np.linspace(0.5, 1, 4) if is_batch else noise
    with pm.Model():
        y = TensorNormal("y", 0, [S[0], signal], sigma=sigma, observed=grids)
        variables = conditional("f", y, [CROSS[0], cross], [NEW[0], new])
    mean, variance = (var.eval(mode=PY) for var in (variables.mean, variables.variance))
    assert mean.shape == variance.shape == (4, 3, 2)
    draws = pm.draw(variables.draws, 1000, random_seed=1, mode=PY)
    assert draws.shape == (1000, 4, 3, 2)
    for i in range(4):
        entry = (lambda matrix, i=i: matrix[i]) if is_batch else lambda matrix: matrix
        variance_of_noise = 0 if noise is None else np.broadcast_to(sigma, 4)[i] ** 2
        K = dense_kron(S[0], entry(signal)) + variance_of_noise * np.eye(6)
        C, T = dense_kron(CROSS[0], entry(cross)), dense_kron(NEW[0], entry(new))
        cov = T - C @ np.linalg.solve(K, C.T)
        assert_allclose(mean[i].ravel(), C @ np.linalg.solve(K, grids[i].ravel()), rtol=1e-9)
        assert_allclose(variance[i].ravel(), cov.diagonal(), rtol=1e-9)
        assert_moments(draws[:, i].reshape(1000, 6), mean[i].ravel(), cov)
    # One entry has nothing to do with another
    errors = draws.reshape(1000, 4, 6) - mean.reshape(4, 6)
    correlation = np.corrcoef(errors[:, 0].T, errors[:, 1].T)[:6, 6:]
    assert np.abs(correlation).max() < 4.5 / 1000**0.5


def assert_moments(draws, mean, cov):
    """Compare means and covariances of normal draws within 4.5 standard errors."""
    n, variance = len(draws), cov.diagonal()
    assert np.abs((draws.mean(axis=0) - mean) / np.sqrt(variance / n)).max() < 4.5
    errors = np.sqrt((cov**2 + np.outer(variance, variance)) / n)
    assert np.abs((np.cov(draws.T) - cov) / errors).max() < 4.5


COORDS = {
    "station": ["Malin Head", "Dublin"],
    "day": range(4),
    "new_station": ["Valentia", "Belmullet", "Clones"],
    "new_day": [4, 5],
}


def build(sigma, given="observed"):
    """Return a model of stations and days with unknown parameters, after fitting."""
    with pm.Model(coords=COORDS) as model:
        scale, level = pm.HalfNormal("scale"), pm.Normal("level")
        covs = [scale * S[0], S[2]]
        if given == "observed":
            y = TensorNormal(
                "y", level, covs, sigma=sigma, dims=("station", "day"), observed=Y[:, 0]
            )
        else:
            y = TensorNormal("y", level, covs, sigma=sigma, dims=("station", "day"))
            pm.Normal("z", y, 1, observed=Y[:, 0])
    with model:
        conditional(
            "f",
            given=y,
            cross_covs=[scale * CROSS[0], CROSS[2]],
            new_covs=[scale * NEW[0], NEW[2]],
            mu=level,
            dims=("new_station", "new_day"),
        )
    return model


def posterior_of(**values):
    return {name: np.asarray(value)[None] for name, value in values.items()}


@pytest.mark.parametrize(("given", "sigma"), [("observed", 0.4), ("latent", None)])
def test_posterior_predictive(given, sigma):
    # Draws with two values of the parameters, again and again
    scales, levels, n = np.array([0.5, 2.0]), np.array([-1.0, 3.0]), 150
    grids = np.stack([Y[:, 0], Y[:, 1]]) if given == "latent" else np.stack([Y[:, 0]] * 2)
    which = np.arange(2 * n) % 2
    values = {"scale": scales[which], "level": levels[which]}
    if given == "latent":
        values["y"] = grids[which]
    idata = pm.backends.arviz.dict_to_dataset(
        posterior_of(**values), coords=COORDS, dims={"y": ["station", "day"]}
    )
    with build(sigma, given):
        predictions = pm.sample_posterior_predictive(
            idata,
            var_names=["f", "f_mean", "f_variance"],
            predictions=True,
            random_seed=4,
            progressbar=False,
            compile_kwargs={"mode": PY},
        )["predictions"]
    for name in ("f", "f_mean", "f_variance"):
        assert predictions[name].dims == ("chain", "draw", "new_station", "new_day")
    assert list(predictions["f"].coords["new_station"].values) == COORDS["new_station"]
    for k in range(2):
        K = dense_kron(scales[k] * S[0], S[2]) + (sigma or 0) ** 2 * np.eye(8)
        C, T = dense_kron(scales[k] * CROSS[0], CROSS[2]), dense_kron(scales[k] * NEW[0], NEW[2])
        mean = levels[k] + C @ np.linalg.solve(K, grids[k].ravel() - levels[k])
        cov = T - C @ np.linalg.solve(K, C.T)
        draws = predictions["f"].values[0, which == k].reshape(n, 6)
        assert_moments(draws, mean, cov)
        for name, expected in (("f_mean", mean), ("f_variance", cov.diagonal())):
            computed = predictions[name].values[0, which == k].reshape(n, 6)
            assert_allclose(computed, np.tile(expected, (n, 1)), rtol=1e-9)


def test_data_and_points_that_change():
    with pm.Model() as model:
        cross, new = pm.Data("cross", CROSS[0][:1]), pm.Data("new", NEW[0][:1, :1])
        signals = [pm.Data(f"S{i}", signal) for i, signal in enumerate(S)]
        y = KroneckerMvNormal("y", 0, signals, sigma=0.7, observed=pm.Data("data", MU.ravel()))
        variables = conditional("f", y, [cross, None, None], [new, None, None])
        pm.set_data({"cross": CROSS[0], "new": NEW[0], "data": Y.ravel()})
    mean, cov = dense_conditional(Y.ravel(), AXES["station"], COVARIANCES["sigma"][1])
    draws, means, variances = pm.draw(list(variables), 300, random_seed=1, mode=PY)
    assert_moments(draws, mean, cov)
    assert_allclose(means[0], mean, rtol=1e-9)
    assert_allclose(variances[0], cov.diagonal(), rtol=1e-9)
    assert model["f_mean"] is variables.mean


def test_the_model_goes_on():
    model = build(sigma=0.4)
    point = model.initial_point()
    assert np.isfinite(model.compile_logp(mode=PY)(point))
    idata = pm.backends.arviz.dict_to_dataset(posterior_of(scale=np.ones(3), level=np.zeros(3)))
    tree = pm.backends.arviz.DataTree.from_dict({"posterior": idata})
    options = {"progressbar": False, "compile_kwargs": {"mode": PY}}
    loo = loo_pointwise(tree, model, extend_inferencedata=False, **options)
    assert loo["y"].shape == (1, 3, 2, 4)


@pytest.mark.parametrize("noise", [{}, {"sigma": 0.5}])
def test_no_array_of_old_or_new_cells_by_cells(noise):
    sizes, new_sizes = (6, 9, 10), (4, 9, 5)
    joints = [random_spd(RNG, n + m) for n, m in zip(sizes, new_sizes, strict=True)]
    matrices = [
        part
        for joint, n in zip(joints, sizes, strict=True)
        for part in (joint[:n, :n], joint[n:, :n], joint[n:, n:])
    ]
    symbols = [pt.tensor(shape=matrix.shape) for matrix in matrices]
    signals, crosses, news = symbols[::3], symbols[1::3], symbols[2::3]
    crosses[1] = news[1] = None
    with pm.Model():
        y = KroneckerMvNormal("y", 0, signals, observed=RNG.normal(size=540), **noise)
        variables = conditional("f", y, crosses, news, **noise)
    [whitened] = {var for var in ancestors([variables.draws]) if var.name == "f_whitened"}
    [n_whitened] = whitened.type.shape
    assert n_whitened == 10 * 9 * 15 + (540 + 180 if noise else 0)
    assert largest_computed_size(symbols, list(variables), matrices) == n_whitened


ARGUMENTS = {"cross_covs": [CROSS[0], None, None], "new_covs": [NEW[0], None, None]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"cross_covs": [CROSS[0].T, None, None]},
            ValueError,
            "cross_covs[0] must have a row for each new point and a column for each point of the "
            "grid, (3, 2) for factor 0, got shape (2, 3) with new_covs[0] of shape (3, 3)",
        ),
        ({"cross_covs": [np.ones(2), None, None]}, ValueError, "factor 0, got shape (2,)"),
        ({"new_covs": [CROSS[0], None, None]}, ValueError, "new_covs[0] must be a square matrix"),
        (
            {"new_covs": [None, None, None]},
            ValueError,
            "New points of factor 0 need both cross_covs[0]",
        ),
        ({"cross_covs": [None] * 3}, ValueError, "got new_covs[0] alone. Put None in both"),
        (
            {"cross_covs": [CROSS[0]]},
            ValueError,
            "cross_covs must have one entry for each of the 3 factors, with None for a factor "
            "without new points, got 1",
        ),
        ({"new_covs": NEW[0]}, TypeError, "new_covs must be a list or tuple with one covariance"),
        (
            {"cross_covs": [None] * 3, "new_covs": [None] * 3},
            ValueError,
            "There is nothing to predict: all cross_covs are None, so that the new cells are those "
            "of y, which has no noise",
        ),
        ({"mu": np.zeros((2, 3, 4))}, ValueError, "The last 3 dimensions of mu must be (3, 3, 4)"),
        ({"noise_covs": [np.ones(2), None, None]}, ValueError, "noise_covs[0] must be a matrix (3"),
        ({"dims": ("station", "a", "b")}, ValueError, "Dim 'station' is of length 2, but factor 0"),
    ],
)  # fmt: skip
def test_errors(arguments, error, message):
    with pm.Model(coords=COORDS):
        y = TensorNormal("y", MU, S, observed=Y)
        with pytest.raises(error, match=re.escape(message)):
            conditional("f", y, **(ARGUMENTS | arguments))


def test_errors_about_what_is_given():
    with pm.Model(coords={"a": range(2), "b": range(3)}):
        TensorNormal("y", MU, S, observed=Y)
        plain = pm.MvNormal("plain", np.zeros(24), cov=pt.linalg.kron(pt.linalg.kron(*S[:2]), S[2]))
        with pytest.warns(pm.exceptions.ImputationWarning):
            imputed = KroneckerMvNormal(
                "imputed", 0, S, observed=np.where(np.arange(24) == 3, np.nan, Y.ravel())
            )
        named = pkd.KroneckerMvNormal(
            "named",
            covs=[DataArray(S[0], dims=("a", "a_")), DataArray(S[1], dims=("b", "b_"))],
            core_dims=[("a", "a_"), ("b", "b_")],
        )
        for given in (plain, imputed, named, TensorNormal.dist(MU, S), Y):
            with pytest.raises(TypeError, match=re.escape("which there are ['y'], got ")):
                conditional("f", given, **ARGUMENTS)
        marginal = TensorNormal(
            "marginal", MU, S, observed=np.where(Y > 1, np.nan, Y), marginalize_missing=True
        )
        message = f"marginal has {np.sum(Y > 1)} missing cells"
        with pytest.raises(ValueError, match=message):
            conditional("f", marginal, **ARGUMENTS)
