"""When what is done to factors is done to their product: sizes that meet, integers that fit."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import kron
from pymc_kron.sizes import SizeProduct, Sizes
from pymc_kron.structure import Matrices, Refusal, is_empty

SAME_SHAPE = [(-2, -2), (-1, -1)]


def conforming_factors(
    left: Matrices, right: Matrices, axes: Sequence[tuple[int, int]]
) -> list[tuple[TensorVariable, TensorVariable]]:
    """Pair the factors of two products whose sizes agree.

    Adjacent factors are multiplied where only the sizes of their products agree: ``A (x) B (x) C``
    and ``D (x) E`` conform as ``A, D`` and ``B (x) C, E``.

    Parameters
    ----------
    left, right
        The factors of the two products.
    axes
        Which axis of a left factor has to have the size of which axis of a right one.

    Raises
    ------
    Refusal
        If the sizes aren't known to agree, or agree only for the products as a whole.
    """
    if any(map(is_empty, (*left, *right))):
        raise Refusal("a factor is empty", "there is nothing to save")
    sizes = Sizes(*left, *right)
    left_sizes = _sizes_up_to(left, [axis for axis, _ in axes], sizes)
    right_sizes = _sizes_up_to(right, [axis for _, axis in axes], sizes)

    # How many factors of both there are up to each place where the sizes agree
    ends = [(0, 0)]
    for i, up_to_here in enumerate(left_sizes, 1):
        start = ends[-1][1]
        if up_to_here in right_sizes[start:]:
            ends.append((i, right_sizes.index(up_to_here, start) + 1))
    if left_sizes[-1] != right_sizes[-1] or len(ends) < 3:
        raise Refusal(
            "the sizes of the factors of the two products aren't known to agree",
            "give the factors static shapes",
        )
    # Factors of size one may be left over
    ends[-1] = len(left), len(right)
    return [(kron(*left[i:k]), kron(*right[j:m])) for (i, j), (k, m) in pairwise(ends)]


def _sizes_up_to(
    factors: Matrices, axes: Sequence[int], sizes: Sizes
) -> list[tuple[SizeProduct, ...]]:
    each = [tuple(sizes.of(factor, axis) for axis in axes) for factor in factors]
    return list(accumulate(each, lambda total, size: tuple(map(mul, total, size))))


def refuse_overflow(K: TensorVariable, factors: Matrices, old_out: TensorVariable) -> None:
    """Raise a `Refusal` if integers may be cut off at another width in the factors than in K.

    Sums and products of integers are right modulo a power of two, which has to be the same one.
    Of integers of 64 bits, those that become floating point numbers are taken not to overflow.
    """
    dtypes = {var.type.dtype for var in (K, *factors, old_out)}
    is_exact = old_out.type.numpy_dtype.kind in "fc" and K.type.numpy_dtype.itemsize == 8
    if K.type.numpy_dtype.kind in "biu" and len(dtypes) > 1 and not is_exact:
        raise Refusal(
            f"integers may overflow in another way as {', '.join(sorted(dtypes))}",
            "cast the factors to floating point numbers",
        )
