"""``(A (x) B) vec(X) = vec(A X B')``: one small product a factor."""

from pytensor.tensor.math import Dot
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron_matmul
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.structure import is_empty, kron_factors


@register_kron(Dot, blockwise_of(Dot))
def matmul_of_kron(fgraph, node):
    """(A (x) B) @ X -> A and B applied along the axes of X, and X @ (A (x) B) likewise

    A product of two Kronecker products is itself one, and left as it is.
    """
    left, right = node.inputs
    [old_out] = node.outputs
    left_factors, right_factors = kron_factors(left), kron_factors(right)
    if (left_factors is None) == (right_factors is None):
        return None
    if any(map(is_empty, (left, right))) or old_out.type.numpy_dtype.kind == "b":
        return None
    if left_factors is not None:
        new_out = kron_matmul(left_factors, right, x_ndim=2)
    else:
        # X K = (K' X')'
        new_out = kron_matmul([factor.mT for factor in right_factors], left.mT, x_ndim=2).mT
    return [as_replacement(old_out, new_out)]
