"""``chol(A (x) B) = chol(A) (x) chol(B)``."""

from functools import partial

from pytensor import tensor as pt
from pytensor.graph.rewriting.basic import copy_stack_trace, node_rewriter
from pytensor.tensor.basic import atleast_Nd
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import register_kron
from pymc_kron.rewriting.facts import positive_definite_factors
from pymc_kron.structure import is_provably_not_square, kron_factors


@register_kron
@node_rewriter([blockwise_of(Cholesky)])
def cholesky_of_kron(fgraph, node):
    """cholesky(A (x) B) -> cholesky(s A) (x) cholesky(s B), s = sign(A[0, 0])"""
    [K] = node.inputs
    [old_out] = node.outputs
    factors = kron_factors(K)
    if (
        factors is None
        or any(map(is_provably_not_square, factors))
        # K = K^H allows factors of any phase, and a sign is not enough to align them
        or K.type.numpy_dtype.kind == "c"
    ):
        return None
    cholesky = partial(pt.linalg.cholesky, lower=node.op.core_op.lower)
    new_out = kron(*map(cholesky, positive_definite_factors(fgraph, factors)))
    new_out = atleast_Nd(new_out, n=old_out.type.ndim).astype(old_out.type.dtype)
    copy_stack_trace(old_out, new_out)
    return [new_out]
