"""Log-density and gradient of n x n cells, against SciPy and the distributions of PyMC."""

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from scipy.linalg.blas import ddot, dtrsm
from scipy.linalg.lapack import dpotrf

from pymc_kron import KroneckerMvNormal

SIZES = [10, 50, 100]
IMPLEMENTATIONS = ["KroneckerMvNormal", "MvNormal of kron", "KroneckerNormal", "MatrixNormal"]
LENGTH_SCALES = np.array([2.0, 3.0])

# MatrixNormal calls a function that PyTensor deprecates
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def lags(n):
    return np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float)


def values(n):
    return np.random.default_rng(0).normal(size=n * n)


def model(implementation, n):
    with pm.Model() as model:
        length_scale = pm.HalfNormal("length_scale", shape=2)
        covs = [pt.exp(-lags(n) / length_scale[i]) for i in range(2)]
        y, mu = values(n), np.zeros(n * n)
        match implementation:
            case "KroneckerMvNormal":
                KroneckerMvNormal("y", mu, covs, observed=y)
            case "MvNormal of kron":
                pm.MvNormal("y", mu, pt.linalg.kron(*covs), observed=y)
            case "KroneckerNormal":
                pm.KroneckerNormal("y", mu, covs, observed=y)
            case "MatrixNormal":
                grid = y.reshape(n, n)
                pm.MatrixNormal("y", np.zeros((n, n)), covs[0], None, covs[1], observed=grid)
    return model


def trusting(inputs, outputs, **kwargs):
    """Compile a function that doesn't check its arguments."""
    function = pm.compile(inputs, outputs, **kwargs)
    function.trust_input = True
    return function


def model_function(implementation, n, *, with_gradient):
    """Return a compiled model and the point to evaluate it at."""
    kronecker = model(implementation, n)
    outputs = [kronecker.logp(), *([kronecker.dlogp()] if with_gradient else [])]
    return trusting(kronecker.value_vars, outputs), np.log(LENGTH_SCALES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("work", ["logp", "logp and gradient"])
def bench_model(benchmark, work, n, implementation):
    benchmark.group = f"{work} in two length-scales, {n} x {n} cells"
    function, point = model_function(implementation, n, with_gradient="gradient" in work)
    benchmark.pedantic(function, [point], rounds=1000, warmup_rounds=5)


def scipy_logp(A, B, x):
    """The log-density as an expert writes it for two factors: no copy but the Cholesky factors."""
    n, m = len(A), len(B)
    L_A, _ = dpotrf(A, lower=1, clean=0)
    L_B, _ = dpotrf(B, lower=1, clean=0)
    # X = x.reshape(n, m) read in Fortran order is X', and W' = L_B^-1 X' L_A^-T
    W = dtrsm(1.0, L_B, x.reshape(n, m).T, lower=1)
    W = dtrsm(1.0, L_A, W, side=1, lower=1, trans_a=1, overwrite_b=1)
    w = W.ravel("F")
    half_logdet = m * np.log(L_A.diagonal()).sum() + n * np.log(L_B.diagonal()).sum()
    return -0.5 * ddot(w, w) - half_logdet - 0.5 * n * m * np.log(2 * np.pi)


def factor_functions(n):
    """Return the two implementations, each with its arguments, after comparing them."""
    arrays = [*(np.exp(-lags(n) / scale) for scale in LENGTH_SCALES), values(n)]
    A, B, x = (pt.tensor(name, shape=a.shape) for name, a in zip("ABx", arrays, strict=True))
    logp = trusting([A, B, x], pm.logp(KroneckerMvNormal.dist(0, [A, B]), x))
    np.testing.assert_allclose(logp(*arrays), scipy_logp(*arrays), rtol=1e-10)
    return {"KroneckerMvNormal": (logp, *arrays), "SciPy": (scipy_logp, *arrays)}


@pytest.mark.parametrize("implementation", ["KroneckerMvNormal", "SciPy"])
@pytest.mark.parametrize("n", SIZES)
def bench_logp_of_factors(benchmark, n, implementation):
    benchmark.group = f"logp of two given covariances, {n} x {n} cells"
    function, *arguments = factor_functions(n)[implementation]
    benchmark.pedantic(function, arguments, rounds=2000, warmup_rounds=5)
