"""``chol(A (x) B) = chol(A) (x) chol(B)``."""

from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import positive_definite_factors
from pymc_kron.structure import square_kron_factors


@register_kron(blockwise_of(Cholesky))
def cholesky_of_kron(fgraph, node):
    """cholesky(A (x) B) -> cholesky(s A) (x) cholesky(s B), s = sign(A[0, 0])"""
    [K] = node.inputs
    [old_out] = node.outputs
    # K = K^H allows complex factors of any phase, and a sign is not enough to align them
    factors = square_kron_factors(K, real=True)
    if factors is None:
        return None
    cholesky = partial(pt.linalg.cholesky, lower=node.op.core_op.lower)
    new_out = kron(*map(cholesky, positive_definite_factors(fgraph, factors)))
    return [as_replacement(old_out, new_out)]
