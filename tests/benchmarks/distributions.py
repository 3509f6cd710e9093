"""`KroneckerMvNormal` and the distributions of PyMC: ``python -m ... WORK OUTPUT``.

Those of PyMC are compiled without the rewrites of this package.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pymc as pm
import pytensor.tensor as pt
from pymc.pytensorf import rewrite_pregrad
from pytensor.compile.mode import get_default_mode

from pymc_kron import KroneckerMvNormal
from tests.benchmarks import measure

PACKAGES = ["pymc", "pytensor"]


def kronecker_mvnormal(mu, covs, sigma):
    return KroneckerMvNormal, {"mu": mu, "covs": covs, "sigma": sigma}


def kronecker_normal(mu, covs, sigma):
    return pm.KroneckerNormal, {"mu": mu, "covs": covs, "sigma": 0 if sigma is None else sigma}


def matrix_normal(mu, covs, sigma):
    if len(covs) != 2 or sigma is not None:
        raise NotImplementedError("two factors, no noise")
    rowcov, colcov = map(pt.as_tensor, covs)
    grid = rowcov.type.shape[0], colcov.type.shape[0]
    return pm.MatrixNormal, {"mu": mu.reshape(grid), "rowcov": rowcov, "colcov": colcov}


class Distribution(NamedTuple):
    # Returns a distribution and its parameters, of ``mu, covs, sigma``
    parameters: Callable
    with_bundle: bool = False

    @property
    def mode(self):
        mode = get_default_mode()
        return mode if self.with_bundle else mode.excluding("kron")


DISTRIBUTIONS = {
    "KroneckerMvNormal": Distribution(kronecker_mvnormal, with_bundle=True),
    "pm.KroneckerNormal": Distribution(kronecker_normal),
    "pm.MatrixNormal": Distribution(matrix_normal),
}


def trusting(inputs, outputs, **kwargs):
    """Compile a function that doesn't check its arguments."""
    function = pm.compile(inputs, outputs, **kwargs)
    function.trust_input = True
    return function


def compile_work(work, distribution, covs, sigma, mu, x, *, static=True):
    """Compile a function of the factors, sigma if there is noise, mu and the value."""
    covs, (sigma, mu, x) = (
        [
            None
            if array is None
            else pt.tensor(shape=array.shape if static else (None,) * array.ndim)
            for array in arrays
        ]
        for arrays in (covs, (sigma, mu, x))
    )
    cls, parameters = distribution.parameters(mu, covs, sigma)
    rv = cls.dist(**parameters)
    logp = pm.logp(rv, x.reshape(tuple(parameters["mu"].shape)))
    inputs = [*covs, *([] if sigma is None else [sigma]), mu, x]
    if work.with_gradient:
        # What PyMC's samplers do
        logp = rewrite_pregrad(logp)
        logp = [logp, *pt.grad(logp, inputs)]
    return trusting(inputs, logp, mode=distribution.mode)


def prepare(distribution):
    def prepare_distribution(work, covs, sigma, mu, x):
        function = compile_work(work, distribution, covs, sigma, mu, x)
        values = [*covs, *([] if sigma is None else [sigma]), mu, x]
        return lambda: function(*values)

    return prepare_distribution


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    measure.main({name: prepare(f) for name, f in DISTRIBUTIONS.items()}, PACKAGES)
