import re

import numpy as np
import pymc as pm
import pymc.dims as pmd
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pymc.distributions.transforms import ChainedTransform, Interval
from pymc.logprob.utils import ParameterValueError
from pymc.model.transform.conditioning import change_value_transforms
from pymc.util import UNSET
from pytensor.scalar.basic import Log
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from xarray import DataArray

import pymc_kron.dims as pkd
from pymc_kron import KroneckerMvNormal, TensorNormal
from pymc_kron.routines import AlongAxisOp
from pymc_kron.transforms import whiten
from tests.helpers import (
    PY,
    all_nodes,
    count_ops,
    dense_kron,
    finite_differences,
    largest_computed_size,
    random_spd,
)

RNG = np.random.default_rng(11)
SIZES = (2, 3)
A, B = (random_spd(RNG, n) for n in SIZES)
W, Q = np.linalg.eigh(A)
MU, X = RNG.normal(size=(2, *SIZES))
COUNTS = RNG.poisson(1, size=SIZES)
LAGS = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in SIZES]

# What describes A (x) B
FORMS = {
    "covs": {"covs": [A, B]},
    "chols": {"chols": [np.linalg.cholesky(A), np.linalg.cholesky(B)]},
    "negative chols": {"chols": [-np.linalg.cholesky(A), np.linalg.cholesky(B)]},
    "upper chols": {"chols": [np.linalg.cholesky(M).T for M in (A, B)], "lower": False},
    "taus": {"taus": [np.linalg.inv(A), np.linalg.inv(B)]},
    "evds": {"evds": [(W, Q), tuple(np.linalg.eigh(B))]},
    "each its own": {"covs": [None, B], "evds": [(W, Q), None]},
}
DISTRIBUTIONS = {"vector": KroneckerMvNormal, "grid": TensorNormal}


def covariances(amplitude, length_scale):
    return [
        amplitude**2 * pt.exp(-LAGS[0] / length_scale[0]),
        pt.exp(-LAGS[1] / length_scale[1]),
    ]


def hyperparameters():
    amplitude, level = pm.HalfNormal("amplitude"), pm.Normal("level")
    length_scale = pm.LogNormal("length_scale", shape=2)
    return level, covariances(amplitude, length_scale)


def latent_model(transform=whiten):
    with pm.Model() as model:
        level, covs = hyperparameters()
        field = TensorNormal("field", level, covs, transform=transform)
        pm.Poisson("y", pt.exp(field), observed=COUNTS)
    return model


def model_by_hand():
    with pm.Model() as model:
        level, (cov_0, cov_1) = hyperparameters()
        z = pm.Normal("z", shape=SIZES)
        colored = pt.linalg.cholesky(cov_0) @ z @ pt.linalg.cholesky(cov_1).T
        field = pm.Deterministic("field", level + colored)
        pm.Poisson("y", pt.exp(field), observed=COUNTS)
    return model


def random_point(model, seed=1):
    rng = np.random.default_rng(seed)
    return {
        name: value + 0.5 * rng.normal(size=np.shape(value))
        for name, value in model.initial_point().items()
    }


def by_hand_point(point):
    return {name.replace("field_whiten__", "z"): value for name, value in point.items()}


def counts(fgraph):
    logs = [node for node in all_nodes(fgraph) if isinstance(scalar_op(node), Log)]
    return count_ops(fgraph, Cholesky), count_ops(fgraph, SolveTriangular), len(logs)


def scalar_op(node):
    return getattr(node.op, "scalar_op", None)


def field_of(model, mode=PY):
    [field] = model.replace_rvs_by_values([model["field"]])
    return model.compile_fn(field, inputs=model.value_vars, mode=mode, on_unused_input="ignore")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_the_map_is_a_root_of_the_covariance(form, name):
    shape = SIZES if name == "grid" else (6,)
    rv = DISTRIBUTIONS[name].dist(MU.reshape(shape), **FORMS[form])
    transform, inputs = whiten.of(rv), rv.owner.inputs
    x, z = X.reshape(shape), pt.tensor("z", shape=shape)
    assert transform.forward(rv, *inputs).type.shape == shape
    back = transform.backward(transform.forward(x, *inputs), *inputs)
    assert_allclose(back.eval(mode=PY), x, rtol=1e-10)
    units = np.eye(6).reshape(6, *shape)
    columns = (transform.backward(pt.as_tensor(units), *inputs) - rv.owner.inputs[2]).eval(mode=PY)
    R = columns.reshape(6, 6).T
    K = dense_kron(A, B)
    assert_allclose(R @ R.T, K, rtol=1e-10, atol=1e-12)
    jacobian = transform.log_jac_det(z, *inputs)
    assert_allclose(jacobian.eval(mode=PY), np.linalg.slogdet(R)[1], rtol=1e-10)


@pytest.mark.parametrize("form", ["covs", "negative chols", "taus", "each its own"])
def test_log_density_is_that_of_the_field_with_the_jacobian(form):
    with pm.Model() as model:
        TensorNormal("field", MU, **FORMS[form], transform=whiten)
    point = random_point(model)
    x = field_of(model)(point).ravel()
    expected = pm.logp(pm.MvNormal.dist(MU.ravel(), dense_kron(A, B)), x).eval(mode=PY)
    logp = model.compile_logp(jacobian=False, mode=PY)(point)
    assert_allclose(logp, expected, rtol=1e-10)
    jacobian = 0.5 * np.linalg.slogdet(dense_kron(A, B))[1]
    assert_allclose(model.compile_logp(mode=PY)(point), expected + jacobian, rtol=1e-10)


@pytest.mark.parametrize(
    ("form", "jacobian"),
    [("covs", True), ("covs", False), ("chols", True), ("taus", True), ("evds", True)],
)
def test_gradient(form, jacobian):
    with pm.Model() as model:
        a, mu = pm.Normal("a", 1, 0.1), pm.Normal("mu")
        match form:
            case "covs":
                arguments = {"covs": [a * A, B]}
            case "chols":
                arguments = {"chols": [a * np.linalg.cholesky(A), np.linalg.cholesky(B)]}
            case "taus":
                arguments = {"taus": [a * A, B]}
            case "evds":
                arguments = {"evds": [(a * W, Q), np.linalg.eigh(B)]}
        field = TensorNormal("field", mu, **arguments, transform=whiten)
        pm.Normal("y", field**2, observed=X)
    point = {"a": np.array(1.2), "mu": np.array(0.3), "field_whiten__": RNG.normal(size=SIZES)}
    logp = model.compile_logp(jacobian=jacobian, mode=PY)
    gradient = model.compile_dlogp(jacobian=jacobian, mode=PY)(point)

    def at(flat):
        return logp({"a": flat[0], "mu": flat[1], "field_whiten__": flat[2:].reshape(SIZES)})

    flat = np.concatenate([np.ravel(value) for value in point.values()])
    assert_allclose(gradient, finite_differences(at, flat), rtol=1e-6, atol=1e-7)


def test_the_model_is_that_by_hand():
    model, by_hand = latent_model(), model_by_hand()
    point = random_point(model)
    same = by_hand_point(point)
    functions = []
    for compile_ in ("compile_logp", "compile_dlogp"):
        one, other = (getattr(m, compile_)(mode=PY) for m in (model, by_hand))
        assert_allclose(one(point), other(same), rtol=1e-9, atol=1e-12)
        # No solve, no determinant, and no factor is decomposed twice
        expected = counts(other.f.maker.fgraph)
        assert counts(one.f.maker.fgraph) == expected
        functions.append(expected)
    assert functions == [(2, 0, 0), (2, 4, 0)]
    assert_allclose(field_of(model)(point), field_of(by_hand)(same), rtol=1e-12)


def test_a_field_given_by_its_roots_takes_no_solve_at_all():
    with pm.Model() as model:
        chol, _, _ = pm.LKJCholeskyCov("chol", n=2, eta=2, sd_dist=pm.HalfNormal.dist(1))
        field = TensorNormal(
            "field", chols=[chol, None], evds=[None, np.linalg.eigh(B)], transform=whiten
        )
        pm.Poisson("y", pt.exp(field), observed=COUNTS)
    assert counts(model.compile_dlogp(mode=PY).f.maker.fgraph)[:2] == (0, 0)


# Batches of the mean, the first factor and the field
BATCHES = {
    "fields": ((), (), (5,)),
    "means": ((5,), (), None),
    "factors": ((), (5,), None),
    "means and factors": ((4, 1), (5,), None),
    "size over a batch": ((), (5,), (4, 5)),
}


@pytest.mark.parametrize(
    ("batch", "name"),
    [*((batch, "grid") for batch in BATCHES), ("means and factors", "vector")],
)
def test_batches(batch, name):
    mu_batch, a_batch, shape = BATCHES[batch]
    event = SIZES if name == "grid" else (6,)
    rng = np.random.default_rng(3)
    mu, a = rng.normal(size=(*mu_batch, *event)), random_spd(rng, 2, batch=a_batch)
    shape = np.broadcast_shapes(mu_batch, a_batch) if shape is None else shape
    models = []
    for transform in (whiten, UNSET):
        with pm.Model() as model:
            scale = pm.HalfNormal("scale", default_transform=None)
            DISTRIBUTIONS[name](
                "field", mu, [scale * a, B], shape=(*shape, *event), transform=transform
            )
        models.append(model)
    model, centred = models
    point = {"scale": np.array(1.3), "field_whiten__": rng.normal(size=(*shape, *event))}
    field = field_of(model)(point)
    [logp] = model.logp(vars=[model["field"]], sum=False)
    assert logp.type.ndim == len(shape)
    logp = model.compile_fn(logp, inputs=model.value_vars, mode=PY)
    [dense] = centred.logp(vars=[centred["field"]], sum=False)
    dense = centred.compile_fn(dense, inputs=centred.value_vars, mode=PY)
    jacobian = 0.5 * np.linalg.slogdet(dense_kron(1.3 * a, B))[1]
    expected = dense({"scale": point["scale"], "field": field}) + jacobian
    assert_allclose(logp(point), expected, rtol=1e-10)
    assert counts(logp.f.maker.fgraph)[1:] == (0, 0)


def test_a_chain_of_transforms_keeps_its_log_density():
    inner = KroneckerMvNormal.dist(MU.ravel(), [A, B])
    chain = ChainedTransform([whiten.of(inner), Interval(-20, 20)])
    with pm.Model() as model:
        KroneckerMvNormal("field", MU.ravel(), [A, B], transform=chain)
    point = random_point(model)
    x = field_of(model)(point)
    expected = pm.logp(pm.MvNormal.dist(MU.ravel(), dense_kron(A, B)), x).eval(mode=PY)
    assert_allclose(model.compile_logp(jacobian=False, mode=PY)(point), expected, rtol=1e-10)


@pytest.mark.parametrize("dims", [None, ("day", "station"), ("day", "group", "station")], ids=str)
def test_dims(dims):
    distances = DataArray(LAGS[0], dims=("station", "other_station"))
    cov_1 = DataArray(B, dims=("day", "other_day"))
    models = []
    for transform in (whiten, UNSET):
        coords = {"station": range(2), "day": range(3), "group": range(4)}
        with pm.Model(coords=coords) as model:
            length_scale = pmd.HalfNormal("length_scale", default_transform=None)
            level = pmd.Normal("level", dims="station")
            cov_0 = pmd.math.exp(-pmd.as_xtensor(distances) / length_scale)
            if dims is not None and "group" in dims:
                cov_0 = cov_0 * pmd.as_xtensor(DataArray([1.0, 2.0, 3.0, 4.0], dims="group"))
            field = pkd.KroneckerMvNormal(
                "field",
                level,
                [cov_0, cov_1],
                core_dims=[("station", "other_station"), ("day", "other_day")],
                dims=dims,
                transform=transform,
            )
            shape = [len(coords[dim]) for dim in field.type.dims]
            counts_there = DataArray(np.ones(shape), dims=field.type.dims)
            pmd.Poisson("y", pmd.math.exp(field), observed=counts_there)
        models.append(model)
    model, centred = models
    point = random_point(model)
    point["length_scale"] = np.array(1.3)
    x = field_of(model)(point)
    values = {"length_scale": point["length_scale"], "level": point["level"], "field": x}
    assert_allclose(
        model.compile_logp(jacobian=False, mode=PY)(point),
        centred.compile_logp(mode=PY)(values),
        rtol=1e-10,
    )
    logp, gradient = model.compile_logp(mode=PY), model.compile_dlogp(mode=PY)
    scales = [1.0, 2.0, 3.0, 4.0] if dims is not None and "group" in dims else [1.0]
    blocks = [dense_kron(scale * np.exp(-LAGS[0] / 1.3), B) for scale in scales]
    jacobian = 0.5 * sum(np.linalg.slogdet(block)[1] for block in blocks)
    assert_allclose(logp(point), centred.compile_logp(mode=PY)(values) + jacobian, rtol=1e-10)
    assert counts(logp.f.maker.fgraph) == (1, 0, 0)
    # Those of the derivative of one Cholesky factor
    assert counts(gradient.f.maker.fgraph) == (1, 2, 0)


@pytest.fixture(scope="module")
def named_model():
    coords = {"station": ["Malin Head", "Dublin"], "day": range(3)}
    with pm.Model(coords=coords) as model:
        level, covs = hyperparameters()
        field = TensorNormal("field", level, covs, dims=("station", "day"), transform=whiten)
        pm.Poisson("y", pt.exp(field), dims=("station", "day"), observed=COUNTS)
    return model


@pytest.mark.filterwarnings("ignore:The number of samples is too small")
def test_trace_and_predictions_hold_the_field(named_model):
    with named_model:
        trace = pm.sample(
            3,
            tune=3,
            chains=1,
            nuts_sampler="pymc",
            compute_convergence_checks=False,
            random_seed=1,
            progressbar=False,
            compile_kwargs={"mode": PY},
        )
        trace.update(pm.sample_prior_predictive(4, random_seed=1, compile_kwargs={"mode": PY}))
        predictive = pm.sample_posterior_predictive(
            trace,
            var_names=["field", "y"],
            sample_vars=["y"],
            random_seed=1,
            progressbar=False,
            compile_kwargs={"mode": PY},
        )
    assert trace["posterior"]["field"].dims == ("chain", "draw", "station", "day")
    assert trace["posterior"]["field"].shape == (1, 3, 2, 3)
    assert trace["prior"]["field"].sel(station="Dublin").shape == (1, 4, 3)
    assert predictive["posterior_predictive"]["y"].shape == (1, 3, 2, 3)
    assert named_model.named_vars_to_dims["field"] == ("station", "day")


def test_initial_values_are_those_of_the_field():
    initial = X.ravel()
    with pm.Model() as model:
        KroneckerMvNormal("field", MU.ravel(), [A, B], initval=initial, transform=whiten)
        KroneckerMvNormal("default", MU.ravel(), [A, B], transform=whiten)
    point = model.initial_point()
    R = dense_kron(np.linalg.cholesky(A), np.linalg.cholesky(B))
    expected = np.linalg.solve(R, initial - MU.ravel())
    assert_allclose(point["field_whiten__"], expected, rtol=1e-10)
    assert_array_equal(point["default_whiten__"], np.zeros(6))


def test_transforms_of_a_finished_model_can_be_changed():
    centred, model = latent_model(transform=UNSET), latent_model()
    changed = change_value_transforms(centred, {"field": whiten.of(centred["field"])})
    point = random_point(model)
    one, other = (m.compile_logp(mode=PY) for m in (changed, model))
    assert_allclose(one(point), other(point), rtol=1e-12)
    back = change_value_transforms(changed, {"field": None})
    assert set(back.initial_point()) == set(centred.initial_point())


def test_a_covariance_that_is_not_positive_definite():
    with pm.Model() as model:
        scale = pm.Flat("scale")
        KroneckerMvNormal("field", 0, chols=[scale * np.eye(2), B], transform=whiten)
    point = {"scale": np.array(0.0), "field_whiten__": np.ones(6)}
    assert model.compile_logp(mode=PY)(point) == -np.inf
    rv = model["field"]
    transformed = model.logp(vars=[rv])
    with pytest.raises(ParameterValueError, match="posdef covariance"):
        transformed.eval(
            {model.value_vars[0]: point["scale"], model.value_vars[1]: point["field_whiten__"]},
            mode=PY,
        )


def test_no_array_with_n_x_n_entries():
    sizes = (6, 9, 10)
    with pm.Model() as model:
        scale = pm.HalfNormal("scale", shape=3)
        lags = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in sizes]
        covs = [pt.exp(-lag / scale[i]) for i, lag in enumerate(lags)]
        field = TensorNormal("field", 0, covs, transform=whiten)
        pm.Normal("y", field, observed=np.ones(sizes))
    outputs = [model.logp(), model.dlogp()]
    point = random_point(model)
    values = [point[var.name] for var in model.value_vars]
    assert largest_computed_size(model.value_vars, outputs, values) <= 543


def test_on_numba():
    model = latent_model()
    point = random_point(model)
    function = model.compile_dlogp(mode="NUMBA")
    expected = model_by_hand().compile_dlogp(mode=PY)(by_hand_point(point))
    assert_allclose(function(point), expected, rtol=1e-9)
    assert counts(function.f.maker.fgraph)[:2] == (2, 4)
    assert count_ops(function.f.maker.fgraph, AlongAxisOp) == 0


def test_on_jax():
    jax = pytest.importorskip("jax")
    from pymc.sampling.jax import get_jaxified_logp

    model = latent_model()
    point = random_point(model)
    logp = get_jaxified_logp(model)
    gradient = jax.grad(logp)(list(point.values()))
    expected = model_by_hand().compile_dlogp(mode=PY)(by_hand_point(point))
    assert_allclose(np.concatenate([np.ravel(part) for part in gradient]), expected, rtol=1e-9)
    assert "triangular_solve" not in str(jax.make_jaxpr(logp)(list(point.values())))


@pytest.mark.parametrize(
    "noise", [{"sigma": 0.5}, {"noise_covs": [np.ones(2), None]}], ids=["sigma", "noise_covs"]
)
def test_noise_is_refused(noise):
    message = "whiten is for fields without noise, got one with sigma or noise_covs"
    with pm.Model(), pytest.raises(NotImplementedError, match=message):
        KroneckerMvNormal("field", 0, [A, B], **noise, transform=whiten)
    with pytest.raises(NotImplementedError, match=message):
        whiten.of(TensorNormal.dist(0, [A, B], **noise))


def test_noise_with_dims_is_refused():
    covs = [DataArray(M, dims=(f"{dim}", f"{dim}2")) for M, dim in ((A, "a"), (B, "b"))]
    with (
        pm.Model(coords={"a": range(2), "b": range(3)}),
        pytest.raises(NotImplementedError, match="whiten is for fields without noise"),
    ):
        pkd.KroneckerMvNormal(
            "field", 0, covs, sigma=0.5, core_dims=[("a", "a2"), ("b", "b2")], transform=whiten
        )


def test_observed_fields_are_refused():
    message = "whiten is for latent fields, got one with observed data"
    covs = [DataArray(M, dims=(f"{dim}", f"{dim}2")) for M, dim in ((A, "a"), (B, "b"))]
    with pm.Model(coords={"a": range(2), "b": range(3)}):
        with pytest.raises(ValueError, match=message):
            TensorNormal("y", 0, [A, B], observed=X, transform=whiten)
        with pytest.raises(ValueError, match=message):
            pkd.KroneckerMvNormal(
                "y",
                0,
                covs,
                core_dims=[("a", "a2"), ("b", "b2")],
                observed=DataArray(X, dims=("a", "b")),
                transform=whiten,
            )


@pytest.mark.parametrize("distribution", [pm.Normal, pm.MvNormal], ids=["Normal", "MvNormal"])
def test_other_distributions_are_refused(distribution):
    message = "whiten is for variables of KroneckerMvNormal and TensorNormal.*got a M?v?NormalRV"
    with pm.Model(), pytest.raises(TypeError, match=message):
        distribution("x", np.zeros(6), np.eye(6), transform=whiten)


def test_a_transform_without_its_variable_is_refused():
    rv = KroneckerMvNormal.dist(0, [A, B])
    rv.name = "x"
    message = re.escape("transform=whiten where x is created, or here as whiten.of(x)")
    with pm.Model() as model, pytest.raises(TypeError, match=message):
        model.register_rv(rv, name="x", transform=whiten)
    changed = change_value_transforms(latent_model(transform=UNSET), {"field": whiten})
    with pytest.raises(TypeError, match="got one that isn't known"):
        changed.logp()
