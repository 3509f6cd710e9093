"""The rewrite bundle: PyTensor rewrites that keep Kronecker products factorwise.

Importing this package registers the rewrites with PyTensor, at canonicalize and stabilize,
under the tag ``kron``. ``mode.excluding("kron")`` turns all of them off, and
``mode.excluding(name)`` one of them.
"""

# The order is the order of precedence
from pymc_kron.rewriting.einsum import einsum_of_kron
from pymc_kron.rewriting.increments import entries_of_kron_diagonal, increment_of_kron_diagonal
from pymc_kron.rewriting.decomposition_gradient import (
    inner_product_of_kron_decomposition,
    pullback_of_kron_decomposition,
)
from pymc_kron.rewriting.noise_gradient import pullback_of_kron_sum_cholesky
from pymc_kron.rewriting.gradient import pullback_of_kron
from pymc_kron.rewriting.combinations import (
    diagonal_of_kron_sum,
    inner_product_of_kron,
    matmul_of_kron_sum,
    pullback_of_diagonal_matrix,
)
from pymc_kron.rewriting.noise import (
    det_of_kron_sum,
    inv_of_kron_sum,
    logdet_of_kron_sum_cholesky,
    solve_of_kron_sum,
    whitened_norm_of_kron_sum,
)
from pymc_kron.rewriting.exponential import expm_of_kron_sum
from pymc_kron.rewriting.gram import trace_of_gram_solve
from pymc_kron.rewriting.quadratic import whitened_norm_of_kron_solve
from pymc_kron.rewriting.determinant import det_of_kron
from pymc_kron.rewriting.decomposition import cholesky_of_kron
from pymc_kron.rewriting.inverse import inv_of_kron, pinv_of_kron
from pymc_kron.rewriting.eigen import eigh_of_kron, eigvalsh_of_kron
from pymc_kron.rewriting.svd import svd_of_kron
from pymc_kron.rewriting.qr import qr_of_kron
from pymc_kron.rewriting.lu import lu_of_kron
from pymc_kron.rewriting.solve import solve_of_kron
from pymc_kron.rewriting.products import matmul_of_kron, mixed_product_of_kron
from pymc_kron.rewriting.elementwise import div_of_kron, elemwise_of_kron, mul_of_kron
from pymc_kron.rewriting.reductions import frobenius_product_of_kron, sum_of_kron
from pymc_kron.rewriting.indexing import diagonal_of_kron, subtensor_of_kron
from pymc_kron.rewriting.selections import matmul_of_selected_kron
from pymc_kron.rewriting.bundle import (
    as_written_rewrites_db,
    bundle_rewriter,
    kron_rewrites_db,
    register_bundle,
)

register_bundle()

__all__ = [
    "as_written_rewrites_db",
    "bundle_rewriter",
    "cholesky_of_kron",
    "det_of_kron",
    "det_of_kron_sum",
    "diagonal_of_kron",
    "diagonal_of_kron_sum",
    "div_of_kron",
    "eigh_of_kron",
    "eigvalsh_of_kron",
    "einsum_of_kron",
    "elemwise_of_kron",
    "entries_of_kron_diagonal",
    "expm_of_kron_sum",
    "frobenius_product_of_kron",
    "increment_of_kron_diagonal",
    "inner_product_of_kron",
    "inner_product_of_kron_decomposition",
    "inv_of_kron",
    "inv_of_kron_sum",
    "kron_rewrites_db",
    "logdet_of_kron_sum_cholesky",
    "lu_of_kron",
    "matmul_of_kron",
    "matmul_of_kron_sum",
    "matmul_of_selected_kron",
    "mixed_product_of_kron",
    "mul_of_kron",
    "pinv_of_kron",
    "pullback_of_diagonal_matrix",
    "pullback_of_kron",
    "pullback_of_kron_decomposition",
    "pullback_of_kron_sum_cholesky",
    "qr_of_kron",
    "solve_of_kron",
    "solve_of_kron_sum",
    "subtensor_of_kron",
    "sum_of_kron",
    "svd_of_kron",
    "trace_of_gram_solve",
    "whitened_norm_of_kron_solve",
    "whitened_norm_of_kron_sum",
]
