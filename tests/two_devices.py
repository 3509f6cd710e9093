"""One grid on two devices, in a process of its own: `tests.test_sharding` starts it.

JAX has as many CPU devices as it is told before it starts, by ``XLA_FLAGS``.
"""

import re

import jax
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.sampling.jax import get_jaxified_graph, get_jaxified_logp

import pymc_kron as pk
from pymc_kron.sharding import sharded_logp
from pymc_kron.transforms import whiten
from tests.helpers import RTOL

# An odd number of cells on the axes that aren't split
SIZES = 8, 5, 13
N = 8 * 5 * 13
LAGS = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float) for n in SIZES]
RNG = np.random.default_rng(0)
Y = RNG.normal(size=SIZES)
COUNTS = RNG.poisson(2, size=SIZES)
COVARIATES = RNG.normal(size=(*SIZES, 2))


def factors():
    length_scale = pm.LogNormal("length_scale", shape=3)
    return [pt.exp(-lag / length_scale[i]) for i, lag in enumerate(LAGS)]


def grid_with_means():
    level = pm.Normal("level", shape=8)
    slope = pm.Normal("slope", shape=2)
    mu = level[:, None, None] + (COVARIATES * slope).sum(axis=-1)
    pk.TensorNormal("y", mu, factors(), observed=Y)


def noise():
    y = pm.Data("cells", Y.ravel())
    sigma = pm.HalfNormal("sigma")
    pk.KroneckerMvNormal("y", pm.Normal("mu"), factors(), sigma=sigma, observed=y)


def noise_along_axes():
    covs = factors()
    pk.TensorNormal("y", 0, covs, noise_covs=[pt.eye(8), covs[1] ** 2, None], observed=Y)


def precisions():
    pk.KroneckerMvNormal("y", pm.Normal("mu"), taus=factors(), observed=Y.ravel())


def eigenvectors():
    scale = pm.LogNormal("scale")
    evds = [(scale + np.arange(len(lag)), np.linalg.eigh(lag)[1]) for lag in LAGS]
    pk.KroneckerMvNormal("y", pm.Normal("mu"), evds=evds, observed=Y.ravel())


def latent():
    field = pk.TensorNormal("field", pm.Normal("mu"), factors())
    pm.Poisson("counts", pt.exp(field), observed=COUNTS)


def whitened():
    field = pk.TensorNormal("field", pm.Normal("mu"), factors(), transform=whiten)
    pm.Poisson("counts", pt.exp(field), observed=COUNTS)


def replicates():
    y = np.stack([Y.ravel(), 2 * Y.ravel()])
    pk.KroneckerMvNormal("y", pm.Normal("mu", shape=(2, 1)), factors(), observed=y)


def plain_code():
    covs = factors()
    cov = pt.linalg.kron(covs[0], pt.linalg.kron(covs[1], covs[2])) + 0.3 * pt.eye(N)
    pm.MvNormal("y", pt.full(N, pm.Normal("mu")), cov, observed=Y.ravel())


def another_grid():
    covs = factors()
    pk.TensorNormal("y", 0, covs, observed=Y)
    pk.TensorNormal("rows", 0, covs[1:], observed=Y[0])


CASES = [
    grid_with_means,
    noise,
    whitened,
    *(
        pytest.param(case, marks=pytest.mark.nightly)
        for case in [
            noise_along_axes,
            precisions,
            eigenvectors,
            latent,
            replicates,
            plain_code,
            another_grid,
        ]
    ),
]


def build(case):
    with pm.Model() as model:
        case()
    return model


def point_of(model):
    rng = np.random.default_rng(1)
    return {
        name: np.asarray(value + 0.3 * rng.normal(size=np.shape(value)))
        for name, value in model.initial_point().items()
    }


def compile_for(model, n_devices):
    logp, data = sharded_logp(model, jax.devices()[:n_devices])
    program = jax.jit(jax.value_and_grad(logp)).lower(point_of(model), data).compile()
    return program, data


def largest_array(program):
    """Return the number of entries of the largest array in the program of one device."""
    shapes = re.findall(r"\w\[([\d,]+)\]", program.as_text())
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_one_device_and_parts_are_halves(case):
    model = build(case)
    point = point_of(model)
    program, data = compile_for(model, 2)
    value, gradient = program(point, data)

    on_one_device = jax.jit(jax.value_and_grad(get_jaxified_logp(model)))
    expected, gradients = on_one_device([point[value.name] for value in model.value_vars])
    assert_allclose(value, expected, rtol=RTOL["float64"])
    for variable, expected in zip(model.value_vars, gradients, strict=True):
        assert_allclose(gradient[variable.name], expected, rtol=RTOL["float64"], atol=1e-10)

    # With the cells that fill up an odd number of columns
    assert largest_array(program) <= 264 / 520 * max(array.size for array in data)
    for array in (*data, *(gradient[name] for name in {"field", "field_whiten__"} & set(gradient))):
        assert array.addressable_shards[0].data.size == array.size / 2


def test_outside_the_support_it_is_minus_infinity():
    with pm.Model() as model:
        rho = pm.Uniform("rho", -2, 2, default_transform=None)
        K = pt.eye(4) + rho * (1 - pt.eye(4))
        pk.KroneckerMvNormal("y", 0, [K, np.eye(3)], observed=np.ones(12))
    logp, data = sharded_logp(model)
    assert np.isfinite(logp({"rho": 0.5}, data))
    assert logp({"rho": 1.5}, data) == -np.inf


@pytest.mark.nightly
def test_jax_alone_gathers_the_grid():
    """Why there is a module: placing the data isn't enough."""
    from jax.sharding import NamedSharding, PartitionSpec
    from pytensor.graph.replace import clone_replace

    model = build(grid_with_means)
    y = pt.tensor("y", shape=SIZES)
    logp = clone_replace([model.logp()], {model["y"]: y, model.rvs_to_values[model["y"]]: y})
    function = get_jaxified_graph(inputs=[*model.value_vars, y], outputs=logp)
    mesh = jax.make_mesh((2,), ("cells",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(Y, NamedSharding(mesh, PartitionSpec("cells")))
    gradient = jax.jit(jax.grad(lambda point, y: function(*point, y)[0]))
    point = point_of(model)
    program = gradient.lower([point[value.name] for value in model.value_vars], split).compile()
    assert "all-gather" in program.as_text()
    assert largest_array(program) >= N


def test_models_that_cannot_be_split():
    def grid(y, **kwargs):
        with pm.Model() as model:
            pk.TensorNormal("y", 0, [np.eye(n) for n in y.shape], observed=y, **kwargs)
        return model

    with pytest.raises(ValueError, match="a grid of 3 x 4 cells and 2 devices"):
        sharded_logp(grid(np.ones((3, 4))))
    holes = np.ones((4, 3))
    holes[1, 2] = np.nan
    with pytest.raises(NotImplementedError, match="missing cells"):
        sharded_logp(grid(holes, marginalize_missing=True))
    with pytest.warns(pm.exceptions.ImputationWarning):
        imputed = grid(holes)
    with pytest.raises(NotImplementedError, match="missing cells"):
        sharded_logp(imputed)
    with pm.Model() as batch:
        K = np.stack([np.eye(4), 2 * np.eye(4)])
        pk.TensorNormal("y", 0, [K, np.eye(3)], observed=np.ones((2, 4, 3)))
    with pytest.raises(NotImplementedError, match="in a batch"):
        sharded_logp(batch)
    with pm.Model() as no_grid:
        pm.Normal("x")
    with pytest.raises(ValueError, match="must have a variable with a Kronecker"):
        sharded_logp(no_grid)
