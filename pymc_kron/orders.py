"""Orders of the rows of a Kronecker product: LAPACK's pivots, and its sorted eigenvalues.

Row i of A and row j of B are row ``i n_B + j`` of ``A (x) B``, and the products of the factors'
eigenvalues or singular values, numbered like that, aren't sorted.
"""

from collections.abc import Sequence
from functools import reduce

from pytensor import tensor as pt
from pytensor.tensor.variable import TensorVariable


def kron_permutation(permutations: Sequence[TensorVariable]) -> TensorVariable:
    """Order of the rows of the product from those of the factors: ``(n1),...,(nd)->(n1*...*nd)``.

    ``p[i n_B + j] = p_A[i] n_B + p_B[j]``.
    """
    return reduce(
        lambda a, b: pt.join_dims(
            a[..., :, None] * b.shape[-1] + b[..., None, :], start_axis=-2, n_axes=2
        ),
        permutations,
    )


def reorder(x: TensorVariable, order: TensorVariable, *, core_axis: int) -> TensorVariable:
    """Reorder an axis, counted from the end; in a batch, each entry has an order of its own."""
    if order.type.ndim == 1:
        return pt.take(x, order, axis=core_axis)
    if core_axis == -2:
        order = order[..., None]
    elif x.type.ndim > order.type.ndim:
        order = order[..., None, :]
    return pt.take_along_axis(x, order, axis=core_axis)
