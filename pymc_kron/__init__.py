"""Kronecker-structured multivariate normals for PyMC.

Importing this package registers rewrites with PyTensor and PyMC, under the tag ``kron``:

- `pymc_kron.rewriting` makes what is written with `pytensor.tensor.linalg.kron` factorwise;
- `pymc_kron.logprob` makes a `pymc.MvNormal` whose covariance is a Kronecker product a
  `KroneckerMvNormal`.

Both change nothing where there is no Kronecker product. ``mode.excluding("kron")`` turns them
off for one compiled function, and ``PYTENSOR_FLAGS=optimizer_excluding=kron`` for a whole
program, where PyMC rewrites a model without a mode too. A rewrite can be turned off by its name
in the same two ways.
"""

from pymc_kron import kept_for_jax as kept_for_jax
from pymc_kron import logprob as logprob
from pymc_kron import rewriting as rewriting
from pymc_kron import routines as routines
from pymc_kron.conditional import conditional
from pymc_kron.datasets import load_elnino, load_irish_wind
from pymc_kron.diagnostics import assert_no_dense_kron, explain
from pymc_kron.distributions import KroneckerMvNormal, TensorNormal
from pymc_kron.loo import loo_pointwise
from pymc_kron.predict_missing import predict_missing

__version__ = "0.5.2"

__all__ = [
    "KroneckerMvNormal",
    "TensorNormal",
    "assert_no_dense_kron",
    "conditional",
    "explain",
    "load_elnino",
    "load_irish_wind",
    "loo_pointwise",
    "predict_missing",
]
