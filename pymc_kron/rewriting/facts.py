"""What a rewrite may take for granted about the factors of a positive definite product."""

from collections.abc import Iterator

import numpy as np
from pytensor import tensor as pt
from pytensor.graph.basic import Apply
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.elemwise import DimShuffle
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.decomposition.eigen import Eigh, Eigvalsh
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.random.basic import MvNormalRV
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import with_aligned_signs
from pymc_kron.roots import CholeskyRoot, EigenRoot, IdentityRoot, PrecisionRoot, Root
from pymc_kron.sizes import Sizes, is_provably_square
from pymc_kron.structure import (
    Matrices,
    eigendecomposition,
    gram_root,
    inverted_matrix,
    is_identity,
    is_lower_triangular,
    is_positive_definite,
    is_symmetric,
    strip_transposes,
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


def are_square(fgraph: FunctionGraph, factors: Matrices) -> bool:
    """Whether all factors are known to be square."""
    return all(is_square(fgraph, factor) for factor in factors)


def is_square(fgraph: FunctionGraph, factor: TensorVariable) -> bool:
    """Whether a factor is known to be square, by its sizes or because it is symmetric."""
    return is_provably_square(factor) or is_symmetric(fgraph, factor)


def note_square_factors(fgraph: FunctionGraph, matrices: Matrices, sizes: Sizes) -> None:
    """Make known to the sizes which of some factors are square because they are symmetric."""
    for matrix in matrices:
        if is_symmetric(fgraph, matrix):
            sizes.note_square(matrix)


def symmetric_factors(fgraph: FunctionGraph, factors: Matrices) -> Matrices:
    """Return the factors of a symmetric product, with NaN for those that aren't symmetric.

    If a product of real factors is symmetric and not zero, its factors are each symmetric or
    skew-symmetric, ``A.T = -A``. With at most one factor that isn't proved symmetric, that one is
    symmetric too. Otherwise the number of skew-symmetric factors is even; decompositions of
    symmetric matrices, which read one triangle, would be silently wrong for them.
    """
    unproved = [factor for factor in factors if not is_symmetric(fgraph, factor)]
    if len(unproved) <= 1:
        return factors
    return [nan_unless_symmetric(fgraph, factor) for factor in factors]


def nan_unless_symmetric(fgraph: FunctionGraph, factor: TensorVariable) -> TensorVariable:
    """Return a factor as it is if it is symmetric, and NaN otherwise.

    ``sum_ij A_ij A_ji`` is ``|A|^2`` for a symmetric matrix, and less for any other one:
    ``|A|^2 - |A - A.T|^2 / 2``. Rounding may make a symmetric matrix a little asymmetric.
    """
    if is_symmetric(fgraph, factor):
        return factor
    own = (factor * factor).sum(axis=(-2, -1), keepdims=True)
    crossed = (factor * factor.mT).sum(axis=(-2, -1), keepdims=True)
    return pt.switch(pt.ge(crossed, (1 - 1e-6) * own), factor, np.nan).astype(factor.type.dtype)


def root_of(fgraph: FunctionGraph, factor: TensorVariable) -> Root:
    """Return the root of a positive definite factor, from what it was computed from.

    ``inv(Q)`` is served by the Cholesky factor of ``Q``, ``L @ L.T`` by ``L`` itself, and
    ``(Q * w) @ Q.T`` with a ``Q`` that is known to be orthogonal by ``Q`` and ``w``.
    """
    if factor.type.ndim == 2 and is_identity(factor):
        return IdentityRoot(factor)
    precision = inverted_matrix(factor)
    if precision is not None:
        return PrecisionRoot(pt.linalg.cholesky(precision))
    root = gram_root(factor)
    if root is not None and is_lower_triangular(fgraph, root):
        return CholeskyRoot(root)
    decomposed = eigendecomposition(fgraph, factor)
    if decomposed is not None:
        return EigenRoot(*decomposed)
    return CholeskyRoot(pt.linalg.cholesky(factor))


def is_promised_symmetric(fgraph: FunctionGraph, var: TensorVariable) -> bool:
    """Whether a matrix is known to be symmetric, or a call in the graph promises that it is.

    A solve with ``assume_a="pos"``, a Cholesky factor or symmetric eigenvalues of the same matrix,
    or a normal distribution with that covariance, promise it for every other use. The promise is
    kept as PyTensor's ``tag.symmetric``, since the call that made it may be rewritten first.
    """
    core, _ = strip_transposes(var)
    if is_symmetric(fgraph, core) or getattr(core.tag, "symmetric", False):
        return True
    core.tag.symmetric = any(_promises_symmetry(client) for client in clients_of(fgraph, core))
    return core.tag.symmetric


def clients_of(fgraph: FunctionGraph, var: TensorVariable) -> Iterator[Apply]:
    """Yield the nodes that use a variable, itself or transposed and with axes added."""
    for client, _ in fgraph.clients.get(var, ()):
        if isinstance(client.op, DimShuffle):
            yield from clients_of(fgraph, client.outputs[0])
        else:
            yield client


def _promises_symmetry(node) -> bool:
    match getattr(node.op, "core_op", node.op):
        case (
            Solve(assume_a="pos" | "sym" | "her") | Cholesky() | Eigh() | Eigvalsh() | MvNormalRV()
        ):
            return True
    return False
