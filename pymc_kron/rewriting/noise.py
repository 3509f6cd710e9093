"""Systems with ``A (x) B + s^2 I``: a rotation of each axis, then a division.

And with every other sum of Kronecker products that one basis diagonalises; see
`pymc_kron.kron_sum`. Such a sum has no factorwise Cholesky factor, but what a Cholesky factor is
made for, the norm of a whitened vector and the log-determinant, it has.
"""

from pytensor import tensor as pt
from pytensor.scalar.basic import GT, Log
from pytensor.tensor.basic import ExtractDiag
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.inverse import MatrixInverse
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.linalg.solvers.psd import CholeskySolve
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from pytensor.tensor.linalg.summary import Det
from pytensor.tensor.math import All, Dot, Sum, variadic_mul
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.rewriting.linalg.utils import clients_through_expand_dims
from pytensor.tensor.variable import TensorVariable

from pymc_kron.kron_sum import Basis, KronSum, KronSumQuadratic, KronSumSLogDet, KronSumSolve
from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.determinant import replacements_of_det
from pymc_kron.rewriting.quadratic import quadratic_form_in, squared_norm_of
from pymc_kron.rewriting.sums import kron_sum_of
from pymc_kron.structure import inverted_matrix, is_empty, split_scalars, strip_transposes


@register_kron(blockwise_of(Solve | SolveTriangular))
def whitened_norm_of_kron_sum(fgraph, node):
    """x @ solve(M, x) and sum(solve_triangular(cholesky(M), x)**2) -> sum((P' x)^2 / Lambda)

    A rotation less than with the solution, which is why it comes before `solve_of_kron_sum`.
    """
    match node.op.core_op:
        case Solve(assume_a=assume_a, b_ndim=1):
            M, form = node.inputs[0], quadratic_form_in(fgraph, node)
            definite = assume_a == "pos"
        case SolveTriangular(b_ndim=1, lower=True):
            # With R' R = M, |inv(R) x|^2 is another number
            M = factorized_by(node.inputs[0], lower=True)
            form = squared_norm_of(fgraph, node)
            definite = True
        case _:
            return None
    x = node.inputs[1]
    if M is None or form is None or is_empty(x):
        return None
    kron_sum = kron_sum_of(fgraph, M)
    if kron_sum is None:
        return None
    op = KronSumQuadratic(layout=kron_sum.layout, definite=definite)
    return form.replaced_by(op(*kron_sum.inputs, x.astype(form.out.type.dtype)))


@register_kron(blockwise_of(Solve | CholeskySolve | SolveTriangular), Dot, blockwise_of(Dot))
def solve_of_kron_sum(fgraph, node):
    """solve(M, b) -> P ((P' b) / Lambda), also cho_solve and inv(M) @ b"""
    M, b, b_ndim, definite, scales = _system_solved_by(node)
    if M is None or is_empty(b):
        return None
    kron_sum = kron_sum_of(fgraph, M)
    if kron_sum is None:
        return None
    [old_out] = node.outputs
    op = KronSumSolve(layout=kron_sum.layout, definite=definite)
    solution = _solution(op, kron_sum, b.astype(old_out.type.dtype), b_ndim)
    return [as_replacement(old_out, variadic_mul(*scales, solution))]


@register_kron(blockwise_of(Det))
def det_of_kron_sum(fgraph, node):
    """slogdet(M), log(abs(det(M))), log(det(M)), det(M) -> sum log Lambda"""
    [M] = node.inputs
    [det] = node.outputs
    kron_sum = kron_sum_of(fgraph, M)
    if kron_sum is None:
        return None
    sign, logabsdet = KronSumSLogDet(layout=kron_sum.layout)(*kron_sum.inputs)
    return replacements_of_det(fgraph, det, sign, logabsdet)


@register_kron(ExtractDiag)
def logdet_of_kron_sum_cholesky(fgraph, node):
    """log(diagonal(cholesky(M))).sum() -> sum log Lambda / 2, diagonal(...) > 0 -> Lambda > 0"""
    [chol] = node.inputs
    [diagonal] = node.outputs
    core, _ = strip_transposes(chol)
    if node.op.offset != 0 or {node.op.axis1, node.op.axis2} != {chol.ndim - 2, chol.ndim - 1}:
        return None
    match core.owner_op_and_inputs:
        case (Blockwise(core_op=Cholesky()), M):
            kron_sum = kron_sum_of(fgraph, M)
        case _:
            return None
    if kron_sum is None:
        return None

    exists = pt.all(pt.gt(kron_sum.basis().values, 0), axis=-1)
    _, logabsdet = KronSumSLogDet(layout=kron_sum.layout)(*kron_sum.inputs)
    half = pt.where(exists, logabsdet / 2, pt.nan)
    values = {}
    for client, _ in clients_through_expand_dims(fgraph, diagonal):
        match (client.op, *client.outputs):
            case (Elemwise(scalar_op=Log()), logs):
                reduction, value = Sum, half
            case (Elemwise(scalar_op=GT()), logs) if _is_zero_threshold(client):
                reduction, value = All, exists
            case _:
                continue
        for reduce_node, _ in fgraph.clients[logs]:
            op = reduce_node.op
            axes = range(logs.type.ndim) if getattr(op, "axis", 0) is None else op.axis
            if isinstance(op, reduction) and tuple(axes) == (logs.type.ndim - 1,):
                values[reduce_node.out] = as_replacement(reduce_node.out, value)
    return values or None


@register_kron(blockwise_of(MatrixInverse))
def inv_of_kron_sum(fgraph, node):
    """inv(M) -> P diag(1 / Lambda) P'"""
    kron_sum = kron_sum_of(fgraph, node.inputs[0])
    if kron_sum is None:
        return None
    basis = kron_sum.basis()
    return [as_replacement(node.out, inverse_of(basis, basis.values))]


def inverse_of(basis: Basis, values: TensorVariable) -> TensorVariable:
    """Return ``P diag(1 / Lambda) P'``, as a graph in which the terms are seen."""
    vectors = kron(*basis.vectors)
    return (vectors / values[..., None, :]) @ vectors.mT


def _system_solved_by(node):
    """Return the matrix and the right-hand side, and the number of its core dimensions.

    And whether the matrix is taken to be positive definite, and scalars to multiply with.
    """
    left, right = node.inputs
    match getattr(node.op, "core_op", node.op):
        case Solve(assume_a=assume_a, b_ndim=b_ndim):
            return left, right, b_ndim, assume_a == "pos", ()
        case CholeskySolve(lower=lower, b_ndim=b_ndim):
            return factorized_by(left, lower=lower), right, b_ndim, True, ()
        case SolveTriangular(lower=False, b_ndim=b_ndim):
            # inv(M) = inv(L') inv(L). The gradient in x of |inv(L) x|^2 has a 2 in between
            whitened, scales = split_scalars(right, b_ndim)
            match whitened.owner_op_and_inputs:
                case (Blockwise(core_op=SolveTriangular(lower=True) as inner), chol, b) if (
                    inner.b_ndim == b_ndim
                ):
                    M = factorized_by(chol, lower=True)
                    if M is not None and M is factorized_by(left.mT, lower=True):
                        return M, b, b_ndim, True, scales
        case Dot():
            inverted = inverted_matrix(left)
            if inverted is not None:
                return inverted, right, 2, False, ()
    return None, None, None, False, ()


def factorized_by(chol: TensorVariable, *, lower: bool) -> TensorVariable | None:
    """Return ``M`` if a matrix is its Cholesky factor of that kind, or None."""
    core, transposed = strip_transposes(chol)
    match core.owner_op_and_inputs:
        case (Blockwise(core_op=Cholesky(lower=own)), M) if (own != transposed) == lower:
            return M
    return None


def _solution(
    op: KronSumSolve, kron_sum: KronSum, b: TensorVariable, b_ndim: int
) -> TensorVariable:
    if b_ndim == 1:
        return op(*kron_sum.inputs, b)
    return pt.moveaxis(op(*kron_sum.inputs, pt.moveaxis(b, -1, 0)), 0, -1)


def _is_zero_threshold(node) -> bool:
    _, threshold = node.inputs
    while isinstance(threshold.owner_op, DimShuffle):
        [threshold] = threshold.owner.inputs
    return getattr(threshold, "data", None) == 0
