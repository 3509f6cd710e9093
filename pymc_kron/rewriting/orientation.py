"""Which factors are known to be square, tall or wide.

Where a product has to be invertible, its factors are square in every valid graph. A product that
may be singular may be square with rectangular factors, ``u (x) v' = u v'``, and decompositions of
these don't make one of the product. There, sizes have to be proved.
"""

from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.variable import TensorVariable

from pymc_kron.rewriting.facts import is_square
from pymc_kron.sizes import axis_size
from pymc_kron.structure import (
    Matrices,
    Refusal,
    is_empty,
    kron_factors,
    refuse_dtype,
    refuse_narrow_integers,
    square_kron_factors,
)


def rectangular_kron_factors(K: TensorVariable) -> Matrices | None:
    """Return the factors of a product of any shape, as numbers of the dtype of the product.

    Raises
    ------
    Refusal
        If the factors are booleans or integers that may overflow, or one is known to be empty.
    """
    factors = kron_factors(K)
    if factors is None:
        return None
    refuse_dtype(K, "fciu")
    refuse_narrow_integers(K)
    if any(map(is_empty, factors)):
        raise Refusal("a factor is empty", "there is nothing to save")
    return [factor.astype(K.type.dtype) for factor in factors]


def proved_square_kron_factors(
    fgraph: FunctionGraph, K: TensorVariable, *, real: bool = False
) -> Matrices | None:
    """Return the factors of a square product, if all of them are proved to be square.

    What proves a factor symmetric proves it square. If all but one are square, so is that one.

    Raises
    ------
    Refusal
        If more than one factor may be rectangular, and whenever `square_kron_factors` does.
    """
    factors = square_kron_factors(K, real=real)
    if factors is None:
        return None
    unproved = [str(i) for i, factor in enumerate(factors, 1) if not is_square(fgraph, factor)]
    if len(unproved) > 1:
        raise Refusal(
            f"factors {' and '.join(unproved)} aren't known to be square",
            "give them static shapes, or pytensor.assumptions.assume(..., symmetric=True)",
        )
    return factors


def is_tall(fgraph: FunctionGraph, factor: TensorVariable) -> bool:
    """Whether a factor is known to have at least as many rows as columns."""
    rows, columns = axis_size(factor, -2), axis_size(factor, -1)
    has_more_rows = rows.unknowns == columns.unknowns and rows.number >= columns.number
    return has_more_rows or is_square(fgraph, factor)


def is_wide(fgraph: FunctionGraph, factor: TensorVariable) -> bool:
    """Whether a factor is known to have at least as many columns as rows."""
    rows, columns = axis_size(factor, -2), axis_size(factor, -1)
    has_more_columns = rows.unknowns == columns.unknowns and columns.number >= rows.number
    return has_more_columns or is_square(fgraph, factor)


def share_orientation(fgraph: FunctionGraph, factors: Matrices) -> bool:
    """Whether all factors are known to be tall, or all to be wide."""
    return all(is_tall(fgraph, factor) for factor in factors) or all(
        is_wide(fgraph, factor) for factor in factors
    )
