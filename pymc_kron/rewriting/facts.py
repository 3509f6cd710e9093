"""What a rewrite may take for granted about the factors of a positive definite product."""

import numpy as np
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
    is_symmetric,
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


def symmetric_factors(fgraph: FunctionGraph, factors: Matrices) -> Matrices:
    """Return the factors of a symmetric product, with NaN for those that are skew-symmetric.

    If a product of real factors is symmetric and not zero, its factors are each symmetric or
    skew-symmetric, ``A.T = -A``. With at most one factor that isn't proved symmetric, that one is
    symmetric too. Otherwise the number of skew-symmetric factors is even; decompositions of
    symmetric matrices, which read one triangle, would be silently wrong for them.
    """
    unproved = [i for i, factor in enumerate(factors) if not is_symmetric(fgraph, factor)]
    if len(unproved) <= 1:
        return factors
    guarded = list(factors)
    for i in unproved:
        # sum_ij A_ij A_ji is |A|^2 for a symmetric matrix and -|A|^2 for a skew-symmetric one
        is_skew = pt.lt((factors[i] * factors[i].mT).sum(axis=(-2, -1), keepdims=True), 0)
        guarded[i] = pt.switch(is_skew, np.nan, factors[i]).astype(factors[i].type.dtype)
    return guarded


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
