"""The rewrite bundle: PyTensor rewrites that keep Kronecker products factorwise.

Importing this package registers the rewrites with PyTensor, at canonicalize and stabilize,
under the tag ``kron``. ``mode.excluding("kron")`` turns all of them off, and
``mode.excluding(name)`` one of them.
"""

# The order is the order of precedence
from pymc_kron.rewriting.quadratic import whitened_norm_of_kron_solve
from pymc_kron.rewriting.determinant import det_of_kron
from pymc_kron.rewriting.decomposition import cholesky_of_kron
from pymc_kron.rewriting.solve import solve_of_kron
from pymc_kron.rewriting.products import matmul_of_kron
from pymc_kron.rewriting.bundle import bundle_rewriter, kron_rewrites_db, register_bundle

register_bundle()

__all__ = [
    "bundle_rewriter",
    "cholesky_of_kron",
    "det_of_kron",
    "kron_rewrites_db",
    "matmul_of_kron",
    "solve_of_kron",
    "whitened_norm_of_kron_solve",
]
