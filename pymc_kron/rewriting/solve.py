"""``solve(A (x) B, b) = (A^-1 (x) B^-1) b``: one small solve a factor."""

from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.linalg.solvers.core import SolveBase
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.linalg.solvers.psd import CholeskySolve
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from pytensor.tensor.math import variadic_mul
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron, kron_solve
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.conforming import conforming_factors
from pymc_kron.rewriting.facts import positive_definite_factors
from pymc_kron.rewriting.sums import part_of_sum
from pymc_kron.structure import (
    Refusal,
    is_empty,
    is_narrow_integer,
    kron_factors,
    split_scalars,
    square_kron_factors,
    strip_transposes,
)
from pymc_kron.terms import LowRank, Product, scaled, terms_of


@register_kron(blockwise_of(SolveBase))
def solve_of_kron(fgraph, node):
    """solve(A (x) B, b) -> (solve(A, .) (x) solve(B, .)) b

    What the call promises of the product holds for each factor, up to a sign where it promises
    positive definiteness, with two exceptions. The product of two skew-symmetric matrices is
    symmetric: "sym" and the structures that say less become a general solve. And a product with
    a unit diagonal has factors with diagonals c and 1 / c: their own diagonals are used.

    With another product on the right, ``solve(A (x) B, C (x) D) -> solve(A, C) (x) solve(B, D)``,
    and with an outer product, ``solve(K, u v') -> solve(K, u) v'``. Scalars are taken out,
    ``solve(K, c b) -> c solve(K, b)``: gradients have some there, and share the solution then.
    """
    K, b = node.inputs
    [old_out] = node.outputs
    factors = square_kron_factors(K)
    if factors is None or is_empty(b):
        return None
    core, scales = split_scalars(b, node.op.core_op.b_ndim)
    if scales and kron_factors(core) is None:
        return [as_replacement(old_out, variadic_mul(*scales, node.op(K, core)))]
    is_complex = K.type.numpy_dtype.kind == "c"
    # A single column is an outer product too, of itself and a one
    is_vector = node.op.core_op.b_ndim == 1 or b.type.broadcastable[-1]
    match None if is_vector else terms_of(b):
        case (LowRank(weights=None) as term,) if term.may_be_narrower_than(b.type.shape[-1]):
            new_out = scaled(node.op(K, term.left) @ term.right.mT, Product(scales=term.scales), 2)
            return [as_replacement(old_out, new_out)]

    match node.op.core_op:
        case SolveTriangular(lower=lower):
            solve = partial(pt.linalg.solve_triangular, lower=lower, b_ndim=2)
        case CholeskySolve(lower=lower):

            def solve(factor, columns):
                core, transposed = (factor, False) if is_complex else strip_transposes(factor)
                # C C' = U' U with U = C'
                return pt.linalg.cho_solve((core, lower != transposed), columns, b_ndim=2)

        case Solve(assume_a="pos", lower=lower):
            # K = K^H allows factors of any phase, and a sign is not enough to align them
            if is_complex:
                return None
            # A = A': the solve with K' in a gradient shares the decompositions of the solve with K
            factors = [strip_transposes(factor)[0] for factor in factors]
            factors = positive_definite_factors(fgraph, factors)
            solve = partial(pt.linalg.solve, assume_a="pos", lower=lower, b_ndim=2)
        case Solve():
            solve = partial(pt.linalg.solve, b_ndim=2)
        case _:
            return None

    b_ndim = node.op.core_op.b_ndim
    pairs, scales = _pairs_with_right_hand_side(factors, b) if b_ndim == 2 else (None, ())
    if pairs is None:
        new_out = kron_solve(factors, b, solve, b_ndim=b_ndim)
    else:
        solutions = [solve(factor, c.astype(old_out.type.dtype)) for factor, c in pairs]
        new_out = scaled(kron(*solutions), Product(scales=scales), 2)
    return [as_replacement(old_out, new_out)]


def _pairs_with_right_hand_side(factors, b):
    """Return the factors with those of the right-hand side, if that is a product to match.

    Or a multiple of the identity, such as the gradient in a matrix of its trace; and the scalars.
    """
    b_factors = kron_factors(b)
    try:
        if b_factors is not None and not is_narrow_integer(b):
            return conforming_factors(factors, b_factors, [(-2, -2)]), ()
        match terms_of(b):
            case (Product(left=None, right=None) as term,) if all(b.type.broadcastable[:-2]):
                scales, _ = part_of_sum(term)
                return [(factor, pt.eye(factor.shape[-2])) for factor in factors], scales
    except Refusal:
        pass
    return None, ()
