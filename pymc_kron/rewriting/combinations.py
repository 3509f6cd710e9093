"""``(K + s I) X = K X + s X``: products, sums and diagonals of sums of known terms.

``sum(G * K)`` and ``diagonal(G)`` end the gradients in the scalars of a matrix with noise: with
``G`` the gradient in ``c A (x) B + s I``, the gradient in ``c`` is ``sum(G * (A (x) B))`` and that
in ``s`` the trace of ``G``.
"""

from functools import cache

from pytensor import tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.graph.traversal import ancestors
from pytensor.scalar.basic import Mul
from pytensor.tensor.basic import AllocDiag
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.variable import TensorVariable

from pymc_kron.kron_sum import KronSumOp
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.sizes import Sizes
from pymc_kron.structure import kron_factors
from pymc_kron.terms import (
    Product,
    apply,
    batch_scalar,
    diagonal_of,
    inner,
    is_scalar,
    is_unread,
    require_conforming,
    terms_of,
    transposed_term,
)


@register_kron(Dot, blockwise_of(Dot))
def matmul_of_kron_sum(fgraph, node):
    """(A (x) B + s I) @ X -> (A (x) B) @ X + s X, and X @ (...) likewise"""
    left, right = node.inputs
    [old_out] = node.outputs
    if any(kron_factors(inp) is not None for inp in node.inputs):
        return None
    sizes = Sizes(left, right)
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


@register_kron(Sum)
def inner_product_of_kron(fgraph, node):
    """sum(G * H) -> the sum over the terms of G and H, where a Kronecker product is behind one"""
    [products] = node.inputs
    [old_out] = node.outputs
    match products.owner_op_and_inputs:
        case (Elemwise(scalar_op=Mul()), *inputs):
            pass
        case _:
            return None
    ndim = products.type.ndim
    axes = set(range(ndim)) if node.op.axis is None else set(node.op.axis)
    scalars = [inp for inp in inputs if is_scalar(inp)]
    matrices = [inp for inp in inputs if not is_scalar(inp)]
    if (
        ndim < 2
        or not {ndim - 2, ndim - 1} <= axes
        or len(matrices) != 2
        or any(matrix.type.broadcastable[-2:] != (False, False) for matrix in matrices)
    ):
        return None

    sizes = Sizes(*matrices)
    left, right = (terms_of(matrix, sizes) for matrix in matrices)
    if left is None or right is None or not _is_behind(*matrices):
        return None
    pairs = [(a, b) for a in left for b in right]
    for a, b in pairs:
        for term, other in ((a, b), (b, a)):
            if isinstance(term, Product) and term.is_kron and term.left is not None:
                require_conforming(other, term.left, sizes)
    total = sum(inner(a, b) for a, b in pairs)
    for scalar in scalars:
        total = batch_scalar(scalar) * total
    batch_axes = tuple(axes - {ndim - 2, ndim - 1})
    if batch_axes:
        total = pt.broadcast_to(total, tuple(products.shape)[:-2]).sum(axis=batch_axes)
    return [as_replacement(old_out, total)]


@register_kron(OpFromGraph)
def pullback_of_diagonal_matrix(fgraph, node):
    """pullback of pt.diag(v) at G -> diagonal(G), where a Kronecker product is behind G"""
    if not _is_diagonal_pullback(node.op):
        return None
    vector, _, G = node.inputs
    [old_out] = node.outputs
    terms = terms_of(G)
    if terms is None or not _is_behind(G):
        return None
    total = vector.zeros_like()
    for term in terms:
        if isinstance(term, Product) and term.left is not None:
            require_conforming(Product(), term.left, Sizes(G))
        total = total + diagonal_of(term)
    return [as_replacement(old_out, total)]


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


def _is_behind(*matrices: TensorVariable) -> bool:
    """Whether any of some matrices is computed from a Kronecker product.

    Graphs without one are PyTensor's own.
    """
    return any(
        isinstance(core_op, KroneckerProduct | KronSumOp)
        for var in ancestors(matrices)
        for core_op in [getattr(var.owner_op, "core_op", var.owner_op)]
    )
