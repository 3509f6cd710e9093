"""Large matrices as sums of terms that are never formed.

The gradient of something that holds a Kronecker product is, as a graph, a matrix of the size of
that product: an outer product, an inverse, a multiple of the identity, or a sum of such things.
`terms_of` reads such a graph as a sum of records, and the functions below do with the records
what would be done with the matrices, one factor at a time. The graph stays the operator: a
record holds variables of the graph and nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import numpy as np
from pytensor import tensor as pt
from pytensor.assumptions.specify import SpecifyAssumptions
from pytensor.graph.basic import Constant, Variable
from pytensor.scalar.basic import Add, Cast, Mul, Neg, Second, Sub, TrueDiv
from pytensor.tensor.basic import Alloc, AllocDiag, Eye
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.inverse import MatrixInverse, MatrixPinv
from pytensor.tensor.linalg.products import Expm, KroneckerProduct
from pytensor.tensor.linalg.solvers.core import SolveBase
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.shape import Reshape, SpecifyShape
from pytensor.tensor.subtensor import (
    AdvancedIncSubtensor,
    IncSubtensor,
    indices_from_subtensor,
)
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import (
    apply_to_columns,
    factors_batch_ndim,
    kron,
    kron_matmul,
    kron_of_vectors,
)
from pymc_kron.sizes import Sizes, few_indices
from pymc_kron.structure import (
    Matrices,
    Refusal,
    Size,
    column_sizes,
    eye_sizes,
    is_narrow_integer,
    is_scalar,
    kron_factors,
    reciprocal,
    row_sizes,
    split_scalars,
    strip_transposes,
)


@dataclass(frozen=True)
class Product:
    """The term ``c (L_1 (x) ... (x) L_d) diag(v) (R_1 (x) ... (x) R_d)'``.

    Attributes
    ----------
    left, right
        The factors, or None for an identity matrix.
    diagonal
        The vector ``v``, ``(..., n_1*...*n_d)``, or None for ones. A product without it has no
        `right` factors either.
    scales
        Scalars, ``(...)``, whose product is ``c``.
    """

    left: Matrices | None = None
    diagonal: TensorVariable | None = None
    right: Matrices | None = None
    scales: Matrices = ()

    @property
    def is_kron(self) -> bool:
        """Whether the term is a Kronecker product of its left factors, or the identity."""
        return self.diagonal is None


@dataclass(frozen=True)
class LowRank:
    """The term ``c U V'``, entry by entry times ``W_1 (x) ... (x) W_d``.

    Attributes
    ----------
    left, right
        ``U`` and ``V``, ``(..., N, r)`` and ``(..., M, r)``.
    weights
        The factors ``W_i``, or None for ones.
    scales
        As in `Product`.
    """

    left: TensorVariable
    right: TensorVariable
    weights: Matrices | None = None
    scales: Matrices = ()

    def may_be_narrower_than(self, n_vectors: int | None) -> bool:
        """Whether ``U`` and ``V`` may hold fewer than some number of vectors, if that is known.

        Not every matrix is: some unit vectors, zeros with a few ones, are the product of themselves
        and an identity matrix.
        """
        ranks = {self.left.type.shape[-1], self.right.type.shape[-1]} - {None}
        return n_vectors is None or not ranks or min(ranks) < n_vectors


@dataclass(frozen=True)
class Entries:
    """A matrix of zeros but for the entries ``c values[t]`` at ``(rows[t], columns[t])``."""

    rows: TensorVariable
    columns: TensorVariable
    values: TensorVariable
    scales: Matrices = ()


type Term = Product | LowRank | Entries
type Terms = tuple[Term, ...]

# Sums of more terms are as good as not known. Multiplied out, they grow exponentially
MAX_TERMS = 100


# Reading a graph


def terms_of(var: TensorVariable, sizes: Sizes | None = None) -> Terms | None:
    """Return the terms that a matrix is the sum of, or None if one of them is not known.

    Parameters
    ----------
    var
        The matrix, ``(..., N, M)``.
    sizes
        What is known about sizes, by default from the matrix alone.

    Raises
    ------
    Refusal
        If the sizes of factors that are multiplied aren't known to agree.
    """
    sizes = Sizes(var) if sizes is None else sizes
    core, transposed = strip_transposes(var)
    if core.type.ndim < 2:
        return None
    terms = sizes.once(_terms_of_core, core)
    if terms is None or not transposed:
        return terms
    return tuple(map(transposed_term, terms))


def _terms_of_core(var: TensorVariable, sizes: Sizes) -> Terms | None:
    if var.type.numpy_dtype.kind == "u":
        return None
    factors = kron_factors(var)
    if factors is not None:
        return None if is_narrow_integer(var) else (_multiple_of_product(factors),)
    if eye_sizes(var) is not None:
        return (Product(),) if sizes.is_square(var) else None
    if isinstance(var, Constant):
        return _terms_of_constant(var)
    match var.owner_op_and_inputs:
        case (SpecifyAssumptions() | SpecifyShape() | Elemwise(scalar_op=Cast()), matrix, *_):
            return terms_of(matrix, sizes)
        case (Elemwise(scalar_op=Neg()), matrix):
            return _scaled(terms_of(matrix, sizes), pt.constant(-1, dtype=matrix.type.dtype))
        case (Elemwise(scalar_op=Add()), *matrices):
            return _concatenated([_broadcast_terms(matrix, var, sizes) for matrix in matrices])
        case (Elemwise(scalar_op=Sub()), plus, minus):
            minus_one = pt.constant(-1, dtype=var.type.dtype)
            return _concatenated(
                [
                    _broadcast_terms(plus, var, sizes),
                    _scaled(_broadcast_terms(minus, var, sizes), minus_one),
                ]
            )
        case (Elemwise(scalar_op=TrueDiv()), matrix, divisor) if (
            divisor.type.ndim < 2 or 1 in divisor.type.shape[-2:]
        ):
            return _terms_of_elementwise_product([matrix, reciprocal(divisor, var)], sizes)
        case (Elemwise(scalar_op=TrueDiv()), matrix, divisor):
            divisors = kron_factors(divisor)
            if divisors is None:
                return None
            inverted = kron(*(reciprocal(factor, var) for factor in divisors))
            return _terms_of_elementwise_product([matrix, inverted], sizes)
        case (Elemwise(scalar_op=Mul()), *matrices):
            return _terms_of_elementwise_product(matrices, sizes)
        case (Elemwise(scalar_op=Second()), like, value):
            return _broadcast_terms(value, like, sizes)
        case (Alloc(), value, *_):
            return _broadcast_terms(value, var, sizes)
        case (AllocDiag(offset=0, axis2=axis2), diagonal) if axis2 == var.type.ndim - 1:
            return (Product(diagonal=diagonal),)
        case (Blockwise(core_op=AllocDiag(offset=0, axis1=0, axis2=1)), diagonal):
            return (Product(diagonal=diagonal),)
        case (Dot() | Blockwise(core_op=Dot()), left, right):
            return _terms_of_matmul(left, right, sizes)
        case (
            IncSubtensor(set_instead_of_inc=False)
            | AdvancedIncSubtensor(set_instead_of_inc=False) as op,
            matrix,
            *added,
        ) if not _is_zero(matrix):
            # A sum, as PyTensor writes those of zeros with some entries set
            entries = op(pt.zeros_like(matrix), *added)
            return _concatenated([terms_of(matrix, sizes), terms_of(entries, sizes)])
        case (IncSubtensor() as op, zeros, value, *indices) if _is_zero(zeros):
            return _terms_of_entries(op, zeros, value, indices, sizes)
        case (DimShuffle(new_order=(*batch, 0, 1)), moved) if batch == [*range(2, var.type.ndim)]:
            terms = _terms_of_batched_diagonal(moved, sizes)
            kept = [axis - 2 for axis in batch]
            return _terms_of_rearranged_batch(terms, moved.type.ndim - 2, kept)
        case (
            AdvancedIncSubtensor(idx_list=(int(), int()), set_instead_of_inc=False),
            zeros,
            values,
            rows,
            columns,
        ) if _is_zero(zeros) and {"bool"}.isdisjoint({rows.type.dtype, columns.type.dtype}):
            entries = pt.broadcast_arrays(rows, columns, values)
            return (Entries(*(array.ravel() for array in entries)),)
        case (
            AdvancedIncSubtensor(
                idx_list=(slice(start=None, stop=None, step=None), int()), set_instead_of_inc=False
            ),
            zeros,
            columns,
            order,
        ) if _is_zero(zeros) and zeros.type.ndim == 2 and order.type.dtype != "bool":
            return _terms_of_reordered(terms_of(columns, sizes), zeros, order)
        case (
            AdvancedIncSubtensor(idx_list=(int(),), set_instead_of_inc=False),
            zeros,
            rows,
            order,
        ) if (
            _is_zero(zeros)
            and zeros.type.ndim == rows.type.ndim == 2
            and order.type.dtype != "bool"
        ):
            reordered = _terms_of_reordered(terms_of(rows.mT, sizes), zeros.mT, order)
            return reordered and tuple(map(transposed_term, reordered))
        case (DimShuffle(new_order=(*order, int(i), int(j))), batch) if [i, j] == [
            batch.type.ndim - 2,
            batch.type.ndim - 1,
        ]:
            return _terms_of_rearranged_batch(terms_of(batch, sizes), batch.type.ndim - 2, order)
        case (Sum(axis=tuple(axes)), batch) if max(axes, default=0) < batch.type.ndim - 2:
            return _terms_of_batch_sum(terms_of(batch, sizes), batch.type.ndim, axes)
        case (Reshape(ndim=2), vector, _):
            return sizes.once(_terms_of_reshaped, vector, var)
    return None


def _terms_of_constant(var: Constant) -> Terms | None:
    """Return a square diagonal matrix as a term, if the constant is one."""
    *batch, rows, columns = var.data.shape
    if prod(batch) != 1 or rows != columns:
        return None
    matrix = var.data.reshape((rows, columns))
    diagonal = matrix.diagonal()
    if np.count_nonzero(matrix) > np.count_nonzero(diagonal):
        return None
    return (Product(diagonal=pt.constant(diagonal)),)


def _multiple_of_product(factors: Matrices) -> Product:
    """Split ``c A (x) B`` into the factors ``A``, ``B`` and the scalar ``c``."""
    cores, scales = zip(*map(split_scalars, factors), strict=True)
    return Product(cores, scales=tuple(map(batch_scalar, chain(*scales))))


def batch_scalar(var: TensorVariable) -> TensorVariable:
    """Return a variable that has one entry along its last two axes without these axes."""
    return var.squeeze(tuple(range(-min(var.type.ndim, 2), 0)))


def _is_zero(var: TensorVariable) -> bool:
    match var.owner_op_and_inputs:
        case (Elemwise(scalar_op=Second()), _, value) | (Alloc(), value, *_):
            return _is_zero(value)
        case (DimShuffle(), value):
            return _is_zero(value)
    return isinstance(var, Constant) and not np.any(var.data)


def _scaled(terms: Terms | None, scale: TensorVariable) -> Terms | None:
    if terms is None:
        return None
    return tuple(replace(term, scales=(*term.scales, scale)) for term in terms)


def _concatenated(parts: Sequence[Terms | None]) -> Terms | None:
    terms: Terms = ()
    for part in parts:
        if part is None or len(terms) + len(part) > MAX_TERMS:
            return None
        terms += part
    return terms


def _broadcast_terms(var: TensorVariable, like: TensorVariable, sizes: Sizes) -> Terms | None:
    """Return the terms of a variable that is broadcast to the shape of a matrix."""
    rows_differ, columns_differ = (
        broadcast and size != 1
        for broadcast, size in zip(
            (True, True, *var.type.broadcastable)[-2:], like.type.shape[-2:], strict=True
        )
    )
    if not (rows_differ or columns_differ):
        return terms_of(var, sizes)
    if _is_zero(var):
        return ()
    var = pt.atleast_2d(var)
    rows, columns = row_sizes([like]) + column_sizes([like])
    dtype = var.type.dtype
    if rows_differ and columns_differ:
        ones = LowRank(pt.ones((rows, 1), dtype=dtype), pt.ones((columns, 1), dtype=dtype))
        return _scaled((ones,), batch_scalar(var))
    if rows_differ:
        return (LowRank(pt.ones((rows, 1), dtype=dtype), var.mT),)
    return (LowRank(var, pt.ones((columns, 1), dtype=dtype)),)


def _terms_of_elementwise_product(inputs: Matrices, sizes: Sizes) -> Terms | None:
    scalars = [inp for inp in inputs if is_scalar(inp)]
    columns: list[TensorVariable] = []
    rows: list[TensorVariable] = []
    matrices: list[TensorVariable] = []
    for inp in inputs:
        if inp not in scalars:
            is_row, is_column = inp.type.broadcastable[-2:] if inp.type.ndim > 1 else (True, False)
            (rows if is_row else columns if is_column else matrices).append(inp)

    terms: Terms | None
    if matrices:
        terms = terms_of(matrices[0], sizes)
        for matrix in matrices[1:]:
            terms = _pairwise(elementwise_product, terms, terms_of(matrix, sizes))
        if terms is not None:
            terms = _all_known(_with_scaled_axes(term, columns, rows) for term in terms)
    elif columns and rows:
        terms = (_outer_product(columns, rows),)
    else:
        return None
    for scalar in scalars:
        terms = _scaled(terms, batch_scalar(scalar))
    return terms


def _with_scaled_axes(term: Term, columns: Matrices, rows: Matrices) -> Term | None:
    """Multiply the rows of a term by columns, and its columns by rows."""
    if columns and rows and isinstance(term, Product) and term.is_kron and term.left is not None:
        return elementwise_product(term, _outer_product(columns, rows))
    result: Term | None = term
    for column in columns:
        result = result and multiply(Product(diagonal=column[..., 0]), result)
    for row in rows:
        result = result and multiply(result, Product(diagonal=pt.atleast_2d(row)[..., 0, :]))
    return result


def _outer_product(columns: Matrices, rows: Matrices) -> LowRank:
    right = pt.atleast_2d(prod(rows[1:], start=rows[0])).mT
    return LowRank(prod(columns[1:], start=columns[0]), right)


def _terms_of_matmul(left: TensorVariable, right: TensorVariable, sizes: Sizes) -> Terms | None:
    if is_scalar(left) or is_scalar(right):
        scalar, matrix = (left, right) if is_scalar(left) else (right, left)
        return _scaled(terms_of(matrix, sizes), batch_scalar(scalar))
    left_terms, right_terms = terms_of(left, sizes), terms_of(right, sizes)
    if left_terms is None and right_terms is None:
        if is_unread(left, sizes) or is_unread(right, sizes):
            return None
        return (LowRank(left, right.mT),)
    if left_terms is None or right_terms is None:
        # (U V') X = U (X' V)', whatever X is
        known = right_terms if left_terms is None else left_terms
        low_rank = [term for term in known or () if isinstance(term, LowRank) and not term.weights]
        if len(low_rank) < len(known or ()):
            return None
        if left_terms is None:
            return tuple(replace(term, left=left @ term.left) for term in low_rank)
        return tuple(replace(term, right=right.mT @ term.right) for term in low_rank)
    return _pairwise(multiply, left_terms, right_terms)


def may_have_factors(var: TensorVariable, sizes: Sizes) -> bool:
    """Whether some term of a matrix may be a `Product`, without a look at what the terms are.

    That is quickly said: a product of two matrices has such terms only if both have some.
    """
    core, _ = strip_transposes(var)
    return sizes.once(_may_core_have_factors, core)


def _may_core_have_factors(var: TensorVariable, sizes: Sizes) -> bool:
    if isinstance(var, Constant):
        return var.type.ndim > 1 and _terms_of_constant(var) is not None
    match var.owner_op_and_inputs:
        case (op, *_) if isinstance(getattr(op, "core_op", op), KroneckerProduct | Eye | AllocDiag):
            return True
        case (Dot() | Blockwise(core_op=Dot()), left, right) if not (
            is_scalar(left) or is_scalar(right)
        ):
            return may_have_factors(left, sizes) and may_have_factors(right, sizes)
        case (_, *inputs):
            arrays = (inp for inp in inputs if isinstance(inp, TensorVariable))
            return any(may_have_factors(inp, sizes) for inp in arrays if not is_scalar(inp))
    return False


def is_unread(var: TensorVariable, sizes: Sizes) -> bool:
    """Whether a matrix is computed from one with known terms, and may have them after a rewrite.

    The inverse of a Kronecker product is one once it has been rewritten. Before that, it isn't to
    be taken for any matrix.
    """
    core, _ = strip_transposes(var)
    return sizes.once(_is_core_unread, core)


def _is_core_unread(var: TensorVariable, sizes: Sizes) -> bool:
    match var.owner_op_and_inputs:
        case (Blockwise(core_op=MatrixInverse() | MatrixPinv() | Expm()), matrix):
            return terms_of(matrix, sizes) is not None
        case (Blockwise(core_op=SolveBase(b_ndim=2)), _, columns):
            return terms_of(columns, sizes) is not None
        case (Dot() | Blockwise(core_op=Dot()), left, right):
            return is_unread(left, sizes) or is_unread(right, sizes)
    return False


def _pairwise(
    operation: Callable[[Term, Term], Term | None], lefts: Terms | None, rights: Terms | None
) -> Terms | None:
    if lefts is None or rights is None or len(lefts) * len(rights) > MAX_TERMS:
        return None
    return _all_known(operation(left, right) for left in lefts for right in rights)


def _all_known(terms: Iterable[Term | None]) -> Terms | None:
    known: Terms = ()
    for term in terms:
        if term is None:
            return None
        known += (term,)
    return known


def _terms_of_entries(
    op: IncSubtensor,
    zeros: TensorVariable,
    value: TensorVariable,
    indices: Sequence[Variable],
    sizes: Sizes,
) -> Terms | None:
    """Return the terms of zeros with some of the entries set, the gradient of an indexing.

    Of a row, a column, an entry, or a block with few rows or columns: of each matrix of a batch, or
    of some.
    """
    whole = slice(None, None, None)
    taken = [*indices_from_subtensor(indices, op.idx_list)]
    taken += [whole] * (zeros.type.ndim - len(taken))
    batch, (row, column) = taken[:-2], taken[-2:]
    shape = tuple(zeros.shape)
    batch_shape, (n_rows, n_columns) = shape[:-2], shape[-2:]
    if not isinstance(row, slice):
        right = _set_in_zeros(value, (*batch_shape, n_columns), (*batch, column))
        return (LowRank(_unit_vector(row, n_rows, zeros), right[..., None]),)
    if not isinstance(column, slice):
        left = _set_in_zeros(value, (*batch_shape, n_rows), (*batch, row))
        return (LowRank(left[..., None], _unit_vector(column, n_columns, zeros)),)
    match value.owner_op_and_inputs:
        case (AllocDiag(offset=0), diagonal) if (
            zeros.type.ndim == 2 and row.step is None and column.step is None
        ):
            return _terms_of_shifted_diagonal(diagonal, row, column, zeros, sizes)
    few_rows, few_columns = map(few_indices, (row, column), zeros.type.shape[-2:])
    if few_rows is not None:
        rank = len(few_rows)
        units = _set_in_zeros(pt.eye(rank, dtype=zeros.type.dtype), (n_rows, rank), (row,))
        right = _set_in_zeros(value, (*batch_shape, rank, n_columns), (*batch, whole, column))
        return (LowRank(units, right.mT),)
    if few_columns is not None:
        rank = len(few_columns)
        units = _set_in_zeros(pt.eye(rank, dtype=zeros.type.dtype), (n_columns, rank), (column,))
        left = _set_in_zeros(value, (*batch_shape, n_rows, rank), (*batch, row, whole))
        return (LowRank(left, units),)
    return None


def _set_in_zeros(
    value: TensorVariable, shape: Sequence[Size], taken: Sequence[Variable | slice]
) -> TensorVariable:
    """Return zeros with some entries set, to a value that may be one number for all of them."""
    return pt.zeros(shape, dtype=value.type.dtype)[tuple(taken)].set(value)


def _terms_of_reordered(
    terms: Terms | None, zeros: TensorVariable, order: TensorVariable
) -> Terms | None:
    """Return the terms of zeros with columns added, the gradient of columns in another order."""
    reordered: Terms = ()
    for term in terms or ():
        match term:
            case LowRank(right=right, weights=None):
                rows = pt.zeros((zeros.shape[1], right.shape[1]), dtype=right.type.dtype)
                reordered += (replace(term, right=rows[order].inc(right)),)
            case _:
                return None
    return None if terms is None else reordered


def _terms_of_rearranged_batch(
    terms: Terms | None, batch_ndim: int, order: Sequence[int | str]
) -> Terms | None:
    """Return the terms of a batch in another order of its axes, with other axes of length one.

    Parameters
    ----------
    terms
        The terms of the batch as it is.
    batch_ndim
        The number of its axes.
    order
        As in `DimShuffle`: for each axis of the result, an axis of the batch or ``"x"``. Axes that
        aren't in it have length one.
    """
    dropped = [axis for axis in range(batch_ndim) if axis not in order]

    def rearranged(batch: TensorVariable, core_ndim: int) -> TensorVariable:
        batch = pt.shape_padleft(batch, batch_ndim + core_ndim - batch.type.ndim)
        kept = batch[tuple(0 if axis in dropped else slice(None) for axis in range(batch_ndim))]
        moved = [
            axis - sum(d < axis for d in dropped) if isinstance(axis, int) else axis
            for axis in order
        ]
        return kept.dimshuffle(*moved, *range(kept.type.ndim - core_ndim, kept.type.ndim))

    def rearranged_factors(factors: Matrices | None) -> Matrices | None:
        return factors and tuple(rearranged(factor, 2) for factor in factors)

    matrices: Terms = ()
    for term in terms or ():
        scales = tuple(rearranged(scale, 0) for scale in term.scales)
        match term:
            case LowRank(left=left, right=right, weights=weights):
                left, right = rearranged(left, 2), rearranged(right, 2)
                matrices += (LowRank(left, right, rearranged_factors(weights), scales),)
            case Product(left=left, diagonal=diagonal, right=right):
                diagonal = None if diagonal is None else rearranged(diagonal, 1)
                left, right = rearranged_factors(left), rearranged_factors(right)
                matrices += (Product(left, diagonal, right, scales),)
            case _:
                return None
    return None if terms is None else matrices


def _terms_of_batch_sum(terms: Terms | None, ndim: int, axes: tuple[int, ...]) -> Terms | None:
    """Return the terms of a sum of matrices: ``sum_i U_i V_i' = [U_1 U_2 ...] [V_1 V_2 ...]'``."""
    n_axes = len(axes)

    def side_by_side(batch: TensorVariable) -> TensorVariable:
        columns = pt.moveaxis(batch, axes, range(ndim - 1 - n_axes, ndim - 1))
        return pt.join_dims(columns, start_axis=ndim - 1 - n_axes, n_axes=n_axes + 1)

    def summed_broadcastable(batch: TensorVariable) -> list[bool]:
        return [batch.type.broadcastable[axis] for axis in axes]

    summed: Terms = ()
    for term in terms or ():
        match term:
            case LowRank(left=left, right=right, weights=None):
                # A scalar for each matrix of the batch gives its dimensions to the left
                left = scaled(left, term, 2)
                if not left.type.ndim == right.type.ndim == ndim or (
                    summed_broadcastable(left) != summed_broadcastable(right)
                ):
                    return None
                summed += (LowRank(side_by_side(left), side_by_side(right)),)
            case _:
                return None
    return None if terms is None else summed


def _unit_vector(index: Variable, size: Size, zeros: TensorVariable) -> TensorVariable:
    """Return a column with a one."""
    return pt.zeros((size, 1), dtype=zeros.type.dtype)[index].set(1)


def _terms_of_batched_diagonal(var: TensorVariable, sizes: Sizes) -> Terms | None:
    """Return the terms of a gradient in diagonals, with the batch axes behind the others."""
    match var.owner_op_and_inputs:
        case (AllocDiag(offset=0, axis1=0, axis2=1), diagonal):
            return (Product(diagonal=diagonal),)
        case (IncSubtensor() as op, zeros, value, *indices) if _is_zero(zeros):
            match value.owner_op_and_inputs, indices_from_subtensor(indices, op.idx_list):
                case (
                    (AllocDiag(offset=0, axis1=0, axis2=1), diagonal),
                    (slice(step=None) as rows, slice(step=None) as columns),
                ):
                    size = sizes.of(diagonal, diagonal.type.ndim - 1)
                    is_whole = sizes.of(zeros, 0) == sizes.of(zeros, 1) == size
                    if is_whole and _starts((rows, columns)) == [0, 0]:
                        return (Product(diagonal=diagonal),)
    return None


def _starts(slices: Iterable[slice]) -> list[int] | None:
    """Return where slices start, or None if that isn't known."""
    starts = []
    for part in slices:
        match part.start:
            case None:
                starts.append(0)
            case int(start) | Constant(data=start):
                starts.append(int(start))
            case _:
                return None
    return starts


def _terms_of_shifted_diagonal(
    diagonal: TensorVariable, rows: slice, columns: slice, zeros: TensorVariable, sizes: Sizes
) -> Terms | None:
    starts = _starts((rows, columns))
    if starts is None:
        return None
    shape = sizes.of(zeros, 0), sizes.of(zeros, 1)
    if starts == [0, 0] and shape == (sizes.of(diagonal, 0),) * 2:
        return (Product(diagonal=diagonal),)
    positions = pt.arange(diagonal.shape[0])
    return (Entries(positions + starts[0], positions + starts[1], diagonal),)


def _terms_of_reshaped(var: TensorVariable, like: TensorVariable, sizes: Sizes) -> Terms | None:
    """Return the terms of a matrix that was raveled and is put into its shape again."""
    core, _ = strip_transposes(var) if 1 in var.type.shape else (var, False)
    parts: list[Terms | None]
    match core.owner_op_and_inputs:
        case (Reshape(), matrix, _) if matrix.type.ndim == 2 and all(
            sizes.of(matrix, axis) == sizes.of(like, axis) for axis in (0, 1)
        ):
            return terms_of(matrix, sizes)
        case (Elemwise(scalar_op=Add()), *vectors):
            parts = [sizes.once(_terms_of_reshaped, vector, like) for vector in vectors]
            return _concatenated(parts)
        case (Elemwise(scalar_op=Sub()), plus, minus):
            minus_one = pt.constant(-1, dtype=core.type.dtype)
            subtracted = _scaled(sizes.once(_terms_of_reshaped, minus, like), minus_one)
            return _concatenated([sizes.once(_terms_of_reshaped, plus, like), subtracted])
        case (Elemwise(scalar_op=Neg()), vector):
            minus_one = pt.constant(-1, dtype=core.type.dtype)
            return _scaled(sizes.once(_terms_of_reshaped, vector, like), minus_one)
        case (Elemwise(scalar_op=TrueDiv()), vector, scalar) if is_scalar(scalar):
            return _scaled(
                sizes.once(_terms_of_reshaped, vector, like), reciprocal(batch_scalar(scalar), core)
            )
        case (Dot() | Blockwise(core_op=Dot()) | Elemwise(scalar_op=Mul()), left, right):
            if is_scalar(left) != is_scalar(right):
                scalar, vector = (left, right) if is_scalar(left) else (right, left)
                return _scaled(sizes.once(_terms_of_reshaped, vector, like), batch_scalar(scalar))
    return None


# Calculating with terms


def transposed_term(term: Term) -> Term:
    """Return the transpose of a term."""
    match term:
        case Product(left=left, diagonal=None) if left is not None:
            return replace(term, left=tuple(factor.mT for factor in left))
        case Product(left=left, right=right):
            return replace(term, left=right, right=left)
        case LowRank(left=left, right=right, weights=weights):
            weights = None if weights is None else tuple(weight.mT for weight in weights)
            return replace(term, left=right, right=left, weights=weights)
        case Entries(rows=rows, columns=columns):
            return replace(term, rows=columns, columns=rows)


def scaled(values: TensorVariable, term: Term, core_ndim: int) -> TensorVariable:
    """Multiply an array, with that many core dimensions, by the scalar of a term."""
    for scale in term.scales:
        values = scale[(..., *(None,) * core_ndim)] * values
    return values


def multiply(left: Term, right: Term) -> Term | None:
    """Return the matrix product of two terms, if it is a term again."""
    scales = (*left.scales, *right.scales)
    match left, right:
        case (LowRank(weights=None), _) if not isinstance(right, Entries):
            columns = apply(transposed_term(replace(right, scales=())), left.right)
            return replace(left, right=columns, scales=scales)
        case (_, LowRank(weights=None)) if not isinstance(left, Entries):
            columns = apply(replace(left, scales=()), right.left)
            return replace(right, left=columns, scales=scales)
        case (Product(is_kron=True), Product()):
            return replace(right, left=_mixed(left.left, right.left), scales=scales)
        case (Product(), Product(is_kron=True)):
            factors = None if right.left is None else tuple(factor.mT for factor in right.left)
            return replace(left, right=_mixed(factors, left.right), scales=scales)
        case (Product(right=None), Product(left=None)):
            # Both have a diagonal, or they would be Kronecker products
            return Product(left.left, left.diagonal * right.diagonal, right.right, scales)  # type: ignore[operator]
    return None


def _mixed(lefts: Matrices | None, rights: Matrices | None) -> Matrices | None:
    """Return the factors of a product of Kronecker products, None standing for the identity."""
    if lefts is None or rights is None:
        return rights if lefts is None else lefts
    require_agreement(lefts, -1, rights, -2)
    return tuple(left @ right for left, right in zip(lefts, rights, strict=True))


def elementwise_product(left: Term, right: Term) -> Term | None:
    """Return the product of two terms entry by entry, if it is a term again."""
    scales = (*left.scales, *right.scales)
    match left, right:
        case (Product(is_kron=True, left=lefts), Product(is_kron=True, left=rights)):
            if lefts is None or rights is None:
                return None
            _require_same_shapes(lefts, rights)
            products = tuple(a * b for a, b in zip(lefts, rights, strict=True))
            return Product(products, scales=scales)
        case (LowRank(), Product(is_kron=True, left=factors)) if factors is not None:
            weights = factors
            if left.weights is not None:
                _require_same_shapes(left.weights, factors)
                weights = tuple(a * b for a, b in zip(left.weights, factors, strict=True))
            return replace(left, weights=weights, scales=scales)
        case (Product(), LowRank()):
            return elementwise_product(right, left)
    return None


def apply(term: Term, columns: TensorVariable) -> TensorVariable:
    """Return the product of a term and a matrix, ``(N,M),(M,r)->(N,r)``."""
    match term:
        case Product(left=left, diagonal=diagonal, right=right):
            result = columns
            if right is not None:
                result = kron_matmul([factor.mT for factor in right], result, x_ndim=2)
            if diagonal is not None:
                result = diagonal[..., None] * result
            if left is not None:
                result = kron_matmul(left, result, x_ndim=2)
        case LowRank(left=left, right=right, weights=None):
            result = left @ (right.mT @ columns)
        case _:
            raise Refusal(f"a product with {type(term).__name__} terms isn't implemented")
    return scaled(result, term, 2)


def diagonal_of(term: Term) -> TensorVariable:
    """Return the diagonal of a square term, ``(N,N)->(N)``, and a scalar for an identity."""
    match term:
        case LowRank(left=left, right=right, weights=None):
            result = (left * right).sum(axis=-1)
        case Product(left=None, right=None, diagonal=diagonal):
            result = pt.ones(()) if diagonal is None else diagonal
        case Product(left=None):
            return diagonal_of(transposed_term(term))
        case Product(left=left, right=right, diagonal=diagonal) if left is not None:
            if diagonal is None or right is None:
                diagonals = [pt.diagonal(factor, axis1=-2, axis2=-1) for factor in left]
                result = kron_of_vectors(diagonals)
                result = result if diagonal is None else result * diagonal
            else:
                products = [a * b for a, b in zip(left, right, strict=True)]
                result = kron_matmul(products, diagonal)
        case _:
            raise Refusal(f"the diagonal of {type(term).__name__} terms isn't implemented")
    return scaled(result, term, 1)


def inner(left: Term, right: Term) -> TensorVariable:
    """Return the sum of the products of the entries of two terms, ``(N,M),(N,M)->()``."""
    scales = (*left.scales, *right.scales)
    unscaled = replace(left, scales=()), replace(right, scales=())
    match unscaled:
        case (LowRank(weights=None) as low_rank, other) if not isinstance(other, Entries):
            result = (low_rank.left * apply(other, low_rank.right)).sum(axis=(-2, -1))
        case (other, LowRank(weights=None) as low_rank) if not isinstance(other, Entries):
            result = (low_rank.left * apply(other, low_rank.right)).sum(axis=(-2, -1))
        case (term, Product(is_kron=True, left=factors)) if factors is not None:
            result = _inner_with_kron(term, factors)
        case (Product(is_kron=True, left=factors), term) if factors is not None:
            result = _inner_with_kron(term, factors)
        case (Product(left=None, right=None), Product() as product) | (
            Product() as product,
            Product(left=None, right=None),
        ):
            weights = unscaled[0] if product is unscaled[1] else unscaled[1]
            diagonal = diagonal_of(product)
            diagonal = diagonal if weights.diagonal is None else diagonal * weights.diagonal
            if diagonal.type.ndim == 0:
                raise Refusal("the trace of an identity matrix is a number: write it down")
            result = diagonal.sum(axis=-1)
        case _:
            raise Refusal("the inner product of these two matrices isn't implemented")
    return scaled(result, Product(scales=scales), 0)


def _inner_with_kron(term: Term, factors: Matrices) -> TensorVariable:
    match term:
        case Product(left=left, diagonal=diagonal, right=right):
            parts = _diagonals_between(left, factors, right)
            if diagonal is None:
                sums = [part.sum(axis=-1) for part in parts]
                return prod(sums[1:], start=sums[0])
            together = kron_of_vectors(parts)
            return (together * diagonal).sum(axis=-1)
        case Entries(rows=rows, columns=columns, values=values):
            entries = values
            for factor, i, j in zip(
                factors,
                _unravelled(rows, row_sizes(factors)),
                _unravelled(columns, column_sizes(factors)),
                strict=True,
            ):
                entries = entries * factor[i, j]
            return entries.sum(axis=-1)
    raise Refusal("the inner product of these two matrices isn't implemented")


def _diagonals_between(
    left: Matrices | None, factors: Matrices, right: Matrices | None
) -> list[TensorVariable]:
    """Return ``diag(L_i' F_i R_i)`` for each factor, or the column sums of ``L_i * F_i``."""
    if left is None and right is None:
        return [pt.diagonal(factor, axis1=-2, axis2=-1) for factor in factors]
    if left is None:
        assert right is not None
        return _diagonals_between(right, [factor.mT for factor in factors], None)
    if right is None:
        return [(a * b).sum(axis=-2) for a, b in zip(left, factors, strict=True)]
    return [(a * (f @ b)).sum(axis=-2) for a, f, b in zip(left, factors, right, strict=True)]


def contract(term: Term, factors: Matrices, start: int, stop: int) -> TensorVariable:
    """Return the gradient in some factors of a Kronecker product, given that in the product.

    ``sum(G * (A (x) X (x) B))`` is linear in ``X``; its coefficients, as a matrix, are returned.
    Where ``G`` is an outer product of ``u`` and ``v``, they are ``U (A (x) B) V'``, with ``u``
    and ``v`` as matrices with a row for each index of ``X``.

    Parameters
    ----------
    term
        The term ``G``.
    factors
        All factors of the product.
    start, stop
        ``X`` stands for the factors from `start` up to `stop`.
    """
    before, group, after = factors[:start], factors[start:stop], factors[stop:]
    match term:
        case LowRank(left=left, right=right, weights=weights):
            if weights is not None:
                weighted = [a * b for a, b in zip(weights, factors, strict=True)]
                before, after = weighted[:start], weighted[stop:]
            result = _contract_low_rank(left, right, before, group, after)
            if weights is not None:
                result = result * kron(*weights[start:stop])
        case Product():
            result = _contract_product(term, factors, start, stop)
        case Entries(rows=rows, columns=columns, values=values):
            result = _contract_entries(rows, columns, values, before, group, after)
    return scaled(result, term, 2)


def _contract_low_rank(
    left: TensorVariable,
    right: TensorVariable,
    before: Matrices,
    group: Matrices,
    after: Matrices,
) -> TensorVariable:
    group_rows, group_columns = prod(row_sizes(group)), prod(column_sizes(group))
    others = [*before, *after]
    maps = [
        *(factor.__matmul__ for factor in before),
        lambda columns: columns,
        *(factor.__matmul__ for factor in after),
    ]
    out_sizes = (*row_sizes(before), group_columns, *row_sizes(after))
    mapped = apply_to_columns(
        maps,
        (*column_sizes(before), group_columns, *column_sizes(after)),
        out_sizes,
        right,
        batch_ndim=max(0, factors_batch_ndim(others)) if others else 0,
    )
    n_before, n_after = prod(row_sizes(before)), prod(row_sizes(after))
    [rank] = column_sizes([left])

    def unfolded(columns: TensorVariable, size: Size) -> TensorVariable:
        batch = tuple(columns.shape)[:-2]
        if n_before == 1:
            return columns.reshape((*batch, size, n_after * rank))
        grid = pt.moveaxis(columns.reshape((*batch, n_before, size, n_after * rank)), -2, -3)
        return grid.reshape((*batch, size, n_before * n_after * rank))

    return unfolded(left, group_rows) @ unfolded(mapped, group_columns).mT


def _contract_product(term: Product, factors: Matrices, start: int, stop: int) -> TensorVariable:
    left, diagonal, right = term.left, term.diagonal, term.right
    others = [*factors[:start], *factors[stop:]]

    def other_factors(matrices: Matrices | None) -> list[TensorVariable] | None:
        return None if matrices is None else [*matrices[:start], *matrices[stop:]]

    parts = _diagonals_between(other_factors(left), others, other_factors(right))
    if diagonal is None:
        sums = [part.sum(axis=-1) for part in parts]
        weight = prod(sums[1:], start=sums[0])[..., None, None]
        if left is None:
            sizes = row_sizes(factors[start:stop])
            return weight * pt.eye(prod(sizes), dtype=weight.type.dtype)
        return weight * kron(*left[start:stop])

    # Sum the diagonal over the axes of the other factors, with their weights
    sizes = column_sizes(left or right or factors)
    before, group, after = sizes[:start], prod(sizes[start:stop]), sizes[stop:]
    maps = [part[..., None, :].__matmul__ for part in parts]
    maps.insert(start, lambda columns: columns)
    summed = apply_to_columns(
        maps,
        (*before, group, *after),
        (*(1 for _ in before), group, *(1 for _ in after)),
        diagonal[..., None],
        batch_ndim=max(part.type.ndim for part in parts) - 1,
    )[..., 0]
    if left is None and right is None:
        return pt.vectorize(pt.diag, "(n)->(n,n)")(summed)
    result = None if left is None else kron(*left[start:stop]) * summed[..., None, :]
    if right is None:
        return result
    columns = kron(*right[start:stop])
    if result is None:
        return (columns * summed[..., None, :]).mT
    return result @ columns.mT


def _contract_entries(
    rows: TensorVariable,
    columns: TensorVariable,
    values: TensorVariable,
    before: Matrices,
    group: Matrices,
    after: Matrices,
) -> TensorVariable:
    row_index = _unravelled(rows, (*row_sizes(before), prod(row_sizes(group)), *row_sizes(after)))
    column_index = _unravelled(
        columns, (*column_sizes(before), prod(column_sizes(group)), *column_sizes(after))
    )
    position = len(before)
    i, j = row_index.pop(position), column_index.pop(position)
    for factor, row, column in zip([*before, *after], row_index, column_index, strict=True):
        values = values * factor[row, column]
    shape = (prod(row_sizes(group)), prod(column_sizes(group)))
    return pt.zeros(shape, dtype=values.type.dtype)[i, j].inc(values)


def _unravelled(index: TensorVariable, sizes: Sequence[Size]) -> list[TensorVariable]:
    indices = []
    for size in reversed(sizes):
        indices.append(index % size)
        index = index // size
    return indices[::-1]


def require_conforming(term: Term, factors: Matrices, sizes: Sizes) -> None:
    """Raise a `Refusal` unless a term is known to have the factors' sizes, axis by axis.

    That is what `contract` and `inner`, with a Kronecker product, take for granted.
    """
    match term:
        case Product(left=None, right=None):
            _require_square(factors, sizes)
        case Product(left=None, right=right) if right is not None:
            require_conforming(transposed_term(term), [factor.mT for factor in factors], sizes)
        case Product(left=left, right=None) if left is not None:
            _require_same_shapes(left, factors, sizes)
        case Product(left=left, right=right) if left is not None and right is not None:
            require_agreement(left, -2, factors, -2, sizes)
            require_agreement(right, -2, factors, -1, sizes)
        case LowRank(weights=weights) if weights is not None:
            _require_same_shapes(weights, factors, sizes)


def require_square(term: Term, sizes: Sizes) -> None:
    """Raise a `Refusal` unless the diagonal of a term is made of diagonals of its factors."""
    match term:
        case Product(left=left, right=right) if left is not None and right is not None:
            require_agreement(left, -2, right, -2, sizes)
        case Product(left=left, right=right):
            _require_square(left or right or (), sizes)


def require_agreement(
    lefts: Matrices, axis: int, rights: Matrices, other_axis: int, sizes: Sizes | None = None
) -> None:
    """Raise a `Refusal` unless the sizes of an axis of two lists of factors agree."""
    if len(lefts) != len(rights):
        raise Refusal(
            f"one product has {len(lefts)} factors and the other one {len(rights)}",
            "write both with the same factors",
        )
    sizes = Sizes(*lefts, *rights) if sizes is None else sizes
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True), 1):
        if sizes.of(left, axis) != sizes.of(right, other_axis):
            raise Refusal(
                f"the sizes of factor {i} of the two products, {left.type.shape} and "
                f"{right.type.shape}, aren't known to agree",
                "give the factors static shapes",
            )


def _require_same_shapes(lefts: Matrices, rights: Matrices, sizes: Sizes | None = None) -> None:
    require_agreement(lefts, -2, rights, -2, sizes)
    require_agreement(lefts, -1, rights, -1, sizes)


def _require_square(factors: Matrices, sizes: Sizes) -> None:
    for i, factor in enumerate(factors, 1):
        if not sizes.is_square(factor):
            raise Refusal(f"factor {i} isn't known to be square", "give it a static shape")
