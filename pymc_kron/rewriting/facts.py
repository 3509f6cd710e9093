"""What a rewrite may take for granted about the factors of a positive definite product."""

from pytensor import tensor as pt
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import with_aligned_signs
from pymc_kron.roots import Root
from pymc_kron.structure import (
    Matrices,
    gram_root,
    inverted_matrix,
    is_lower_triangular,
    is_positive_definite,
)


def positive_definite_factors(fgraph: FunctionGraph, factors: Matrices) -> Matrices:
    """Return the factors of a positive definite product with their signs made positive.

    A factor that is proved positive definite is left as it is. With one other factor, that
    one is positive definite too.
    """
    unproved = [i for i, factor in enumerate(factors) if not is_positive_definite(fgraph, factor)]
    if len(unproved) <= 1:
        return factors
    aligned = list(factors)
    for i, factor in zip(unproved, with_aligned_signs([factors[i] for i in unproved]), strict=True):
        aligned[i] = factor
    return aligned


def root_of(fgraph: FunctionGraph, factor: TensorVariable) -> Root:
    """Return the root of a positive definite factor, from what it was computed from.

    ``inv(Q)`` is served by the Cholesky factor of ``Q``, and ``L @ L.T`` by ``L`` itself.
    """
    precision = inverted_matrix(factor)
    if precision is not None:
        return Root(pt.linalg.cholesky(precision), of_precision=True)
    root = gram_root(factor)
    if root is not None and is_lower_triangular(fgraph, root):
        return Root(root)
    return Root(pt.linalg.cholesky(factor))
