"""``K[i, i].inc(v) = K + diag(v)`` with ``i = 0, ..., N - 1``: noise that is added to the diagonal.

As a sum, the other rewrites know it. PyTensor writes it as an increment again when it specializes
operations, where the sum is still there by then.
"""

import numpy as np
from pytensor import tensor as pt
from pytensor.graph.basic import Apply, Constant
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.basic import ARange
from pytensor.tensor.subtensor import AdvancedIncSubtensor, AdvancedSubtensor
from pytensor.tensor.variable import TensorVariable

from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import note_square_factors
from pymc_kron.rewriting.journal import product_in
from pymc_kron.rewriting.sources import is_behind
from pymc_kron.sizes import Sizes
from pymc_kron.structure import Refusal, kron_factors, row_sizes


@register_kron(AdvancedIncSubtensor)
def increment_of_kron_diagonal(fgraph, node):
    """K[i, i].inc(v) -> K + diag(v), with i = arange(N)"""
    K, values, *_ = node.inputs
    if node.op.set_instead_of_inc or product_in(K) is None:
        return None
    if not _is_whole_diagonal(fgraph, node):
        raise Refusal(
            "what is incremented isn't known to be its whole diagonal",
            "write noise as sigma**2 * pt.eye(N), or give the factors static shapes",
        )
    dtype = K.type.dtype
    diagonal = pt.broadcast_to(values.astype(dtype), row_sizes([K]))
    return [as_replacement(node.out, K + pt.diag(diagonal))]


@register_kron(AdvancedSubtensor)
def entries_of_kron_diagonal(fgraph, node):
    """K[i, i] -> diagonal(K), with i = arange(N), also of sums: the gradient in an increment"""
    K = node.inputs[0]
    if not _is_whole_diagonal(fgraph, node) or not is_behind(fgraph, K):
        return None
    return [as_replacement(node.out, pt.diagonal(K))]


def _is_whole_diagonal(fgraph: FunctionGraph, node: Apply) -> bool:
    """Whether what is indexed is known to be the whole diagonal of a matrix, in order."""
    matrix, indices = node.inputs[0], node.inputs[-2:]
    match node.op.idx_list:
        case (int(), int()) if matrix.type.ndim == 2:
            pass
        case _:
            return False
    sizes = Sizes(matrix)
    note_square_factors(fgraph, kron_factors(matrix) or (), sizes)
    return sizes.is_square(matrix) and all(
        _counts_from_zero(index) and sizes.of(index, 0) == sizes.of(matrix, 0) for index in indices
    )


def _counts_from_zero(index: TensorVariable) -> bool:
    """Whether an index is 0, 1, 2, ..."""
    if index.type.ndim != 1 or index.type.dtype == "bool":
        return False
    match index:
        case Constant(data=data):
            return np.array_equal(data, np.arange(len(data)))
    match index.owner_op_and_inputs:
        case (ARange(), Constant(data=start), _, Constant(data=step)):
            return start == 0 and step == 1
    return False
