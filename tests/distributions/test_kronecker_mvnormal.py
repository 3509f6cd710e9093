import pickle
import re
from types import MappingProxyType

import cloudpickle
import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from pymc.distributions.moments import mean
from pymc.distributions.shape_utils import change_dist_size
from pymc.logprob.utils import ParameterValueError
from pymc.testing import (
    BaseTestDistributionRandom,
    Domain,
    assert_support_point_is_expected,
    check_logp,
)
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.inverse import MatrixInverse
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular

from pymc_kron import KroneckerMvNormal
from pymc_kron.factors import factors_of
from pymc_kron.kronecker_logp import KroneckerLogp, dense_logp
from tests.helpers import (
    PY,
    RTOL,
    compile_py,
    count_ops,
    dense_kron,
    finite_differences,
    has_kron,
    largest_computed_size,
    largest_jax_size,
    largest_static_size,
    random_spd,
)

SIZES = [(5,), (3, 2), (2, 4, 3)]
FORMS = {
    "covs": ("cov", "cov", "cov"),
    "chols": ("chol", "chol", "chol"),
    "taus": ("tau", "tau", "tau"),
    "mixture": ("tau", "cov", "chol"),
}
PARAMETERS = {
    "cov": lambda cov: cov,
    "chol": np.linalg.cholesky,
    "tau": np.linalg.inv,
}


def covs_chols_taus(forms, factors):
    """Return the three lists of arguments, with None in the gaps."""
    return {
        f"{kind}s": [
            factor if form == kind else None for form, factor in zip(forms, factors, strict=True)
        ]
        for kind in PARAMETERS
        if kind in forms
    }


def case(sizes, forms_name, *, batches=None, dtype="float64", seed=17):
    """Return forms, parameters of the factors, and the dense covariance."""
    rng = np.random.default_rng(seed)
    batches = batches or [()] * len(sizes)
    covs = [
        random_spd(rng, n, batch=batch, dtype=dtype)
        for n, batch in zip(sizes, batches, strict=True)
    ]
    forms = FORMS[forms_name][: len(sizes)]
    parameters = [PARAMETERS[form](cov) for form, cov in zip(forms, covs, strict=True)]
    return forms, parameters, dense_kron(*covs)


def dense_logp_and_gradient(value, mu, K):
    """Return log-density and its gradient in value, mu and K, by dense NumPy."""
    alpha = np.linalg.solve(K, value - mu)
    logp = scipy.stats.multivariate_normal(mu, K).logpdf(value)
    return logp, -alpha, alpha, (np.outer(alpha, alpha) - np.linalg.inv(K)) / 2


@pytest.mark.parametrize("forms_name", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dense_and_rewritten_logp_agree(sizes, forms_name):
    forms, arrays, K = case(sizes, forms_name)
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    value, mu = pt.dvector("value"), pt.dvector("mu")
    inputs = [value, mu, *factors]
    dense = dense_logp(value - mu, factors_of(forms, factors))
    rewritten, _ = inline_ofg_node(KroneckerLogp(forms=tuple(forms))(value - mu, *factors)[0].owner)

    # The graph that a reader checks by eye, and the one that is computed
    assert has_kron(FunctionGraph(inputs, [dense]))
    assert not has_kron(FunctionGraph(inputs, [rewritten]))
    # A precision is factorised and not inverted, a Cholesky factor is used as it is
    compiled = compile_py(inputs, rewritten).maker.fgraph
    assert count_ops(compiled, MatrixInverse) == 0
    assert count_ops(compiled, SolveTriangular) == len(sizes) - forms.count("tau")
    assert count_ops(compiled, Cholesky) == len(sizes) - forms.count("chol")

    rng = np.random.default_rng(1)
    x, m = rng.normal(size=(2, len(K)))
    expected = scipy.stats.multivariate_normal(m, K).logpdf(x)
    # PyTensor's Python linker computes the reciprocal that det_of_inv leaves in single precision
    dense_mode = PY.excluding("kron", "det_of_inv")
    without_bundle = compile_py(inputs, dense, mode=dense_mode)(x, m, *arrays)
    assert_allclose(without_bundle, expected, rtol=1e-10)
    assert_allclose(compile_py(inputs, rewritten)(x, m, *arrays), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("forms_name", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logp_and_gradient_against_dense(sizes, forms_name, dtype):
    forms, arrays, K = case(sizes, forms_name, dtype=dtype)
    factors = [pt.tensor(f"A{i}", shape=array.shape, dtype=dtype) for i, array in enumerate(arrays)]
    value, mu = pt.vector("value", dtype=dtype), pt.vector("mu", dtype=dtype)
    rng = np.random.default_rng(1)
    x, m = rng.normal(size=(2, len(K))).astype(dtype)
    with pytensor.config.change_flags(floatX=dtype):
        logp = pm.logp(KroneckerMvNormal.dist(mu, **covs_chols_taus(forms, factors)), value)
        inputs = [value, mu, *factors]
        function = compile_py(inputs, [logp, *pt.grad(logp, inputs)])
    result, d_value, d_mu, *d_factors = function(x, m, *arrays)
    assert result.dtype == dtype

    expected, dense_d_value, dense_d_mu, dense_d_K = dense_logp_and_gradient(x, m, K)
    rtol = RTOL[dtype]
    assert_allclose(result, expected, rtol=rtol)
    assert_allclose(d_value, dense_d_value, rtol=rtol, atol=rtol)
    assert_allclose(d_mu, dense_d_mu, rtol=rtol, atol=rtol)

    # The directional derivative along a symmetric (or triangular) change of each factor, from
    # the dense gradient and dK = K_1 (x) ... (x) dK_i (x) ...
    for i, (form, array, d_factor) in enumerate(zip(forms, arrays, d_factors, strict=True)):
        direction = rng.normal(size=array.shape)
        direction = np.tril(direction) if form == "chol" else direction + direction.T
        covs = [_covariance(form, array) for form, array in zip(forms, arrays, strict=True)]
        covs[i] = _d_covariance(form, array, direction)
        expected = (dense_d_K * dense_kron(*covs)).sum()
        assert_allclose((d_factor * direction).sum(), expected, rtol=10 * rtol, atol=rtol)


def _covariance(form, array):
    match form:
        case "cov":
            return array
        case "chol":
            return array @ array.T
        case "tau":
            return np.linalg.inv(array)


def _d_covariance(form, array, direction):
    match form:
        case "cov":
            return direction
        case "chol":
            return direction @ array.T + array @ direction.T
        case "tau":
            return -np.linalg.inv(array) @ direction @ np.linalg.inv(array)


@pytest.mark.parametrize("forms_name", FORMS)
def test_gradient_against_finite_differences(forms_name):
    forms, arrays, _ = case((3, 2, 2), forms_name)
    scale = pt.dvector("scale")
    x = np.random.default_rng(1).normal(size=12)

    def logp_of(scale):
        # A smooth path through symmetric factors, so that every entry of a factor takes part
        factors = [array * scale[i] for i, array in enumerate(arrays)]
        factors[1] = factors[1] + scale[3] * np.eye(2)
        rv = KroneckerMvNormal.dist(pt.sin(scale[0]), **covs_chols_taus(forms, factors))
        return pm.logp(rv, x)

    logp = logp_of(scale)
    point = np.array([0.9, 1.2, 1.1, 0.3])
    gradient = compile_py([scale], pt.grad(logp, scale))(point)
    value = compile_py([scale], logp)
    assert_allclose(gradient, finite_differences(value, point), rtol=1e-6)


BATCHES = {
    "stack of values": ((4,), (), [(), ()], None),
    "batch of means": ((), (4,), [(), ()], None),
    "values against means": ((4,), (3, 1), [(), ()], None),
    "batch of factors": ((), (), [(4,), ()], None),
    "stack with a batch of factors": ((5, 4), (), [(4,), ()], None),
    "factors that broadcast": ((3, 4), (), [(3, 1), (4,)], None),
    "scalar mean": ((2,), None, [(), ()], None),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("forms_name", ["covs", "mixture"])
def test_batches_against_a_loop_of_dense(forms_name, name):
    value_batch, mu_batch, factor_batches, _ = BATCHES[name]
    forms, arrays, K = case((3, 4), forms_name, batches=factor_batches)
    rng = np.random.default_rng(1)
    mu = np.float64(0.3) if mu_batch is None else rng.normal(size=(*mu_batch, 12))
    batch_shape = np.broadcast_shapes(value_batch, np.shape(mu)[:-1], K.shape[:-2])
    value = rng.normal(size=(*value_batch, 12))
    rv = KroneckerMvNormal.dist(mu, **covs_chols_taus(forms, arrays))
    assert rv.type.shape == (*np.broadcast_shapes(np.shape(mu)[:-1], K.shape[:-2]), 12)
    logp = pm.logp(rv, value).eval(mode=PY)
    assert logp.shape == batch_shape
    values = np.broadcast_to(value, (*batch_shape, 12))
    means = np.broadcast_to(mu, (*batch_shape, 12))
    covs = np.broadcast_to(K, (*batch_shape, 12, 12))
    for index in np.ndindex(batch_shape):
        expected = scipy.stats.multivariate_normal(means[index], covs[index]).logpdf(values[index])
        assert_allclose(logp[index], expected, rtol=1e-10)


def test_a_stack_of_observations_takes_one_solve_a_factor():
    factors = [pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(4, 4))]
    value = pt.tensor("value", shape=(1000, 12))
    logp = pm.logp(KroneckerMvNormal.dist(0, factors), value)
    function = compile_py([*factors, value], logp)
    solves = [n for n in function.maker.fgraph.apply_nodes if isinstance(n.op, SolveTriangular)]
    assert [solve.inputs[1].type.ndim for solve in solves] == [2, 2]


class TwoFactors:
    """A distribution of two named covariances, as PyMC's test helpers want them."""

    @staticmethod
    def dist(mu, cov_space, cov_time, **kwargs):
        return KroneckerMvNormal.dist(mu, [cov_space, cov_time], **kwargs)


def test_logp_by_the_helper_of_pymc():
    rng = np.random.default_rng(2)

    def matrices(n):
        return Domain([random_spd(rng, n) for _ in range(3)], edges=(None, None))

    def vectors(n):
        return Domain(rng.normal(size=(3, n)), edges=(None, None))

    check_logp(
        TwoFactors,
        vectors(6),
        {"mu": vectors(6), "cov_space": matrices(3), "cov_time": matrices(2)},
        lambda value, mu, cov_space, cov_time: scipy.stats.multivariate_normal(
            mu, np.kron(cov_space, cov_time)
        ).logpdf(value),
    )


class TestRandom(BaseTestDistributionRandom):
    """Sizes and shapes, by the helper of PyMC."""

    pymc_dist = KroneckerMvNormal
    pymc_dist_params = MappingProxyType(
        {"mu": np.arange(6.0), "covs": [np.eye(2) + 0.5, np.eye(3) + 0.2]}
    )
    expected_rv_op_params = MappingProxyType({})
    sizes_to_check = (None, 1, (1,), 4, (3, 2))
    sizes_expected = ((6,), (1, 6), (1, 6), (4, 6), (3, 2, 6))
    checks_to_run = ("check_rv_size",)


@pytest.mark.parametrize("forms_name", FORMS)
@pytest.mark.parametrize("sizes", [(2, 3), (2, 1, 3)], ids=str)
def test_mean_and_covariance_of_draws(sizes, forms_name):
    forms, arrays, K = case(sizes, forms_name)
    mu = np.arange(6.0)
    n = 40_000
    rv = KroneckerMvNormal.dist(mu, **covs_chols_taus(forms, arrays), size=n)
    draws = pm.draw(rv, random_seed=3, mode=PY)
    assert draws.shape == (n, 6)
    # Standard errors of a mean and of a covariance of Gaussians
    assert_allclose(draws.mean(axis=0), mu, atol=4.5 * np.sqrt(K.diagonal().max() / n))
    variances = np.outer(K.diagonal(), K.diagonal())
    errors = np.abs(np.cov(draws.T) - K) / np.sqrt((K**2 + variances) / n)
    assert errors.max() < 4.5


@pytest.mark.parametrize("size", [None, (5,), (2, 5)])
def test_batched_draws(size):
    _, arrays, K = case((2, 3), "covs", batches=[(5,), ()])
    rv = KroneckerMvNormal.dist(np.zeros(6), arrays, size=size)
    draws = pm.draw(rv, 4000, random_seed=3, mode=PY)
    assert draws.shape == (4000, *(size or (5,)), 6)
    for i in range(5):
        entry = draws[..., i, :].reshape((-1, 6))
        variances = np.outer(K[i].diagonal(), K[i].diagonal())
        errors = np.abs(np.cov(entry.T) - K[i]) / np.sqrt((K[i] ** 2 + variances) / len(entry))
        assert errors.max() < 4.5


def test_upper_cholesky_factors():
    _, chols, K = case((2, 3), "chols")
    x = np.arange(6.0)
    upper = KroneckerMvNormal.dist(chols=[chol.T for chol in chols], lower=False)
    expected = scipy.stats.multivariate_normal(np.zeros(6), K).logpdf(x)
    assert_allclose(pm.logp(upper, x).eval(mode=PY), expected, rtol=1e-10)
    lower = KroneckerMvNormal.dist(chols=chols)
    draws = [pm.draw(rv, random_seed=4, mode=PY) for rv in (lower, upper)]
    assert_allclose(*draws)


def test_integers_are_cast():
    rv = KroneckerMvNormal.dist(0, [2 * np.eye(2, dtype=int), [[2, 1], [1, 2]]])
    K = np.kron(2 * np.eye(2), [[2, 1], [1, 2]])
    x = np.arange(4.0)
    expected = scipy.stats.multivariate_normal(np.zeros(4), K).logpdf(x)
    assert_allclose(pm.logp(rv, x).eval(mode=PY), expected, rtol=1e-10)
    assert pm.draw(rv, random_seed=1, mode=PY).dtype == "float64"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_support_point_and_mean(sizes):
    _, covs, K = case(sizes, "covs")
    mu = np.arange(float(len(K)))
    with pm.Model() as model:
        KroneckerMvNormal("x", mu, covs, size=(2,))
    assert_support_point_is_expected(model, np.broadcast_to(mu, (2, len(K))))
    rv = KroneckerMvNormal.dist(0.5, covs, size=3)
    assert_allclose(mean(rv).eval(mode=PY), np.full((3, len(K)), 0.5))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "There are no factors: pass their covariances (covs)"),
        ({"covs": []}, ValueError, "There are no factors"),
        (
            {"covs": [np.eye(2), np.eye(3)], "taus": [np.eye(2), None]},
            ValueError,
            "Factor 0 needs exactly one of covs, chols, taus and evds, got covs[0] and taus[0]",
        ),
        (
            {"covs": [np.eye(2), None], "taus": [None, None]},
            ValueError,
            "Factor 1 needs exactly one of covs, chols, taus and evds, got none",
        ),
        (
            {"covs": [np.eye(2), None], "taus": [None, np.eye(2), np.eye(3)]},
            ValueError,
            "one entry a factor each, with None where another list describes the factor, "
            "got len(covs) = 2, len(taus) = 3",
        ),
        ({"covs": np.eye(6)}, TypeError, "got a single ndarray of shape (6, 6)"),
        ({"chols": pt.eye(6)}, TypeError, "chols must be a list or tuple"),
        (
            {"covs": [np.eye(2), np.ones(3)]},
            ValueError,
            "covs[1] must be a square matrix of shape (n, n), or a batch of them of shape "
            "(..., n, n), got shape (3,)",
        ),
        ({"taus": [np.ones((2, 3))]}, ValueError, "taus[0] must be a square matrix"),
        ({"taus": [np.ones((4, 2, 3))]}, ValueError, "got shape (4, 2, 3)"),
        ({"covs": [1j * np.eye(2)]}, ValueError, "covs[0] must be real, got dtype complex128"),
        (
            {"mu": np.zeros(7), "covs": [np.eye(2), np.eye(3)]},
            ValueError,
            "The last dimension of mu must be 1 or N = 2 * 3 = 6, the number of cells of the "
            "grid, got mu of shape (7,)",
        ),
        (
            {"covs": [np.eye(2), np.eye(3)], "shape": (5, 7)},
            ValueError,
            "must be N = 2 * 3 = 6, the number of cells of the grid, got (5, 7)",
        ),
        ({"mu": 1j, "covs": [np.eye(2)]}, ValueError, "mu must be real, got dtype complex128"),
        ({"covs": [np.eye(2)], "shape": np.array([3, 2])}, ValueError, "The `shape` parameter"),
        ({"covs": [np.eye(2)], "shape": ()}, ValueError, "must be N = 2, the number of cells"),
        ({"covs": [np.eye(2)], "shape": 3}, ValueError, "must be N = 2, the number of cells"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        KroneckerMvNormal.dist(**kwargs)


def test_values_that_do_not_fit():
    rv = KroneckerMvNormal.dist(0, [np.eye(2), np.eye(3)], size=(4,))
    with pytest.raises(ValueError, match=r"value must be N = 2 \* 3 = 6, .* shape \(4, 5\)"):
        pm.logp(rv, np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"shape \(3, 6\) doesn't broadcast .* shape \(4, 6\)"):
        pm.logp(rv, np.zeros((3, 6)))


def test_factors_that_are_data():
    with pm.Model():
        cov = pm.Data("cov", np.eye(2))
        with pytest.raises(ValueError, match=r"must be N = 2 \* 3 = 6, .* got \(7,\)"):
            KroneckerMvNormal("y", 0, [cov, np.eye(3)], observed=np.zeros(7))
        y = KroneckerMvNormal("y", 0, [cov, np.eye(3)])
        pm.set_data({"cov": np.eye(4)})
        assert pm.draw(y, random_seed=1, mode=PY).shape == (12,)


@pytest.mark.parametrize("size", [None, (4,)])
@pytest.mark.parametrize(
    ("mu_batch", "factor_batch"), [((4,), ()), ((), (4,)), ((1,), (4,))], ids=str
)
def test_resizing(mu_batch, factor_batch, size):
    _, covs, _ = case((2, 3), "covs", batches=[factor_batch, ()])
    rv = KroneckerMvNormal.dist(np.zeros((*mu_batch, 6)), covs, size=size)
    for expand, shape in ((True, (3, 4, 6)), (False, (4, 6))):
        new_size = (3,) if expand else (4,)
        resized = change_dist_size(rv, new_size, expand=expand)
        assert pm.draw(resized, random_seed=1, mode=PY).shape == shape


def test_dtype():
    rv = KroneckerMvNormal.dist(0, [np.eye(2), np.eye(3)], dtype="float32")
    assert rv.type.dtype == "float32"
    assert change_dist_size(rv, (2,)).type.dtype == "float32"


def test_a_chol_with_a_negative_diagonal_is_a_root_of_the_same_covariance():
    L, B = np.array([[1.3, 0.0], [0.4, -0.9]]), np.eye(3) + 0.2
    rv = KroneckerMvNormal.dist(0, [None, B], chols=[L, None])
    x = np.arange(6.0)
    expected = scipy.stats.multivariate_normal(np.zeros(6), np.kron(L @ L.T, B)).logpdf(x)
    assert_allclose(pm.logp(rv, x).eval(mode=PY), expected, rtol=1e-10)


def test_errors_in_a_model():
    covs = [np.eye(2), np.eye(3)]
    message = re.escape("must be N = 2 * 3 = 6, the number of cells of the grid, got (7,)")
    with pm.Model(coords={"cell": range(7)}) as model:
        data = pm.Data("data", np.zeros(7))
        with pytest.raises(ValueError, match=message):
            KroneckerMvNormal("y", 0, covs, observed=np.zeros(7))
        with pytest.raises(ValueError, match=message):
            KroneckerMvNormal("y", 0, covs, observed=data)
        with pytest.raises(ValueError, match=message):
            KroneckerMvNormal("y", 0, covs, dims="cell")
        # The grid itself instead of its cells
        with pytest.raises(ValueError, match=re.escape("observed=grid.ravel()")):
            KroneckerMvNormal("y", 0, covs, observed=np.zeros((2, 3)))
    assert not model.basic_RVs


@pytest.mark.parametrize("forms_name", FORMS)
def test_a_factor_that_is_not_positive_definite(forms_name):
    forms, arrays, _ = case((3, 2), forms_name)
    s = pt.dscalar("s")
    arrays[1] = arrays[1] * s
    logp = pm.logp(KroneckerMvNormal.dist(0, **covs_chols_taus(forms, arrays)), np.zeros(6))
    function = compile_py([s], logp)
    assert np.isfinite(function(1.0))
    # A triangular root of either sign has a positive definite square
    bad = 0.0 if forms[1] == "chol" else -1.0
    with pytest.raises(ParameterValueError, match="posdef covariance"):
        function(bad)
    # While sampling, the check is a log-density of minus infinity
    assert pm.compile([s], logp, mode=PY)(bad) == -np.inf


def test_two_negative_definite_factors_are_refused_too():
    # Their product is positive definite, but what was asked for are two covariances
    rv = KroneckerMvNormal.dist(0, [-np.eye(2), -np.eye(3)])
    with pytest.raises(ParameterValueError, match="posdef covariance"):
        pm.logp(rv, np.zeros(6)).eval(mode=PY)


def example_model(observed=None, **kwargs):
    with pm.Model() as model:
        scale = pm.HalfNormal("scale")
        KroneckerMvNormal(
            "x", 0.5, [scale * (np.eye(3) + 0.3), np.eye(2) + 0.2], observed=observed, **kwargs
        )
    return model


def test_printing_and_model_graph():
    model = example_model()
    assert "x ~ KroneckerMvNormal(" in model.str_repr()
    assert "\\operatorname{KroneckerMvNormal}" in model.str_repr(formatting="latex")
    assert "KroneckerMvNormal" in pm.model_to_graphviz(model).source


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_pickling_a_variable(module):
    rv = KroneckerMvNormal.dist(0, [np.eye(2) + 0.3, np.eye(3)])
    copy = module.loads(module.dumps(rv))
    draws = [pm.draw(variable, random_seed=1, mode=PY) for variable in (rv, copy)]
    assert_allclose(*draws)
    assert copy.owner.op.structure == ("cov", "cov")


def test_pickling_a_model():
    model = example_model()
    copy = cloudpickle.loads(cloudpickle.dumps(model))
    point = {"scale_log__": np.array(0.3), "x": np.arange(6.0)}
    logps = [m.compile_logp(mode=PY)(point) for m in (model, copy)]
    assert logps[0] == logps[1]


def test_do_and_observe():
    model, x = example_model(), np.arange(6.0)
    logp_x = model.compile_logp(vars=model["x"], mode=PY)({"scale_log__": np.log(2.0), "x": x})
    K = 2 * np.kron(np.eye(3) + 0.3, np.eye(2) + 0.2)
    expected = scipy.stats.multivariate_normal(np.full(6, 0.5), K).logpdf(x)
    assert_allclose(logp_x, expected, rtol=1e-10)
    done = pm.do(model, {"scale": 2.0})
    assert_allclose(done.compile_logp(mode=PY)({"x": x}), expected, rtol=1e-10)
    observed = pm.observe(model, {"x": x})
    logp_observed = observed.compile_logp(vars=observed["x"], mode=PY)
    assert_allclose(logp_observed({"scale_log__": np.log(2.0)}), expected, rtol=1e-10)


def test_dims_initval_and_transform():
    with pm.Model(coords={"cell": range(6), "replicate": range(2)}) as model:
        KroneckerMvNormal(
            "x",
            0,
            [np.eye(3), np.eye(2)],
            dims=("replicate", "cell"),
            initval=np.tile(np.arange(6.0), (2, 1)),
            transform=pm.distributions.transforms.ordered,
        )
    assert model.named_vars_to_dims["x"] == ("replicate", "cell")
    [initial] = model.initial_point().values()
    backward = model.rvs_to_transforms[model["x"]].backward(initial, *model["x"].owner.inputs)
    assert_allclose(backward.eval(mode=PY), np.tile(np.arange(6.0), (2, 1)), atol=1e-10)
    assert np.isfinite(model.compile_logp(mode=PY)(model.initial_point()))


@pytest.mark.filterwarnings("ignore::pymc.exceptions.ImputationWarning")
def test_missing_observations_become_parameters():
    x = np.arange(6.0)
    observed = np.where(np.isin(np.arange(6), [1, 4]), np.nan, x)
    model = example_model(observed)
    assert [rv.name for rv in model.free_RVs] == ["scale", "x_unobserved"]
    point = {"scale_log__": np.array(0.0), "x_unobserved": x[[1, 4]]}
    logp = model.compile_fn(model.logp(sum=False), mode=PY)(point)
    K = np.kron(np.eye(3) + 0.3, np.eye(2) + 0.2)
    expected = scipy.stats.multivariate_normal(np.full(6, 0.5), K).logpdf(x)
    assert_allclose(sum(map(np.sum, logp[1:])), expected, rtol=1e-10)


def grid_model(n, *, static):
    """A model of n x n cells; without static shapes the factors' sizes are data."""
    y = np.random.default_rng(5).normal(size=n * n)
    lags = np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float)
    with pm.Model() as model:
        lags = lags if static else pm.Data("lags", lags)
        length_scale = pm.HalfNormal("length_scale", shape=2)
        covs = [pt.exp(-lags / length_scale[i]) for i in range(2)]
        mu = pm.Normal("mu")
        KroneckerMvNormal("x", mu, covs)
        KroneckerMvNormal("y", mu, [covs[0], None], taus=[None, covs[1]], observed=y)
    return model


@pytest.mark.parametrize("static", [True, False], ids=["static", "symbolic"])
@pytest.mark.parametrize("what", ["logp", "gradient", "draws"])
def test_no_array_with_n_x_n_entries_on_numba(what, static):
    n = 20
    model = grid_model(n, static=static)
    point = model.initial_point()
    if what == "draws":
        inputs, outputs, values = [], [model["x"], model["y"]], []
    else:
        inputs, values = model.value_vars, [point[value.name] for value in model.value_vars]
        outputs = model.logp() if what == "logp" else [model.logp(), model.dlogp()]
    largest = largest_computed_size(inputs, outputs, values)
    # A few vectors of the size of the grid, or of its gradient
    assert n**2 <= largest <= 4 * n**2
    if static:
        compiled = pm.compile(inputs, outputs, mode=PY)
        assert largest_static_size(compiled.maker.fgraph) <= 4 * n**2


def test_no_array_with_n_x_n_entries_on_jax():
    import jax
    from pymc.sampling.jax import get_jaxified_logp

    n = 20
    model = grid_model(n, static=True)
    logp = get_jaxified_logp(model)
    point = [np.asarray(value) for value in model.initial_point().values()]
    assert largest_jax_size(jax.value_and_grad(logp), point) <= 4 * n**2
    assert_allclose(logp(point), model.compile_logp(mode=PY)(model.initial_point()), rtol=1e-10)
    gradient = jax.tree_util.tree_leaves(jax.grad(logp)(point))
    assert_allclose(
        np.concatenate([np.ravel(leaf) for leaf in gradient]),
        model.compile_dlogp(mode=PY)(model.initial_point()),
        rtol=1e-10,
        atol=1e-12,
    )


def test_no_array_with_n_x_n_entries_in_draws_on_jax():
    n = 20
    model = grid_model(n, static=True)
    assert largest_computed_size([], [model["x"], model["y"]], [], mode="JAX") == n**2
