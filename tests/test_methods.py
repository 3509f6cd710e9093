"""What PyMC and its companions do with a model, besides sampling it.

Results that are no random numbers are those of the dense model, or of NumPy; random ones agree
with the exact posterior.
"""

import copy
import json
import subprocess
import sys
import warnings

import arviz as az
import cloudpickle
import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
import xarray as xr
from numpy.testing import assert_allclose
from pymc.backends.zarr import ZarrTrace
from pymc.stats import compute_log_prior
from scipy.special import logsumexp
from scipy.stats import norm

from pymc_kron import TensorNormal
from pymc_kron.kept_for_jax import KeptForJax
from pymc_kron.routines import BlasGram, BlasSolveAlong
from tests.helpers import PY, has_kron
from tests.small_model import (
    K_SPACE,
    LAGS,
    N_CELLS,
    PARAMETERS,
    PRIOR_MEAN,
    PRIOR_SD,
    Y,
    assert_exact,
    build,
    dense_cov,
    dense_logp,
    exact_posterior,
    log_joint,
    log_parameters,
    stand_in,
)

KRONECKER = ["TensorNormal", "MvNormal of kron"]
QUIET = {"progressbar": False}
PYTHON = {"compile_kwargs": {"mode": PY}}
POINT = {"length_scale_log__": np.array(0.4), "sigma_log__": np.array(-1.1)}


def logp(model, **kwargs):
    return model.compile_logp(mode=PY, **kwargs)(POINT)


@pytest.fixture(scope="module")
def extras():
    # It imports names that one of its dependencies has deprecated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import pymc_extras

    return pymc_extras


# Optimisation and approximations


@pytest.mark.parametrize("kind", KRONECKER)
def test_find_map(kind):
    mode = pm.find_MAP(
        model=build(kind), jitter=False, return_inferencedata=True, **QUIET, **PYTHON
    )
    theta = log_parameters(mode).to_array().to_numpy().ravel()

    def density(theta):
        # Of the parameters, not of their logarithms
        return log_joint(theta) - theta.sum(axis=-1)

    steps = 1e-4 * np.eye(2)
    ends = density(theta + steps), density(theta - steps)
    slopes = (ends[0] - ends[1]) / 2e-4
    curvatures = (ends[0] + ends[1] - 2 * density(theta)) / 1e-8
    assert (curvatures < 0).all()
    assert_allclose(slopes / curvatures, 0, atol=1e-5)


@pytest.mark.parametrize("method", ["advi", "fullrank_advi"])
def test_variational_inference_takes_the_steps_of_the_dense_model(method):
    kinds = ["TensorNormal", "dense"]
    fits = [
        pm.fit(20, method, model=build(kind), random_seed=1, **QUIET, **PYTHON) for kind in kinds
    ]
    ours, dense = fits
    assert_allclose(ours.hist, dense.hist, rtol=1e-8)
    assert_allclose(ours.mean.eval(), dense.mean.eval(), rtol=1e-8)
    assert_allclose(ours.cov.eval(), dense.cov.eval(), rtol=1e-8)


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["advi", "fullrank_advi"])
def test_variational_inference(method):
    with build():
        fit = pm.fit(30_000, method, random_seed=1, **QUIET)
        idata = fit.sample(2000, random_seed=1)
    mean, cov, _ = exact_posterior()
    draws = log_parameters(idata).to_array().to_numpy().reshape((2, -1))
    sds = np.sqrt(cov.diagonal())
    assert_allclose((draws.mean(axis=1) - mean) / sds, 0, atol=0.25)
    if method == "fullrank_advi":
        assert_allclose(draws.std(axis=1) / sds, 1, atol=0.2)
    else:
        # Of independent normals, the closest to one with correlations has the conditional sds
        assert_allclose(draws.std(axis=1) * np.sqrt(np.linalg.inv(cov).diagonal()), 1, atol=0.2)


@pytest.mark.nightly
def test_smc():
    idata = pm.sample_smc(2000, model=build(), chains=4, cores=1, random_seed=1, **QUIET)
    assert_exact(idata)
    _, _, log_evidence = exact_posterior()
    estimates = idata["sample_stats"]["log_marginal_likelihood"].to_numpy()[:, -1].astype(float)
    assert_allclose(estimates, log_evidence, atol=0.15)


def test_smc_in_short():
    idata = pm.sample_smc(
        100,
        model=build(),
        chains=2,
        cores=1,
        random_seed=1,
        **QUIET,
        **PYTHON,
        compute_convergence_checks=False,
    )
    assert_exact(idata)


@pytest.mark.nightly
def test_pathfinder(extras):
    idata = extras.fit_pathfinder(build(), parallel=False, random_seed=1, **QUIET)
    mean, cov, _ = exact_posterior()
    draws = log_parameters(idata).to_array().to_numpy().reshape((2, -1))
    sds = np.sqrt(cov.diagonal())
    assert_allclose((draws.mean(axis=1) - mean) / sds, 0, atol=0.25)
    assert_allclose(draws.std(axis=1) / sds, 1, atol=0.25)


@pytest.mark.nightly
def test_pathfinder_takes_the_steps_of_the_dense_model(extras):
    ours, dense = (
        extras.fit_pathfinder(
            build(kind),
            num_paths=1,
            num_draws=20,
            num_draws_per_path=20,
            parallel=False,
            importance_sampling=None,
            random_seed=1,
            **QUIET,
            **PYTHON,
        )
        for kind in ("TensorNormal", "dense")
    )
    xr.testing.assert_allclose(log_parameters(ours), log_parameters(dense), rtol=1e-6)


NOISES, PROBABILITIES = np.array([0.2, 0.4, 0.8]), np.array([0.2, 0.3, 0.5])


def test_marginalize(extras):
    with pm.Model() as model:
        which = pm.Categorical("which", PROBABILITIES)
        length_scale = pm.LogNormal("length_scale", PRIOR_MEAN[0], PRIOR_SD[0])
        covs = [K_SPACE, pt.exp(-LAGS[1] / length_scale)]
        TensorNormal("y", 0, covs, sigma=pt.as_tensor(NOISES)[which], observed=Y[0])
    marginal = extras.marginalize(model, ["which"])
    result = marginal.compile_logp(mode=PY)({"length_scale_log__": 0.4})
    components = dense_logp(Y[0], dense_cov(np.full(3, np.exp(0.4)), NOISES))[:, 0]
    log_prior = norm.logpdf(0.4, PRIOR_MEAN[0], PRIOR_SD[0])
    expected = logsumexp(components + np.log(PROBABILITIES)) + log_prior
    assert_allclose(result, expected, rtol=1e-10)


# Prediction


def test_prior_predictive():
    n = 1000
    idata = pm.sample_prior_predictive(n, model=build(), random_seed=1, **PYTHON)
    draws = log_parameters(idata.assign(posterior=idata["prior"]))
    for name, mean, sd in zip(PARAMETERS, PRIOR_MEAN, PRIOR_SD, strict=True):
        assert abs(draws[name].mean() - mean) < 4 * sd / np.sqrt(n)
    y = idata["prior_predictive"]["y"].to_numpy().reshape((n, 8, N_CELLS))
    # What is left when each draw is whitened with its own covariance is white
    assert_white(y, *(idata["prior"][name].to_numpy().ravel() for name in PARAMETERS))


@pytest.mark.parametrize("kind", KRONECKER)
def test_posterior_predictive(kind):
    posterior = stand_in(400)
    idata = pm.sample_posterior_predictive(
        posterior, model=build(kind), random_seed=1, **QUIET, **PYTHON
    )
    y = idata["posterior_predictive"]["y"].to_numpy().reshape((-1, 8, N_CELLS))
    assert_white(y, *(posterior["posterior"][name].to_numpy().ravel() for name in PARAMETERS))


def assert_white(y, length_scale, sigma):
    whitened = np.linalg.solve(np.linalg.cholesky(dense_cov(length_scale, sigma)), y.mT)
    n = y.shape[0] * y.shape[1]
    samples = whitened.mT.reshape((n, N_CELLS))
    assert_allclose(samples.mean(axis=0), 0, atol=4.5 / np.sqrt(n))
    identity = np.eye(N_CELLS)
    errors = (samples.T @ samples / n - identity) / np.sqrt((1 + identity) / n)
    assert np.abs(errors).max() < 4.5


# Log-densities of draws


@pytest.mark.parametrize("kind", KRONECKER)
def test_log_likelihood_log_prior_and_loo(kind):
    model = build(kind)
    idata = stand_in(500)
    pm.compute_log_likelihood(idata, model=model, **QUIET, **PYTHON)
    compute_log_prior(idata, model=model, **QUIET, **PYTHON)

    length_scale, sigma = (idata["posterior"][name].to_numpy() for name in PARAMETERS)
    expected = dense_logp(Y, dense_cov(length_scale, sigma))
    result = idata["log_likelihood"]["y"]
    assert result.dims == ("chain", "draw", "replicate")
    assert_allclose(result, expected, rtol=1e-10)
    for name, mean, sd in zip(PARAMETERS, PRIOR_MEAN, PRIOR_SD, strict=True):
        logs = np.log(idata["posterior"][name])
        assert_allclose(idata["log_prior"][name], norm.logpdf(logs, mean, sd) - logs, rtol=1e-10)

    dense = idata.copy(deep=True)
    dense["log_likelihood"]["y"][...] = expected
    ours, reference = az.loo(idata, pointwise=True), az.loo(dense, pointwise=True)
    assert_allclose(ours.elpd_i, reference.elpd_i, rtol=1e-8)


# Other models made of one


def test_do():
    model = pm.do(build(), {"sigma": 0.5}, prune_vars=True)
    assert [rv.name for rv in model.free_RVs] == ["length_scale"]
    result = model.compile_logp(mode=PY)({"length_scale_log__": 0.4})
    log_prior = norm.logpdf(0.4, PRIOR_MEAN[0], PRIOR_SD[0])
    expected = dense_logp(Y, dense_cov(np.exp(0.4), 0.5)).sum() + log_prior
    assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", KRONECKER)
def test_observe(kind):
    y = Y if kind == "TensorNormal" else Y.reshape((8, N_CELLS))
    model = pm.observe(build(kind, observed=None), {"y": y})
    expected = log_joint(np.array([0.4, -1.1]))
    assert_allclose(logp(model), expected, rtol=1e-10)
    function = model.compile_fn(model.dlogp(), mode=PY)
    assert not has_kron(function.f.maker.fgraph)


# Copies, pickles and files


@pytest.mark.parametrize("kind", KRONECKER)
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: model.copy(), id="copy"),
        pytest.param(lambda model: cloudpickle.loads(cloudpickle.dumps(model)), id="cloudpickle"),
    ],
)
def test_copies_of_a_model(kind, copied):
    model = copied(build(kind))
    assert_allclose(logp(model), log_joint(np.array([0.4, -1.1])), rtol=1e-10)


def test_compiled_functions_are_copied_and_pickled():
    model = build()
    function = model.compile_fn([model.logp(), model.dlogp()], mode=PY)
    expected = function(POINT)
    for copied in (copy.deepcopy(function), cloudpickle.loads(cloudpickle.dumps(function))):
        for result, value in zip(copied(POINT), expected, strict=True):
            assert_allclose(result, value, rtol=0)


OPERATIONS_ARE_KNOWN = """
import pickle, sys
operations = pickle.load(sys.stdin.buffer)
from pytensor.link.jax.dispatch import jax_funcify
from pytensor.link.numba.dispatch.basic import numba_funcify_default_op_cache_key as numba_funcify
for operation, convert in zip(operations, (jax_funcify, numba_funcify, numba_funcify)):
    assert convert.dispatch(type(operation)) is not convert.dispatch(object), operation
"""
FUNCTION_RUNS = """
import pickle, sys
function, point = pickle.load(sys.stdin.buffer)
print([np.asarray(result).tolist() for result in function(point)])
"""


def in_a_new_process(program, data):
    """Return what a program prints that is given a pickle."""
    command = [sys.executable, "-W", "error", "-c", f"import numpy as np\n{program}"]
    finished = subprocess.run(command, input=cloudpickle.dumps(data), capture_output=True)
    assert finished.returncode == 0, finished.stderr.decode()
    return finished.stdout.decode()


def test_backends_know_unpickled_operations():
    # Which operation is kept makes no difference
    operations = [KeptForJax(None), BlasGram(), BlasSolveAlong(inplace=True)]
    in_a_new_process(OPERATIONS_ARE_KNOWN, operations)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["NUMBA", "JAX"])
def test_compiled_functions_run_in_a_new_process(mode):
    model = build()
    function = model.compile_fn([model.logp(), model.dlogp()], mode=mode)
    expected = function(POINT)
    results = json.loads(in_a_new_process(FUNCTION_RUNS, [function, POINT]))
    for result, value in zip(results, expected, strict=True):
        assert_allclose(result, value, rtol=1e-12)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        pytest.param(
            lambda idata, path: idata.to_netcdf(path, engine="h5netcdf"),
            lambda path: xr.open_datatree(path, engine="h5netcdf"),
            id="netCDF",
        ),
        pytest.param(
            lambda idata, path: idata.to_zarr(path, consolidated=False),
            lambda path: xr.open_datatree(path, engine="zarr", consolidated=False),
            id="Zarr",
        ),
    ],
)
def test_files(write, read, tmp_path):
    model = build()
    posterior = stand_in(10)
    idata = pm.sample_posterior_predictive(
        posterior, model=model, random_seed=1, extend_inferencedata=True, **QUIET, **PYTHON
    )
    write(idata, tmp_path / "idata")
    with read(tmp_path / "idata") as loaded:
        for group in ("posterior", "posterior_predictive", "observed_data"):
            xr.testing.assert_equal(loaded[group].to_dataset(), idata[group].to_dataset())
        again = pm.sample_posterior_predictive(
            loaded, model=model, random_seed=1, **QUIET, **PYTHON
        )
    xr.testing.assert_equal(again["posterior_predictive"], idata["posterior_predictive"])


def test_zarr_trace_is_refused():
    # PyMC writes with Zarr 2, and nutpie needs Zarr 3: https://github.com/pymc-devs/pymc/issues/7752
    with pytest.raises(RuntimeError, match="You must install zarr"):
        ZarrTrace()
