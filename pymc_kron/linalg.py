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

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod

from pytensor import tensor as pt
from pytensor.gradient import DisconnectedType
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.linalg.summary import SLogDet
from pytensor.tensor.symbolic import TensorSymbolicOp
from pytensor.tensor.variable import TensorVariable

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


def sweep(
    maps: Sequence[MatrixMap],
    in_sizes: Sequence[Size],
    out_sizes: Sequence[Size],
    rows: TensorVariable,
    *,
    n_rows: Size | None = None,
) -> TensorVariable:
    """Apply one linear map along each axis of a grid: ``(m,n1*...*nd)->(k1*...*kd,m)``.

    The result is transposed: a vector of the grid enters as a row and leaves as a column.
    Each step maps the last axis and moves it to the front, so that every map sees a matrix
    whose columns it may treat as right-hand sides, and a product of two factors needs no copy
    between its steps. Where known sizes make another order cheaper, the axes are rearranged
    before and after; the maps are taken to cost as much as a product with a ``(k_i, n_i)``
    matrix.

    Parameters
    ----------
    maps
        For each factor, a function that sends a matrix ``(..., n_i, r)`` to ``(..., k_i, r)``.
    in_sizes, out_sizes
        The sizes ``n_i`` and ``k_i``.
    rows
        ``(..., m, N)``, or ``(..., N)`` if `n_rows` is None.
    n_rows
        The number ``m`` of vectors, None for a single one without that axis.

    Returns
    -------
    TensorVariable
        ``(..., K, m)``, or ``(..., K)`` if `n_rows` is None, with ``K = k_1 ... k_d``. The
        batch dimensions are those of `rows` broadcast with those that the maps bring in.
    """
    lead = () if n_rows is None else (n_rows,)
    axes = visiting_order(in_sizes, out_sizes)[::-1]
    if axes != sorted(axes):
        rows = _rearranged(rows, -1, in_sizes, axes)
        maps = [maps[i] for i in axes]
        in_sizes, out_sizes = ([sizes[i] for i in axes] for sizes in (in_sizes, out_sizes))
        columns = sweep(maps, in_sizes, out_sizes, rows, n_rows=n_rows)
        back = [axes.index(i) for i in range(len(axes))]
        return _rearranged(columns, -1 - len(lead), out_sizes, back)
    mapped = _sweep_grid(maps, in_sizes, out_sizes, rows, lead)
    return mapped.reshape((*tuple(mapped.shape)[:-2], prod(out_sizes), *lead))


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


def _rearranged(
    x: TensorVariable, axis: int, sizes: Sequence[Size], axes: Sequence[int]
) -> TensorVariable:
    """Rearrange the axes of the grid that one axis of an array stands for."""
    axis %= x.type.ndim
    before, after = tuple(x.shape)[:axis], tuple(x.shape)[axis + 1 :]
    grid = x.reshape((*before, *sizes, *after))
    order = [*range(axis), *(axis + i for i in axes), *range(axis + len(axes), grid.type.ndim)]
    return grid.transpose(*order).reshape((*before, prod(sizes), *after))


def _sweep_grid(
    maps: Sequence[MatrixMap],
    in_sizes: Sequence[Size],
    out_sizes: Sequence[Size],
    rows: TensorVariable,
    lead: tuple[Size, ...] = (),
) -> TensorVariable:
    """Return the result of `sweep` as a matrix with a row for each of the ``k_1``."""
    batch_shape = tuple(rows.shape)[: rows.type.ndim - 1 - len(lead)]
    # The axes in front of the one to be mapped, slowest first
    front: tuple[Size, ...] = (*lead, *in_sizes[:-1])
    grid = rows.reshape((*batch_shape, prod(front), in_sizes[-1]))
    for i in reversed(range(len(maps))):
        mapped = maps[i](grid.mT)
        if i == 0:
            break
        front = (out_sizes[i], *front[:-1])
        # With one axis in front, the matrix already has the shape that the next map needs
        grid = (
            mapped
            if len(front) == 1
            else mapped.reshape((*tuple(mapped.shape)[:-2], prod(front), in_sizes[i - 1]))
        )
    return mapped


def apply_to_vectors(
    maps: Sequence[MatrixMap],
    in_sizes: Sequence[Size],
    out_sizes: Sequence[Size],
    x: TensorVariable,
    *,
    batch_ndim: int = 0,
) -> TensorVariable:
    """Apply one linear map along each axis of the grid: ``(n1*...*nd)->(k1*...*kd)``.

    Parameters
    ----------
    maps, in_sizes, out_sizes
        As in `sweep`.
    x
        ``(..., N)``, a batch of vectors.
    batch_ndim
        How many batch dimensions the maps have. Only as many of the dimensions of `x` are
        broadcast against them; the vectors of all others go through the maps together.
    """
    n_shared = x.type.ndim - 1 - batch_ndim
    if n_shared <= 0:
        return sweep(maps, in_sizes, out_sizes, x)

    shared_shape = tuple(x.shape)[:n_shared]
    batch_shape = tuple(x.shape)[n_shared:-1]
    n_rows = prod(_known_or_symbolic(x, range(n_shared)))
    rows = pt.moveaxis(x, range(n_shared), range(batch_ndim, batch_ndim + n_shared))
    rows = rows.reshape((*batch_shape, n_rows, x.shape[-1]))
    columns = sweep(maps, in_sizes, out_sizes, rows, n_rows=n_rows)
    result = columns.mT.reshape(
        (*tuple(columns.shape)[:-2], *shared_shape, prod(out_sizes)),
    )
    return pt.moveaxis(result, range(batch_ndim, batch_ndim + n_shared), range(n_shared))


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
    if x.type.shape[-1] == 1:
        vectors = apply_to_vectors(maps, in_sizes, out_sizes, x.squeeze(-1), batch_ndim=batch_ndim)
        return vectors[..., None]
    if batch_ndim == 0:
        return apply_to_vectors(maps, in_sizes, out_sizes, x.mT).mT
    [n_rows] = _known_or_symbolic(x, [-1])
    return sweep(maps, in_sizes, out_sizes, x.mT, n_rows=n_rows)


def sum_of_squares(
    maps: Sequence[MatrixMap],
    sizes: Sequence[Size],
    x: TensorVariable,
    *,
    batch_ndim: int = 0,
) -> TensorVariable:
    """Squared norm of what `apply_to_vectors` returns: ``(n1*...*nd)->()``."""
    if x.type.ndim - 1 > batch_ndim:
        vectors = apply_to_vectors(maps, sizes, sizes, x, batch_ndim=batch_ndim)
        return (vectors**2).sum(axis=-1)
    # The order of the cells doesn't matter: no copy into a vector
    return (_sweep_grid(maps, sizes, sizes, x) ** 2).sum(axis=(-2, -1))


def _known_or_symbolic(x: TensorVariable, axes: Sequence[int]) -> list[Size]:
    return [x.shape[axis] if x.type.shape[axis] is None else x.type.shape[axis] for axis in axes]


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

    def outer(a, b):
        entries = a[..., :, None] * b[..., None, :]
        return entries.reshape((*tuple(entries.shape)[:-2], a.shape[-1] * b.shape[-1]))

    return reduce(outer, vectors)


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


class FactorSLogDet(TensorSymbolicOp):
    """Sign and logarithm of the absolute determinant of a real factor: ``(n,n)->(),()``.

    PyTensor writes these as ``sign(det(A))`` and ``log(abs(det(A)))``, and the gradient of the
    latter divides det(A) by itself, which is NaN where det(A) under- or overflows. Here
    ``d log|det A| / dA = inv(A).T`` (Petersen and Pedersen (2012), "The matrix cookbook",
    equation 49) and the sign is constant.
    """

    inline = True

    def build_inner_graph(self, a):
        return Blockwise(SLogDet())(a)

    def pullback(self, inputs, outputs, cotangents):
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
        copies = prod(sizes[:i] + sizes[i + 1 :])
        sign.append(factor_sign**copies)
        total = copies * factor_logabsdet
        # Beside an empty factor, a singular one takes no part: 0 * -inf is 0
        logabsdet.append(total if isinstance(copies, int) else pt.switch(copies > 0, total, 0))
    return prod(sign[1:], start=sign[0]), sum(logabsdet[1:], start=logabsdet[0])
