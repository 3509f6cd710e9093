"""Kronecker-structured multivariate normals for PyMC.

Importing this package registers rewrites with PyTensor and PyMC, under the tag ``kron``:

- `pymc_kron.rewriting` makes what is written with `pytensor.tensor.linalg.kron` factorwise;
- `pymc_kron.logprob` makes a `pymc.MvNormal` whose covariance is a Kronecker product a
  `KroneckerMvNormal`.

Both are valid for every graph they match, and change nothing where there is no Kronecker
product. ``mode.excluding("kron")`` turns the former off for one function,
``pytensor.config.optimizer_excluding = "kron"`` both for a whole program.
"""

from pymc_kron import logprob as logprob
from pymc_kron import rewriting as rewriting
from pymc_kron.datasets import load_elnino, load_irish_wind
from pymc_kron.distributions import KroneckerMvNormal

__version__ = "0.1.0"

__all__ = ["KroneckerMvNormal", "load_elnino", "load_irish_wind"]
