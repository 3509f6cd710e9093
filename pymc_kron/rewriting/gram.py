"""``tr((L L')^-1 X' X) = |L^-1 X'|^2``: the Gram matrix of the rows is never formed.

`pymc.MatrixNormal` writes its quadratic form in this way. With a Kronecker product for the
covariance of the columns, the matrix would be as large as that product.
"""

from pytensor.tensor.basic import ExtractDiag
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from pytensor.tensor.math import Sum
from pytensor.tensor.variable import TensorVariable

from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.structure import gram_root, kron_factors, strip_transposes


@register_kron(Sum)
def trace_of_gram_solve(fgraph, node):
    """trace(solve(L', solve(L, X' X))) -> sum(solve(L, X')^2) for L = A (x) B or its root"""
    [diagonal] = node.inputs
    [old_out] = node.outputs
    if diagonal.type.ndim != 1:
        return None
    match diagonal.owner_op_and_inputs:
        case (ExtractDiag(offset=0), trace_of):
            pass
        case _:
            return None
    match trace_of.owner_op_and_inputs:
        case (Blockwise(core_op=SolveTriangular(lower=False, b_ndim=2)), upper, half):
            pass
        case _:
            return None
    match half.owner_op_and_inputs:
        case (Blockwise(core_op=SolveTriangular(lower=True, b_ndim=2)) as solve, lower, gram):
            rows = gram_root(gram)
        case _:
            return None
    upper_core, is_transposed = strip_transposes(upper)
    if rows is None or upper_core is not lower or not is_transposed or not is_root_of_kron(lower):
        return None
    return [as_replacement(old_out, (solve(lower, rows) ** 2).sum())]


def is_root_of_kron(chol: TensorVariable) -> bool:
    """Whether a matrix is a Kronecker product, or the Cholesky factor of one."""
    core, _ = strip_transposes(chol)
    match core.owner_op_and_inputs:
        case (Blockwise(core_op=Cholesky()), K):
            return kron_factors(K) is not None
    return kron_factors(core) is not None
