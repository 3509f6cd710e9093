"""``K[:, p] X = K Z``, where ``Z[p] = X``, and ``K[p] X = (K X)[p]``.

A product with some rows or columns of a Kronecker product, in any order, such as the sorted
eigenvectors, or with rows or columns multiplied, ``(K diag(w)) X = K (w X)``.
"""

from math import prod

from pytensor import tensor as pt
from pytensor.scalar.basic import Mul, TrueDiv
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.math import Dot, mul, true_div
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.subtensor import AdvancedSubtensor, Subtensor, indices_from_subtensor

from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.structure import column_sizes, kron_factors, row_sizes, strip_transposes


@register_kron(Dot, blockwise_of(Dot))
def matmul_of_selected_kron(fgraph, node):
    """K[:, p] @ X -> K @ Z, (K * w) @ X -> K @ (w[:, None] * X), and X @ K[:, p] likewise

    A product of two of these is left as it is, as a product of two Kronecker products.
    """
    left, right = node.inputs
    [old_out] = node.outputs
    dtype = old_out.type.dtype
    if dtype == "bool" or any(kron_factors(inp) is not None for inp in node.inputs):
        return None
    product = _product(left, right.astype(dtype), transposed=False)
    transposed_product = _product(right, left.mT.astype(dtype), transposed=True)
    match product, transposed_product:
        case new_out, None if new_out is not None:
            return [as_replacement(old_out, new_out)]
        case None, new_out_T if new_out_T is not None:
            return [as_replacement(old_out, new_out_T.mT)]
    return None


def _product(matrix, X, *, transposed):
    """Return ``matrix @ X``, or ``matrix.T @ X``, or None if no Kronecker product is inside."""
    core, flipped = strip_transposes(matrix)
    transposed ^= flipped
    if core.type.ndim != 2:
        return None
    if kron_factors(core) is not None:
        return (core.T if transposed else core) @ X
    match core.owner_op_and_inputs:
        case (Subtensor() | AdvancedSubtensor() as op, K, *op_indices) if K.type.ndim == 2:
            return _product_of_selection(K, (op_indices, op.idx_list), X, transposed)
        case (Elemwise(scalar_op=Mul()), *inputs):
            matrices = [inp for inp in inputs if not any(inp.type.broadcastable)]
            if len(matrices) == 1:
                scales = [inp for inp in inputs if any(inp.type.broadcastable)]
                return _product_of_scaled(*matrices, mul, scales, X, transposed)
        case (Elemwise(scalar_op=TrueDiv()), K, divisor):
            if any(divisor.type.broadcastable) and not any(K.type.broadcastable):
                return _product_of_scaled(K, true_div, [divisor], X, transposed)
    return None


def _product_of_selection(K, op_indices, X, transposed):
    rows, columns = (*indices_from_subtensor(*op_indices), slice(None), slice(None))[:2]
    vectors = [index for index in (rows, columns) if not isinstance(index, slice)]
    # Two vectors select entries rather than rows and columns
    if len(vectors) > 1 or any(index.type.ndim != 1 for index in vectors):
        return None
    if transposed:
        rows, columns = columns, rows
    if columns != slice(None):
        # From the factors: the shape of the product would hold the product
        factors = kron_factors(K) or (K,)
        n_columns = prod(row_sizes(factors) if transposed else column_sizes(factors))
        zeros = pt.zeros((*tuple(X.shape)[:-2], n_columns, X.shape[-1]), dtype=X.type.dtype)
        # A column that is selected twice gets the sum
        X = zeros[..., columns, :].inc(X)
    product = _product(K, X, transposed=transposed)
    return product if product is None or rows == slice(None) else product[..., rows, :]


def _product_of_scaled(K, op, scales, X, transposed):
    if transposed:
        scales = [scale.T for scale in scales]
    for scale in scales:
        if scale.type.broadcastable[0]:
            X = op(X, scale.T)
    product = _product(K, X, transposed=transposed)
    if product is None:
        return None
    for scale in scales:
        if not scale.type.broadcastable[0]:
            product = op(product, scale)
    return product
