"""``solve(A (x) B, b) = (A^-1 (x) B^-1) b``: one small solve a factor."""

from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.linalg.solvers.core import SolveBase
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.linalg.solvers.psd import CholeskySolve
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron_solve
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import positive_definite_factors
from pymc_kron.structure import is_empty, square_kron_factors


@register_kron(blockwise_of(SolveBase))
def solve_of_kron(fgraph, node):
    """solve(A (x) B, b) -> (solve(A, .) (x) solve(B, .)) b

    What the call promises of the product holds for each factor, up to a sign where it promises
    positive definiteness, with two exceptions. The product of two skew-symmetric matrices is
    symmetric: "sym" and the structures that say less become a general solve. And a product with
    a unit diagonal has factors with diagonals c and 1 / c: their own diagonals are used.
    """
    K, b = node.inputs
    [old_out] = node.outputs
    factors = square_kron_factors(K)
    if factors is None or is_empty(b):
        return None

    match node.op.core_op:
        case SolveTriangular(lower=lower):
            solve = partial(pt.linalg.solve_triangular, lower=lower, b_ndim=2)
        case CholeskySolve(lower=lower):

            def solve(factor, columns):
                return pt.linalg.cho_solve((factor, lower), columns, b_ndim=2)

        case Solve(assume_a="pos", lower=lower):
            # K = K^H allows factors of any phase, and a sign is not enough to align them
            if K.type.numpy_dtype.kind == "c":
                return None
            factors = positive_definite_factors(fgraph, factors)
            solve = partial(pt.linalg.solve, assume_a="pos", lower=lower, b_ndim=2)
        case Solve():
            solve = partial(pt.linalg.solve, b_ndim=2)
        case _:
            return None

    new_out = kron_solve(factors, b, solve, b_ndim=node.op.core_op.b_ndim)
    return [as_replacement(old_out, new_out)]
