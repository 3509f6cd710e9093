"""``(K + s I) X = K X + s X``: products, sums and diagonals of sums of known terms.

``sum(G * K)`` and ``diagonal(G)`` end the gradients in the scalars of a matrix with noise: with
``G`` the gradient in ``c A (x) B + s I``, the gradient in ``c`` is ``sum(G * (A (x) B))`` and that
in ``s`` the trace of ``G``.
"""

from functools import cache, partial
from itertools import chain

from pytensor import tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.scalar.basic import Mul, Neg, TrueDiv
from pytensor.tensor.basic import AllocDiag, ExtractDiag, second
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.math import Dot, Sum, variadic_mul
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.variable import TensorVariable

from pymc_kron.rewriting.bundle import (
    as_replacement,
    kron_rewrites_db,
    register_kron,
    while_behind_rewrites_db,
)
from pymc_kron.rewriting.facts import note_square_factors
from pymc_kron.rewriting.indexing import is_of_last_axes
from pymc_kron.rewriting.sources import is_behind
from pymc_kron.sizes import Sizes
from pymc_kron.structure import Matrices, is_scalar, kron_factors, refuse_dtype
from pymc_kron.terms import (
    Product,
    Terms,
    apply,
    batch_scalar,
    diagonal_of,
    inner,
    is_unread,
    may_have_factors,
    require_conforming,
    require_square,
    terms_of,
    transposed_term,
)

# With ``x' (K + s I) x``, the gradient in s is ``sum(x x' * I)``, and K is gone from it soon
register_while_behind = partial(register_kron, dbs=[kron_rewrites_db, while_behind_rewrites_db])


@register_kron(Dot, blockwise_of(Dot))
def matmul_of_kron_sum(fgraph, node):
    """(A (x) B + s I) @ X -> (A (x) B) @ X + s X, and X @ (...) likewise"""
    left, right = node.inputs
    [old_out] = node.outputs
    if any(kron_factors(inp) is not None for inp in node.inputs):
        return None
    sizes = Sizes(left, right)
    if not any(may_have_factors(inp, sizes) for inp in node.inputs):
        return None
    left_terms, right_terms = terms_of(left, sizes), terms_of(right, sizes)
    if (left_terms is None) == (right_terms is None):
        return None
    if is_unread(right if right_terms is None else left, sizes):
        return None
    terms = right_terms if left_terms is None else left_terms
    if not any(isinstance(term, Product) and term.left is not None for term in terms):
        return None
    dtype = old_out.type.dtype
    if left_terms is not None:
        new_out = sum(apply(term, right.astype(dtype)) for term in terms)
    else:
        # X M = (M' X')'
        columns = left.mT.astype(dtype)
        new_out = sum(apply(transposed_term(term), columns) for term in terms).mT
    return [as_replacement(old_out, new_out)]


@register_while_behind(Sum)
def inner_product_of_kron(fgraph, node):
    """sum(G * H) -> the sum over the terms of G and H, where a Kronecker product is behind one"""
    [products] = node.inputs
    [old_out] = node.outputs
    ndim = products.type.ndim
    axes = set(range(ndim)) if node.op.axis is None else set(node.op.axis)
    if ndim < 2 or not {ndim - 2, ndim - 1} <= axes:
        return None
    scales, divisors, others = _multiplied(products)
    matrices = _as_two_matrices(others)
    if matrices is None:
        return None

    sizes = Sizes(*matrices)
    left, right = (terms_of(matrix, sizes) for matrix in matrices)
    if (left is None and right is None) or not is_behind(fgraph, *matrices):
        return None
    if left is None or right is None:
        # That one is square, as an identity matrix is, may only be known from the factors in the
        # other one
        factors = _factors_in(left or right or ())
        sizes = Sizes(*matrices, *factors)
        note_square_factors(fgraph, factors, sizes)
        left, right = (terms_of(matrix, sizes) for matrix in matrices)
        if left is None or right is None:
            return None
    refuse_dtype(products, "fc")
    note_square_factors(fgraph, _factors_in((*left, *right)), sizes)
    pairs = [(a, b) for a in left for b in right]
    for a, b in pairs:
        for term, other in ((a, b), (b, a)):
            if isinstance(term, Product) and term.is_kron and term.left is not None:
                require_conforming(other, term.left, sizes)
    total = sum(inner(a, b) for a, b in pairs)
    for scale in scales:
        total = batch_scalar(scale) * total
    for divisor in divisors:
        total = total / batch_scalar(divisor)
    batch_axes = tuple(axes - {ndim - 2, ndim - 1})
    if batch_axes:
        total = pt.broadcast_to(total, tuple(products.shape)[:-2]).sum(axis=batch_axes)
    return [as_replacement(old_out, total)]


def _multiplied(var: TensorVariable) -> tuple[list, list, list]:
    """Split a product into scalars, scalars that it is divided by, and what isn't a scalar."""
    match var.owner_op_and_inputs:
        case _ if is_scalar(var):
            return [var], [], []
        case (Elemwise(scalar_op=Neg()), inner):
            scales, divisors, others = _multiplied(inner)
            return [pt.constant(-1, dtype=var.type.dtype, ndim=2), *scales], divisors, others
        case (Elemwise(scalar_op=TrueDiv()), dividend, divisor) if is_scalar(divisor):
            scales, divisors, others = _multiplied(dividend)
            return scales, [*divisors, divisor], others
        case (Elemwise(scalar_op=Mul()), *inputs):
            parts = zip(*map(_multiplied, inputs), strict=True)
            scales, divisors, others = ([*chain.from_iterable(part)] for part in parts)
            return scales, divisors, others
    return [], [], [var]


def _as_two_matrices(others: Matrices) -> Matrices | None:
    """Return two matrices with the same product, entry by entry: a Kronecker product first."""
    matrices = [i for i, var in enumerate(others) if _is_matrix(var)]
    if not matrices or len(others) < 2:
        return None
    first = next((i for i in matrices if kron_factors(others[i]) is not None), matrices[0])
    rest = variadic_mul(*others[:first], *others[first + 1 :])
    return others[first], rest if _is_matrix(rest) else second(others[first], rest)


def _is_matrix(var: TensorVariable) -> bool:
    return var.type.broadcastable[-2:] == (False, False)


@register_while_behind(ExtractDiag)
def diagonal_of_kron_sum(fgraph, node):
    """diagonal(Q diag(w) Q') -> (Q_A**2 (x) Q_B**2) w, and the diagonals of sums of such terms"""
    [G] = node.inputs
    [old_out] = node.outputs
    if node.op.offset != 0 or not is_of_last_axes(node) or kron_factors(G) is not None:
        return None
    sizes = Sizes(G)
    terms = terms_of(G, sizes)
    if terms is None or not is_behind(fgraph, G):
        return None
    note_square_factors(fgraph, _factors_in(terms), sizes)
    if not sizes.is_square(G):
        return None
    diagonal = _diagonal(terms, sizes)
    return None if diagonal.type.ndim == 0 else [as_replacement(old_out, diagonal)]


@register_while_behind(OpFromGraph)
def pullback_of_diagonal_matrix(fgraph, node):
    """pullback of pt.diag(v) at G -> diagonal(G), where a Kronecker product is behind G"""
    if not _is_diagonal_pullback(node.op):
        return None
    vector, _, G = node.inputs
    [old_out] = node.outputs
    terms = terms_of(G)
    if terms is None or not is_behind(fgraph, G):
        return None
    sizes = Sizes(G)
    note_square_factors(fgraph, _factors_in(terms), sizes)
    return [as_replacement(old_out, vector.zeros_like() + _diagonal(terms, sizes))]


def _factors_in(terms: Terms) -> Matrices:
    return [
        factor
        for term in terms
        if isinstance(term, Product)
        for factor in (*(term.left or ()), *(term.right or ()))
    ]


def _diagonal(terms: Terms, sizes: Sizes) -> TensorVariable:
    """Return the sum of the diagonals of some terms, a scalar if all are identity matrices."""
    for term in terms:
        require_square(term, sizes)
    return sum(map(diagonal_of, terms))


def _is_diagonal_pullback(op) -> bool:
    if len(op.inner_inputs) != 3 or len(op.inner_outputs) != 1:
        return False
    types = tuple(op.input_types)
    if [getattr(input_type, "ndim", None) for input_type in types] != [1, 2, 2]:
        return False
    return op == _diagonal_pullback(types)


@cache
def _diagonal_pullback(types) -> OpFromGraph:
    """Return the operation that PyTensor makes of the pullback of ``pt.diag``, for these types."""
    vector, matrix, G = (input_type() for input_type in types)
    diag = AllocDiag(axis1=0, axis2=1, offset=0)(vector).owner.op
    [gradient] = diag.pullback([vector], [matrix], [G])
    return gradient.owner.op
