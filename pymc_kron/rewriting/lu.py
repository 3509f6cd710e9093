"""``A (x) B = (P_A (x) P_B) (L_A (x) L_B) (U_A (x) U_B)``.

An LU decomposition whose permutation is made of the factors' permutations. L has a unit diagonal
and, for real factors, no entry beyond one; U is upper triangular. LAPACK may choose other pivots
in the dense product, with the same promises.
"""

from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.linalg.decomposition.lu import LU, LUFactor
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron
from pymc_kron.orders import kron_permutation
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.orientation import proved_square_kron_factors
from pymc_kron.structure import Refusal


@register_kron(blockwise_of(LU), blockwise_of(LUFactor))
def lu_of_kron(fgraph, node):
    """lu(A (x) B) -> P_A (x) P_B, L_A (x) L_B, U_A (x) U_B"""
    [K] = node.inputs
    op = node.op.core_op
    factors = proved_square_kron_factors(fgraph, K)
    if factors is None:
        return None
    if isinstance(op, LUFactor):
        raise Refusal(
            "L and U packed into one matrix aren't a Kronecker product", "use lu, or solve"
        )
    # SciPy 1.18's lu is wrong for integers in Fortran order
    dtype = node.outputs[-1].type.dtype
    lu = partial(pt.linalg.lu, permute_l=op.permute_l, p_indices=op.p_indices)
    first, *others = zip(*(lu(factor.astype(dtype)) for factor in factors), strict=True)
    news = [
        kron_permutation(first) if op.p_indices else kron(*first),
        *(kron(*matrices) for matrices in others),
    ]
    return [as_replacement(old, new) for old, new in zip(node.outputs, news, strict=True)]
