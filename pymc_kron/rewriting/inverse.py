"""``(A (x) B)^-1 = A^-1 (x) B^-1``, also for the Moore-Penrose inverse.

The pseudo-inverse of the product is exactly the product of the pseudo-inverses (Van Loan, 2000).
In floating point they differ where `numpy.linalg.pinv` takes a singular value for zero, below
1e-15 of the largest one. Of the product it drops all ``s_i t_j < 1e-15 s_1 t_1``; factor by
factor only what ``s_i < 1e-15 s_1`` or ``t_j < 1e-15 t_1`` makes zero, which are some of these.
The others, such as 1e-8 times 1e-8, come from two values that are far above rounding error, and
are inverted, as exact arithmetic would.
"""

from pytensor import tensor as pt
from pytensor.tensor.linalg.inverse import MatrixInverse, MatrixPinv
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.orientation import rectangular_kron_factors
from pymc_kron.structure import square_kron_factors


@register_kron(blockwise_of(MatrixInverse))
def inv_of_kron(fgraph, node):
    """inv(A (x) B) -> inv(A) (x) inv(B)"""
    [K] = node.inputs
    [old_out] = node.outputs
    factors = square_kron_factors(K)
    if factors is None:
        return None
    new_out = kron(*map(pt.linalg.inv, factors))
    return [as_replacement(old_out, new_out)]


@register_kron(blockwise_of(MatrixPinv))
def pinv_of_kron(fgraph, node):
    """pinv(A (x) B) -> pinv(A) (x) pinv(B)

    ``hermitian=True`` says nothing about one factor, which may be skew-symmetric, and is dropped.
    """
    [K] = node.inputs
    [old_out] = node.outputs
    factors = rectangular_kron_factors(K)
    if factors is None:
        return None
    return [as_replacement(old_out, kron(*map(pt.linalg.pinv, factors)))]
