import re

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.stats
from numpy.testing import assert_allclose, assert_array_equal
from pytensor.graph.replace import vectorize_graph
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.decomposition.eigen import Eigh

from pymc_kron import KroneckerMvNormal, TensorNormal
from tests.helpers import (
    PY,
    dense_kron,
    finite_differences,
    largest_computed_size,
    random_spd,
)

RNG = np.random.default_rng(5)
SIZES = (2, 3, 4)
A, B, C = (random_spd(RNG, n) for n in SIZES)
D = random_spd(RNG, 3)
K = dense_kron(A, B, C)
MU = RNG.normal(size=SIZES)
X = RNG.normal(size=SIZES)

# What describes the covariance, and its dense counterpart
COVARIANCES = {
    "covs": ({"covs": [A, B, C]}, K),
    "chols": ({"chols": [np.linalg.cholesky(M) for M in (A, B, C)]}, K),
    "taus": ({"taus": [np.linalg.inv(M) for M in (A, B, C)]}, K),
    "evds": ({"evds": [tuple(np.linalg.eigh(M)) for M in (A, B, C)]}, K),
    "sigma": ({"covs": [A, B, C], "sigma": 0.7}, K + 0.49 * np.eye(24)),
    "noise_covs": (
        {"covs": [A, B, C], "noise_covs": [np.array([0.5, 2.0]), D, None]},
        K + dense_kron(np.diag([0.5, 2.0]), D, np.eye(4)),
    ),
}


def dense_logp(x, mu, cov):
    return pm.logp(pm.MvNormal.dist(mu, cov), x).eval(mode=PY)


@pytest.mark.parametrize("name", COVARIANCES)
def test_the_grid_and_the_vector_are_one_distribution(name):
    arguments, dense = COVARIANCES[name]
    grid, vector = (
        TensorNormal.dist(MU, **arguments),
        KroneckerMvNormal.dist(MU.ravel(), **arguments),
    )
    assert grid.type.shape == SIZES
    expected = pm.logp(vector, X.ravel()).eval(mode=PY)
    logp = pm.logp(grid, X)
    assert_array_equal(logp.eval(mode=PY), expected)
    assert_allclose(expected, dense_logp(X.ravel(), MU.ravel(), dense), rtol=1e-10)
    grids, vectors = (pm.draw(rv, 3, random_seed=1, mode=PY) for rv in (grid, vector))
    assert grids.shape == (3, *SIZES)
    assert_array_equal(grids.reshape(3, 24), vectors)


@pytest.mark.parametrize("name", ["covs", "sigma"])
def test_gradient(name):
    arguments, dense = COVARIANCES[name]
    mu, x = pt.tensor(shape=SIZES), pt.tensor(shape=SIZES)
    logp = pm.logp(TensorNormal.dist(mu, **arguments), x)
    gradients = pytensor.function([mu, x], pt.grad(logp, [mu, x]), mode=PY)(MU, X)
    expected = np.linalg.solve(dense, (X - MU).ravel()).reshape(SIZES)
    assert_allclose(gradients[0], expected, rtol=1e-9)
    assert_allclose(gradients[1], -expected, rtol=1e-9)


def test_the_matrix_normal_distribution():
    mu, x = MU[0], X[0]
    expected = scipy.stats.matrix_normal(mu, B, C).logpdf(x)
    for rv in (TensorNormal.dist(mu, [B, C]), TensorNormal.dist(mu[None], [np.eye(1), B, C])):
        assert_allclose(pm.logp(rv, x.reshape(rv.type.shape)).eval(mode=PY), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(), (3, 1), (4,), (1, 1, 4), (5, 1, 1, 4)])
def test_means_that_broadcast(shape):
    mu = RNG.normal(size=shape)
    rv = TensorNormal.dist(mu, [A, B, C])
    full = np.broadcast_to(mu, np.broadcast_shapes(shape, SIZES))
    assert rv.type.ndim == full.ndim
    assert pm.draw(rv, random_seed=1, mode=PY).shape == full.shape
    value = RNG.normal(size=full.shape)
    expected = dense_logp(
        value.reshape(*full.shape[:-3], 24), full.reshape(*full.shape[:-3], 24), K
    )
    assert_allclose(pm.logp(rv, value).eval(mode=PY), expected, rtol=1e-10)


# Batches of everything at once: mu, factors, noise, size and value

BATCHES = {
    # batch shapes of mu, A, B, sigma, value; and size
    "nothing": ((), (), (), None, (), None),
    "values": ((), (), (), None, (5,), (5,)),
    "means": ((5,), (), (), None, (5,), None),
    "factors that broadcast": ((), (4, 1), (5,), None, (4, 5), None),
    "a shared factor": ((), (5,), (), None, (5,), None),
    "size over a batch": ((), (5,), (), None, (3, 5), (3, 5)),
    "noise": ((), (), (), (5,), (5,), None),
    "noise and factors": ((4, 1), (5,), (), (4, 1), (4, 5), None),
    "one value": ((), (5,), (1,), (4, 1), (), None),
}


def loop_of_dense(value, mu, a, b, sigma=0.0):
    """Return the log-density of each entry of a batch of vectors, from its dense covariance."""
    M = dense_kron(a, b) + np.multiply.outer(np.square(sigma), np.eye(6))
    delta = value - mu
    quadratic_form = (delta * np.linalg.solve(M, delta[..., None])[..., 0]).sum(axis=-1)
    return -0.5 * (quadratic_form + np.linalg.slogdet(M)[1] + 6 * np.log(2 * np.pi))


@pytest.mark.parametrize("grid", [True, False], ids=["grid", "vector"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_against_dense(name, grid):
    mu_batch, a_batch, b_batch, sigma_batch, value_batch, size = BATCHES[name]
    rng = np.random.default_rng(8)
    event = (2, 3) if grid else (6,)
    arrays = [
        rng.normal(size=(*value_batch, *event)),
        rng.normal(size=(*mu_batch, *event)),
        random_spd(rng, 2, batch=a_batch),
        random_spd(rng, 3, batch=b_batch),
    ]
    if sigma_batch is not None:
        arrays.append(rng.uniform(0.5, 1, size=sigma_batch))
    x, mu, a, b, *noise = inputs = [pt.as_tensor(array).type() for array in arrays]
    distribution = TensorNormal if grid else KroneckerMvNormal
    rv = distribution.dist(mu, [a, b], size=size, **dict(zip(["sigma"], noise, strict=False)))
    batch = np.broadcast_shapes(mu_batch, a_batch, b_batch, sigma_batch or ())
    draws = pm.compile(inputs[1:], rv, mode=PY, random_seed=1)(*arrays[1:])
    assert draws.shape == (*(batch if size is None else size), *event)

    batch = np.broadcast_shapes(batch, value_batch)
    weights = rng.normal(size=batch)
    logp = pm.logp(rv, x)
    gradients = pt.grad((weights * logp).sum(), inputs)
    logp_value, *gradient_values = pytensor.function(inputs, [logp, *gradients], mode=PY)(*arrays)

    def dense(value, mu, *others):
        vectors = [array.reshape(*array.shape[: -len(event)], 6) for array in (value, mu)]
        return loop_of_dense(*vectors, *others)

    assert_allclose(logp_value, np.broadcast_to(dense(*arrays), batch), rtol=1e-9)
    for i, gradient in enumerate(gradient_values):

        def weighted_sum(array, i=i):
            return (weights * dense(*arrays[:i], array, *arrays[i + 1 :])).sum()

        assert_allclose(gradient, finite_differences(weighted_sum, arrays[i]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("noise", "op"), [({}, Cholesky), ({"sigma": 0.5}, Eigh)])
def test_a_factor_that_a_batch_shares_is_decomposed_once(noise, op):
    a, b, x = pt.tensor(shape=(2, 2)), pt.tensor(shape=(5, 3, 3)), pt.tensor(shape=(5, 2, 3))
    logp = pm.logp(TensorNormal.dist(0, [a, b], **noise), x).sum()
    function = pytensor.function([a, b, x], [logp, *pt.grad(logp, [a, b, x])], mode=PY)
    nodes = [
        node
        for node in function.maker.fgraph.apply_nodes
        if isinstance(getattr(node.op, "core_op", node.op), op)
    ]
    assert sorted(node.outputs[-1].type.shape for node in nodes) == [(2, 2), (5, 3, 3)]


@pytest.mark.parametrize("noise", [{}, {"sigma": 0.5}])
def test_vectorizing(noise):
    a, mu = pt.tensor("a", shape=(2, 2)), pt.tensor("mu", shape=(2, 3))
    x = pt.tensor("x", shape=(2, 3))
    logp = pm.logp(TensorNormal.dist(mu, [a, B], **noise), x)
    batched = {a: random_spd(RNG, 2, batch=(5,)), x: RNG.normal(size=(5, 2, 3))}
    vectorized = vectorize_graph(logp, {var: pt.as_tensor(batch) for var, batch in batched.items()})
    expected = loop_of_dense(
        batched[x].reshape(5, 6), np.ones(6), batched[a], B, noise.get("sigma", 0.0)
    )
    assert_allclose(vectorized.eval({mu: np.ones((2, 3))}, mode=PY), expected, rtol=1e-9)


@pytest.mark.parametrize("size", [None, (3,)])
@pytest.mark.parametrize("noise", [{}, {"sigma": 0.5}])
def test_vectorizing_a_variable(noise, size):
    a, mu = pt.tensor("a", shape=(2, 2)), pt.tensor("mu", shape=(2, 3))
    rv = TensorNormal.dist(mu, [a, B], size=size, **noise)
    means, factors = 100 * RNG.normal(size=(4, 5, 2, 3)), random_spd(RNG, 2, batch=(5,))
    batch = vectorize_graph(rv, {mu: pt.as_tensor(means), a: pt.as_tensor(factors)})
    draws = pm.draw(batch, 1000, random_seed=1, mode=PY)
    assert draws.shape == (1000, 4, 5, *(size or ()), 2, 3)
    variance = np.diagonal(dense_kron(factors, B), axis1=-2, axis2=-1).reshape(5, 2, 3)
    variance = variance + noise.get("sigma", 0.0) ** 2
    means, variance = (means, variance) if size is None else (means[:, :, None], variance[:, None])
    assert np.abs((draws.mean(axis=0) - means) / np.sqrt(variance / 1000)).max() < 4.5
    assert_allclose(draws.var(axis=0), np.broadcast_to(variance, draws.shape[1:]), rtol=0.25)


def test_dims_reach_all_groups():
    coords = {"station": ["Malin Head", "Dublin"], "day": range(3)}
    with pm.Model(coords=coords) as model:
        field = TensorNormal("field", covs=[A, B], dims=("station", "day"))
        stack = TensorNormal("stack", field, [A, B], shape=(4, 2, 3))
        TensorNormal("y", field, [A, B], sigma=0.5, dims=("station", "day"), observed=X[:, :, 0])
    assert model.named_vars_to_dims["field"] == ("station", "day")
    assert stack.type.shape == (4, 2, 3)
    point = model.initial_point()
    assert point["field"].shape == (2, 3)
    with model:
        idata = pm.sample_prior_predictive(5, random_seed=1, compile_kwargs={"mode": PY})
        idata.update({"posterior": idata["prior"]})
        predictive = pm.sample_posterior_predictive(
            idata, random_seed=1, progressbar=False, compile_kwargs={"mode": PY}
        )
    for group, name in (("prior", "field"), ("prior_predictive", "y"), ("observed_data", "y")):
        assert idata[group][name].dims[-2:] == ("station", "day")
    assert predictive["posterior_predictive"]["y"].sel(station="Dublin", day=2).shape == (1, 5)


def test_no_array_with_n_x_n_entries():
    covs = [pt.tensor(f"K{i}", shape=(n, n)) for i, n in enumerate((6, 9, 10))]
    arrays = [random_spd(RNG, n) for n in (6, 9, 10)]
    x = RNG.normal(size=(6, 9, 10))
    for noise in ({}, {"sigma": 0.5}):
        rv = TensorNormal.dist(0, covs, **noise)
        logp = pm.logp(rv, x)
        outputs = [logp, *pt.grad(logp, covs), rv]
        assert largest_computed_size(covs, outputs, arrays) == 540


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (("station",), "A grid of 2 factors of sizes (2, 3) needs as many dims"),
        (("day", "station"), "Dim 'day' is of length 3, but factor 0 is 2 x 2"),
        (("station", "station"), "Factors 0 and 1 have the same dim 'station'"),
        (("day", "day"), "Factors 0 and 1 have the same dim 'day'"),
    ],
)
def test_errors_about_dims(dims, message):
    coords = {"station": range(2), "day": range(3)}
    with pm.Model(coords=coords), pytest.raises(ValueError, match=re.escape(message)):
        TensorNormal("y", covs=[A, B], dims=dims)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mu": np.zeros((3, 2))},
            "The last 2 dimensions of mu must be (2, 3), the sizes of the factors, or broadcast "
            "to it, got mu of shape (3, 2)",
        ),
        ({"shape": (6,)}, "must be (2, 3), the sizes of the factors, got (6,)"),
        ({"shape": (3, 2)}, "The factors come in the order of the axes."),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorNormal.dist(covs=[A, B], **arguments)


def test_errors_about_values():
    rv = TensorNormal.dist(covs=[A, B])
    with pytest.raises(ValueError, match="The last 2 dimensions of value must be"):
        pm.logp(rv, np.zeros(6))
    batched = TensorNormal.dist(np.zeros((5, 2, 3)), covs=[A, B])
    with pytest.raises(ValueError, match="doesn't broadcast against a variable of shape"):
        pm.logp(batched, np.zeros((4, 2, 3)))
