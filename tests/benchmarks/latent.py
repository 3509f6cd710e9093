"""A latent field with Poisson data, one gradient: ``python -m ... OUTPUT``.

The same prior as an exact product, in this package and in PyMC, and approximated by `pymc.gp.HSGP`
with what PyMC advises for length-scales of a tenth to two fifths of the grid. The kernel is squared
exponential, the only product over axes that `pymc.gp.HSGP` takes. What is timed is the log-density
of the model with its gradient, as samplers call it.
"""

import sys
from pathlib import Path

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pymc.gp.hsgp_approx import approx_hsgp_hyperparams
from pymc.gp.util import stabilize

import pymc_kron as pk
from pymc_kron.transforms import whiten
from tests.benchmarks import measure


def whitened(axes, length_scales):
    kernels = [pm.gp.cov.ExpQuad(1, ls=length_scale) for length_scale in length_scales]
    covs = [stabilize(kernel(axis)) for kernel, axis in zip(kernels, axes, strict=True)]
    return pk.KroneckerMvNormal("field", 0, covs, transform=whiten)


def latent_kron(axes, length_scales):
    kernels = [pm.gp.cov.ExpQuad(1, ls=length_scale) for length_scale in length_scales]
    return pm.gp.LatentKron(cov_funcs=kernels).prior("field", axes)


def hsgp(axes, length_scales):
    m, c = basis_functions(len(axes[0]))
    kernel = pm.gp.cov.ExpQuad(2, ls=length_scales)
    return pm.gp.HSGP(m=[m, m], c=c, cov_func=kernel).prior("field", pm.math.cartesian(*axes))


def basis_functions(n):
    """Return the number of basis functions on an axis, and the width of the box."""
    return approx_hsgp_hyperparams([0, n - 1], [0.1 * n, 0.4 * n], "expquad")


PRIORS = {"KroneckerMvNormal": whitened, "pm.gp.LatentKron": latent_kron, "pm.gp.HSGP": hsgp}


def prepare(prior, n):
    axes = [np.arange(float(n))[:, None]] * 2
    counts = np.random.default_rng(0).poisson(1.0, size=n * n)
    with pm.Model() as model:
        shares = pm.LogNormal("shares", np.log(0.2), 0.3, shape=2)
        field = prior(axes, [n * shares[0], n * shares[1]])
        pm.Poisson("y", pt.exp(field), observed=counts)
    function = model.logp_dlogp_function(ravel_inputs=True)
    function.set_extra_values({})
    size = sum(value.size for value in model.initial_point().values())
    point = np.random.default_rng(0).normal(scale=0.1, size=size)
    return lambda: function(point)


def measure_gradients(n):
    calls = {name: prepare(prior, n) for name, prior in PRIORS.items()}
    # LatentKron and a whitened field are one model in the same coordinates
    ours, theirs = calls["KroneckerMvNormal"](), calls["pm.gp.LatentKron"]()
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)
    return {
        "n": n,
        "basis functions": basis_functions(n)[0] ** 2,
        "seconds": measure.medians(calls),
    }


if __name__ == "__main__":
    _, output = sys.argv
    measure.use_one_core()
    measure.save(Path(output), [measure_gradients(n) for n in (20, 50, 100)], ["pymc", "pytensor"])
