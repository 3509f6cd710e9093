"""Factorwise linear algebra: what a Kronecker product does, from its factors alone.

Conventions
-----------
Row-major (C order) throughout, as in NumPy. For ``X`` of shape ``(n_1, ..., n_d)``,
``vec(X) = X.ravel()`` and::

    (A_1 (x) ... (x) A_d) vec(X) = vec(A_1 applied along axis 1, ..., A_d along axis d)

so that the first factor belongs to the slowest-varying axis, and ``(A (x) B) vec(X) =
vec(A X B.T)`` for two factors. ``N = n_1 ... n_d``. With ``A = [[a, b], [c, d]]`` and
``x = (x_11, x_12, x_21, x_22)``::

    (A (x) B) x = [a B x_1 + b B x_2, c B x_1 + d B x_2],   x_1 = (x_11, x_12), ...

Identities used, for square factors where an inverse or a determinant stands:

- ``(A (x) B) (C (x) D) = AC (x) BD``
- ``(A (x) B)^-1 = A^-1 (x) B^-1``
- ``det(A (x) B) = det(A)^n_B det(B)^n_A``
- ``chol(A (x) B) = chol(A) (x) chol(B)`` for positive definite A and B

(Van Loan, C. F. (2000), "The ubiquitous Kronecker product", Journal of Computational and
Applied Mathematics 123, 85-100.)

Every function takes and returns PyTensor variables, is aware of batch dimensions, and never
looks at how its arguments were computed; `pymc_kron.structure` does that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod

from pytensor import tensor as pt
from pytensor.gradient import DisconnectedType
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.linalg.summary import SLogDet
from pytensor.tensor.variable import TensorVariable

from pymc_kron.closed_form import ClosedFormOp
from pymc_kron.structure import Matrices, Size, column_sizes, row_sizes

type MatrixMap = Callable[[TensorVariable], TensorVariable]

_batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")


def kron(*factors: TensorVariable) -> TensorVariable:
    """Write down the dense product: ``(m1,n1),...,(md,nd)->(m1*...*md,n1*...*nd)``.

    Unlike `pytensor.tensor.linalg.kron`, batch dimensions of the factors are broadcast.
    """
    if all(factor.type.ndim == 2 for factor in factors):
        return reduce(pt.linalg.kron, factors)
    return reduce(_batched_kron, factors)


def visiting_order(in_sizes: Sequence[Size], out_sizes: Sequence[Size]) -> list[int]:
    """Return the order in which maps cost the least: last to first unless known sizes differ.

    Map i before map j costs ``k_i n_i n_j + k_i k_j n_j``, after it ``k_j n_j n_i + k_j k_i n_i``
    (times the sizes of the other axes). Divided by ``n_i n_j k_i k_j``, the former is less if
    ``1 / n_i - 1 / k_i < 1 / n_j - 1 / k_j``: first what shrinks its axis most.
    """
    last_to_first = range(len(in_sizes))[::-1]
    if not all(isinstance(size, int) and size > 0 for size in (*in_sizes, *out_sizes)):
        return list(last_to_first)
    return sorted(last_to_first, key=lambda i: 1 / in_sizes[i] - 1 / out_sizes[i])


class AxisMap(ABC):
    """A linear map that has a way of its own to be applied to an axis of a grid."""

    @abstractmethod
    def __call__(self, columns: TensorVariable) -> TensorVariable:
        """Apply it to the columns of a matrix: ``(n,r)->(k,r)``."""

    @abstractmethod
    def along(self, grid: TensorVariable) -> TensorVariable:
        """Apply it to the middle one of three axes: ``(p,n,q)->(p,k,q)``."""


def map_axis(map_: MatrixMap, grid: TensorVariable, *, batch_ndim: int = 0) -> TensorVariable:
    """Apply a linear map to the middle one of three axes: ``(p,n,q)->(p,k,q)``.

    What comes before and after the axis stays where it is: the first and the last axis of an
    array in C order take no copy.

    Parameters
    ----------
    map_
        A function that sends a matrix ``(..., n, r)`` to ``(..., k, r)``.
    grid
        ``(..., p, n, q)``.
    batch_ndim
        How many batch dimensions the map has.
    """
    if isinstance(map_, AxisMap) and batch_ndim == 0 and grid.type.ndim == 3:
        return map_.along(grid)
    p, n, q = grid.type.shape[-3:]
    if p == 1:
        return map_(grid.squeeze(-3))[..., None, :, :]
    if q == 1:
        return map_(grid.squeeze(-1).mT).mT[..., None]
    if batch_ndim == 0 and n is not None and q is not None and n * q >= WORTH_A_CALL:
        return map_(grid)
    columns = grid.swapaxes(-3, -2)
    *batch_shape, n, p, q = tuple(columns.shape)
    mapped = map_(columns.reshape((*batch_shape, n, p * q)))
    *batch_shape, k, _ = tuple(mapped.shape)
    return mapped.reshape((*batch_shape, k, p, q)).swapaxes(-3, -2)


WORTH_A_CALL = 256
"""The number of entries from which a matrix takes longer to copy than to call BLAS for it."""


def apply_to_vectors(
    maps: Sequence[MatrixMap],
    in_sizes: Sequence[Size],
    out_sizes: Sequence[Size],
    x: TensorVariable,
    *,
    batch_ndim: int = 0,
) -> TensorVariable:
    """Apply one linear map along each axis of the grid: ``(n1*...*nd)->(k1*...*kd)``.

    Known sizes decide the order; the maps are taken to cost as much as a product with a
    ``(k_i, n_i)`` matrix.

    Parameters
    ----------
    maps
        For each factor, a function that sends a matrix ``(..., n_i, r)`` to ``(..., k_i, r)``.
    in_sizes, out_sizes
        The sizes ``n_i`` and ``k_i``.
    x
        ``(..., N)``, a batch of vectors.
    batch_ndim
        How many batch dimensions the maps have. Only as many of the dimensions of `x` are
        broadcast against them; the vectors of all others go through the maps together.

    Returns
    -------
    TensorVariable
        ``(..., K)`` with ``K = k_1 ... k_d``.
    """
    return _apply(maps, in_sizes, out_sizes, x, (), batch_ndim)


def apply_to_columns(
    maps: Sequence[MatrixMap],
    in_sizes: Sequence[Size],
    out_sizes: Sequence[Size],
    x: TensorVariable,
    *,
    batch_ndim: int = 0,
) -> TensorVariable:
    """Apply one linear map along each axis to columns: ``(n1*...*nd,m)->(k1*...*kd,m)``.

    The parameters are those of `apply_to_vectors`, with `x` of shape ``(..., N, m)``.
    """
    n_columns = _known_or_symbolic(x, [-1])
    return _apply(maps, in_sizes, out_sizes, x, n_columns, batch_ndim)


def _apply(
    maps: Sequence[MatrixMap],
    in_sizes: Sequence[Size],
    out_sizes: Sequence[Size],
    x: TensorVariable,
    n_columns: Sequence[Size],
    batch_ndim: int,
) -> TensorVariable:
    core_ndim = 1 + len(n_columns)
    n_shared = max(0, x.type.ndim - core_ndim - batch_ndim)
    shared_shape = tuple(_known_or_symbolic(x, range(n_shared)))
    if n_shared and batch_ndim:
        x = pt.moveaxis(x, range(n_shared), range(batch_ndim, batch_ndim + n_shared))
        batch_shape = tuple(x.shape)[:batch_ndim]
    else:
        batch_shape = tuple(x.shape)[n_shared : x.type.ndim - core_ndim]

    sizes = list(in_sizes)
    for i in visiting_order(in_sizes, out_sizes):
        before, after = prod((*shared_shape, *sizes[:i])), prod((*sizes[i + 1 :], *n_columns))
        grid = x.reshape((*batch_shape, before, sizes[i], after))
        x = map_axis(maps[i], grid, batch_ndim=batch_ndim)
        batch_shape = tuple(x.shape)[: x.type.ndim - 3]
        sizes[i] = out_sizes[i]
    result = x.reshape((*batch_shape, *shared_shape, prod(out_sizes), *n_columns))
    if n_shared and batch_ndim:
        result = pt.moveaxis(result, range(batch_ndim, batch_ndim + n_shared), range(n_shared))
    return result


def _known_or_symbolic(x: TensorVariable, axes: Sequence[int]) -> list[Size]:
    return [x.shape[axis] if x.type.shape[axis] is None else x.type.shape[axis] for axis in axes]


def grid_along(
    x: TensorVariable, sizes: Sequence[Size], axis: int, *, batch_ndim: int = 0
) -> TensorVariable:
    """Set one axis of the grid apart: ``(n1*...*nd)->(p,ni,q)``, with ``p q = N / n_i``.

    Parameters
    ----------
    x
        ``(..., N)``, a batch of vectors. All but the last `batch_ndim` of its batch dimensions
        become part of the first axis.
    sizes
        The sizes of all axes.
    axis
        The axis ``i``.
    batch_ndim
        How many batch dimensions the result has.
    """
    n_shared = x.type.ndim - 1 - batch_ndim
    shared_shape = _known_or_symbolic(x, range(n_shared))
    if n_shared and batch_ndim:
        x = pt.moveaxis(x, range(n_shared), range(batch_ndim, batch_ndim + n_shared))
    batch_shape = tuple(x.shape)[:batch_ndim] if batch_ndim else ()
    before, after = prod((*shared_shape, *sizes[:axis])), prod(sizes[axis + 1 :])
    return x.reshape((*batch_shape, before, sizes[axis], after))


def contract_grids(left: TensorVariable, right: TensorVariable) -> TensorVariable:
    """Multiply unfolded grids, ``sum_pq A[p,:,q] B[p,:,q]'``: ``(p,n,q),(p,m,q)->(n,m)``."""
    if left.type.shape[-3] == 1:
        return left.squeeze(-3) @ right.squeeze(-3).mT
    if left.type.shape[-1] == 1:
        return left.squeeze(-1).mT @ right.squeeze(-1)

    def unfolded(grid: TensorVariable) -> TensorVariable:
        rows = grid.swapaxes(-3, -2)
        *batch_shape, n, p, q = tuple(rows.shape)
        return rows.reshape((*batch_shape, n, p * q))

    return unfolded(left) @ unfolded(right).mT


def factors_batch_ndim(factors: Matrices) -> int:
    """Return the number of batch dimensions that the factors have together."""
    return max(factor.type.ndim for factor in factors) - 2


def kron_matmul(factors: Matrices, x: TensorVariable, *, x_ndim: int = 1) -> TensorVariable:
    """Product with a Kronecker product: ``(k1,n1),...,(kd,nd),(n1*...*nd)->(k1*...*kd)``.

    Parameters
    ----------
    factors
        The factors, which need not be square.
    x
        ``(..., N)`` if `x_ndim` is 1, ``(..., N, m)`` if it is 2.
    """
    apply = apply_to_vectors if x_ndim == 1 else apply_to_columns
    return apply(
        [factor.__matmul__ for factor in factors],
        column_sizes(factors),
        row_sizes(factors),
        x,
        batch_ndim=factors_batch_ndim(factors),
    )


def kron_of_vectors(vectors: Sequence[TensorVariable]) -> TensorVariable:
    """Kronecker product of vectors: ``(n1),...,(nd)->(n1*...*nd)``."""

    def outer(a: TensorVariable, b: TensorVariable) -> TensorVariable:
        entries = a[..., :, None] * b[..., None, :]
        return entries.reshape((*tuple(entries.shape)[:-2], a.shape[-1] * b.shape[-1]))

    return reduce(outer, vectors)


def kron_diagonal(factors: Matrices) -> TensorVariable:
    """Return the diagonal of a product of square factors: ``(n1,n1),...->(n1*...*nd)``."""
    return kron_of_vectors([pt.diagonal(factor, axis1=-2, axis2=-1) for factor in factors])


def levels_of(cells: TensorVariable, sizes: Sequence[Size]) -> list[TensorVariable]:
    """Return the index on each axis of some cells, from that in row-major order."""
    return [(cells // prod(sizes[axis + 1 :])) % size for axis, size in enumerate(sizes)]


def kron_entries(
    factors: Matrices, rows: TensorVariable, columns: TensorVariable
) -> TensorVariable:
    """Return entries of a product of square factors: ``(n1,n1),...,(nd,nd),(m),(k)->(m,k)``.

    Parameters
    ----------
    factors
        The factors.
    rows, columns
        Indices between 0 and ``N``.
    """
    sizes = column_sizes(factors)
    levels = zip(levels_of(rows, sizes), levels_of(columns, sizes), strict=True)
    entries = [
        factor[..., row[:, None], column[None, :]]
        for factor, (row, column) in zip(factors, levels, strict=True)
    ]
    return prod(entries[1:], start=entries[0])


def kron_solve(
    factors: Matrices,
    b: TensorVariable,
    solve: Callable[[TensorVariable, TensorVariable], TensorVariable],
    *,
    b_ndim: int = 1,
) -> TensorVariable:
    """Solve with a Kronecker product: ``(n1,n1),...,(nd,nd),(n1*...*nd)->(n1*...*nd)``.

    Parameters
    ----------
    factors
        Square factors.
    b
        ``(..., N)`` if `b_ndim` is 1, ``(..., N, m)`` if it is 2.
    solve
        ``solve(factor, B)`` solves for the columns of a matrix.
    """
    apply = apply_to_vectors if b_ndim == 1 else apply_to_columns
    sizes = column_sizes(factors)
    return apply(
        [partial(solve, factor) for factor in factors],
        sizes,
        sizes,
        b,
        batch_ndim=factors_batch_ndim(factors),
    )


def with_aligned_signs(factors: Matrices) -> list[TensorVariable]:
    """Flip the signs of definite factors so that each is positive definite.

    If ``A_1 (x) ... (x) A_d`` is positive definite, every ``A_i`` is definite, with the sign of
    its first entry, and the product of the signs is one. The last factor gets the product of
    the other signs rather than its own: the whole product is unchanged, and where it isn't
    positive definite, a flipped factor isn't either.
    """
    *others, last = factors
    # A sum over the first entry of the diagonal, which an empty factor doesn't have
    firsts = [pt.diagonal(factor, axis1=-2, axis2=-1)[..., :1].sum(axis=-1) for factor in others]
    signs = [pt.sign(first)[..., None, None] for first in firsts]
    return [
        *(sign * factor for sign, factor in zip(signs, others, strict=True)),
        prod(signs[1:], start=signs[0]) * last if signs else last,
    ]


class FactorSLogDet(ClosedFormOp):
    """Sign and logarithm of the absolute determinant of a real factor: ``(n,n)->(),()``.

    PyTensor writes these as ``sign(det(A))`` and ``log(abs(det(A)))``, and the gradient of the
    latter divides det(A) by itself, which is NaN where det(A) under- or overflows. Here
    ``d log|det A| / dA = inv(A).T`` (Petersen and Pedersen (2012), "The matrix cookbook",
    equation 49) and the sign is constant.
    """

    def build_inner_graph(self, a: TensorVariable) -> list[TensorVariable]:
        return Blockwise(SLogDet())(a)

    def pullback(
        self,
        inputs: Matrices,
        outputs: Matrices,
        cotangents: Matrices,
    ) -> list[TensorVariable]:
        [a] = inputs
        _, logabsdet_bar = cotangents
        if isinstance(logabsdet_bar.type, DisconnectedType):
            return [a.zeros_like()]
        return [logabsdet_bar[..., None, None] * pt.linalg.inv(a).mT]


def factor_slogdet(factor: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
    """Sign and log absolute determinant of one factor: ``(n,n)->(),()``."""
    if factor.type.numpy_dtype.kind == "c":
        return Blockwise(SLogDet())(factor)
    return FactorSLogDet()(factor)


def triangular_slogdet(factor: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
    """Sign and log absolute determinant of a triangular factor: ``(n,n)->(),()``."""
    diagonal = pt.diagonal(factor, axis1=-2, axis2=-1)
    return pt.sign(diagonal).prod(axis=-1), pt.log(pt.abs(diagonal)).sum(axis=-1)


def copies_of(sizes: Sequence[Size], axis: int) -> float | TensorVariable:
    """Return ``N / n_i``, how many copies of a factor there are in a product.

    As a float where it is known: PyTensor takes a small integer for an int8, and two of them may
    be multiplied by one another as such, and overflow.
    """
    copies = prod((*sizes[:axis], *sizes[axis + 1 :]))
    return float(copies) if isinstance(copies, int) else copies


def kron_slogdet(
    factors: Matrices,
    slogdets: Sequence[tuple[TensorVariable, TensorVariable]],
) -> tuple[TensorVariable, TensorVariable]:
    """Sign and log absolute determinant of the product from those of its factors.

    ``log|det K| = sum_i (N / n_i) log|det K_i|``, ``sign det K = prod_i sign(det K_i)^(N / n_i)``.
    """
    sizes = column_sizes(factors)
    logabsdet, sign = [], []
    for i, (factor_sign, factor_logabsdet) in enumerate(slogdets):
        copies = copies_of(sizes, i)
        sign.append(factor_sign ** (int(copies) if isinstance(copies, float) else copies))
        total = copies * factor_logabsdet
        # Beside an empty factor, a singular one takes no part: 0 * -inf is 0
        logabsdet.append(total if isinstance(copies, float) else pt.switch(copies > 0, total, 0))
    return prod(sign[1:], start=sign[0]), sum(logabsdet[1:], start=logabsdet[0])
