"""``(A (x) B)[i, j] = A[i // p, j // q] B[i % p, j % q]`` for a (p, q) matrix B."""

from math import prod

import numpy as np
from pytensor import tensor as pt
from pytensor.graph.basic import Constant
from pytensor.scalar.basic import ScalarVariable
from pytensor.tensor.basic import ExtractDiag, atleast_Nd
from pytensor.tensor.math import variadic_mul
from pytensor.tensor.sort import ArgSortOp
from pytensor.tensor.subtensor import (
    AdvancedSubtensor,
    Subtensor,
    indices_from_subtensor,
)

from pymc_kron.linalg import kron_of_vectors
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import are_square
from pymc_kron.sizes import few_indices
from pymc_kron.structure import Refusal, column_sizes, kron_factors, row_sizes


def is_of_last_axes(node):
    """Whether an `ExtractDiag` takes the diagonals of matrices, not of batch dimensions."""
    ndim = node.inputs[0].type.ndim
    return (node.op.axis1, node.op.axis2) == (ndim - 2, ndim - 1)


@register_kron(ExtractDiag)
def diagonal_of_kron(fgraph, node):
    """diagonal(A (x) B) -> diagonal(A) (x) diagonal(B), and the gathered entries of any other

    A diagonal with an offset, or one of a product of factors that may not be square, isn't made
    of whole diagonals of the factors.
    """
    [K] = node.inputs
    [old_out] = node.outputs
    factors = kron_factors(K)
    if factors is None or not is_of_last_axes(node):
        return None
    has_whole_diagonals = node.op.offset == 0 and are_square(fgraph, factors)
    factors = [factor.astype(K.type.dtype) for factor in factors]
    if has_whole_diagonals:
        diagonals = [pt.diagonal(factor, axis1=-2, axis2=-1) for factor in factors]
        return [as_replacement(old_out, kron_of_vectors(diagonals))]

    row, column = max(0, -node.op.offset), max(0, node.op.offset)
    lengths = prod(row_sizes(factors)) - row, prod(column_sizes(factors)) - column
    if all(isinstance(length, int) for length in lengths):
        # Constants, which JAX needs an arange to be
        steps = np.arange(max(0, min(lengths)))
    else:
        steps = pt.arange(pt.maximum(0, pt.minimum(*lengths)))
    return [as_replacement(old_out, _entries(factors, steps + row, steps + column))]


@register_kron(Subtensor, AdvancedSubtensor)
def subtensor_of_kron(fgraph, node):
    """(A (x) B)[i, j] -> A[i // p, j // q] * B[i % p, j % q], and rows and columns likewise

    Also for arrays of indices, and for slices that take at most half of the rows or columns.
    """
    K, *index_variables = node.inputs
    [old_out] = node.outputs
    factors = kron_factors(K)
    if factors is None:
        return None
    indices = list(indices_from_subtensor(index_variables, node.op.idx_list))
    indices += [slice(None)] * (K.type.ndim - len(indices))
    *batch, row, column = map(_as_index, indices)
    if all(isinstance(index, slice) and index == slice(None) for index in (row, column)):
        return None
    n_dropped = sum(not isinstance(index, slice) for index in batch)
    if n_dropped and isinstance(node.op, AdvancedSubtensor):
        raise Refusal("a batch dimension is indexed with an array", "index the factors")

    selected = _selected([factor.astype(K.type.dtype) for factor in factors], row, column)
    new_out = atleast_Nd(selected, n=old_out.type.ndim + n_dropped)[tuple(batch)]
    return [as_replacement(old_out, new_out)]


def _as_index(index):
    """Return an index as integers where it is constant, as int64 otherwise; slices as they are."""
    match index:
        case slice():
            return index
        case Constant(data=data) if np.ndim(data) == 0:
            return int(data)
        case Constant(data=data):
            values = data
        case ScalarVariable():
            values = pt.tensor_from_scalar(index)
        case _:
            values = index
    if values.dtype == "bool":
        raise Refusal("the product is indexed with a mask", "take its nonzero()")
    return values.astype("int64")


def _selected(factors, row, column):
    """Return what the indices of the last two axes select."""
    if isinstance(row, slice) and isinstance(column, slice):
        few_rows = few_indices(row, prod(row_sizes(factors)))
        few_columns = few_indices(column, prod(column_sizes(factors)))
        if few_rows is not None:
            row = few_rows
        elif few_columns is not None:
            column = few_columns
        else:
            raise Refusal(
                "slices aren't known to take at most half of the rows or columns",
                "give the factors static shapes",
            )
    if not isinstance(row, slice) and not isinstance(column, slice):
        return _entries(factors, row, column)
    if not isinstance(row, slice):
        return _rows(factors, row)[..., column]
    columns = _rows([factor.mT for factor in factors], column)
    index_ndim = getattr(column, "ndim", 0)
    columns = pt.moveaxis(columns, -1, -1 - index_ndim)
    return columns[(..., row, *[slice(None)] * index_ndim)]


def _entries(factors, rows, columns):
    """Return the entries of the product at pairs of indices, which are broadcast."""
    rows, columns = _unravel(rows, row_sizes(factors)), _unravel(columns, column_sizes(factors))
    return variadic_mul(
        *(factor[..., i, j] for factor, i, j in zip(factors, rows, columns, strict=True))
    )


def _rows(factors, rows):
    """Return rows of the product, each a Kronecker product of rows of the factors."""
    sizes = row_sizes(factors)
    _refuse_all(rows, prod(sizes))
    indices = _unravel(rows, sizes)
    return kron_of_vectors([factor[..., i, :] for factor, i in zip(factors, indices, strict=True)])


def _refuse_all(index, size):
    """Raise a `Refusal` if an array of indices is known, or bound, to be as long as the axis.

    A product with its rows or columns in another order is no smaller than the product, which is
    still seen to be one.
    """
    index = pt.as_tensor(index)
    length = index.type.shape
    is_order = isinstance(index.owner_op, ArgSortOp)
    is_long = length and None not in length and isinstance(size, int) and prod(length) >= size
    if is_order or is_long:
        raise Refusal("as many rows or columns are taken as there are", "index the factors")


def _unravel(index, sizes):
    """Return the indices into the factors of an index into the product.

    Quotients are rounded down, so that an index from the end is one for the first factor too, and
    one that is out of bounds is out of the bounds of the first factor, which raises the error.
    """
    indices = []
    for size in reversed(sizes[1:]):
        indices.append(index % size)
        index = index // size
    return [index, *reversed(indices)]
