"""What a rewrite may take for granted about the factors of a positive definite product."""

from collections.abc import Iterator
from weakref import WeakSet

import numpy as np
from pytensor import tensor as pt
from pytensor.graph.basic import Apply
from pytensor.graph.features import AlreadyThere, Feature
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


class Promises(Feature):
    """Which matrices calls in a graph promise to be symmetric, or did before they were rewritten.

    Not a tag of the variables: PyMC rewrites graphs that are the user's own, and what a call in one
    program promises isn't to hold for another one.
    """

    def __init__(self):
        self.symmetric: WeakSet[TensorVariable] = WeakSet()

    def on_attach(self, fgraph: FunctionGraph) -> None:
        """Make the promises an attribute of the graph."""
        if hasattr(fgraph, "kron_promises"):
            raise AlreadyThere
        fgraph.kron_promises = self  # type: ignore[attr-defined]

    def on_detach(self, fgraph: FunctionGraph) -> None:
        """Take the attribute away."""
        del fgraph.kron_promises  # type: ignore[attr-defined]

    def clone(self) -> "Promises":
        """Return what holds for a copy of the graph, whose variables are others."""
        return Promises()

    def __reduce__(self):
        """Leave out the references when pickled, which can't be, as in a copy of the graph."""
        return Promises, ()


def is_promised_symmetric(fgraph: FunctionGraph, var: TensorVariable) -> bool:
    """Whether a matrix is known to be symmetric, or a call in the graph promises that it is.

    A solve with ``assume_a="pos"``, a Cholesky factor or symmetric eigenvalues of the same matrix,
    or a normal distribution with that covariance, promise it for every other use. A promise is
    kept in mind, since the call that made it may be rewritten first. The user may also have said so
    by PyTensor's ``tag.symmetric``.
    """
    core, _ = strip_transposes(var)
    fgraph.attach_feature(Promises())
    symmetric = fgraph.kron_promises.symmetric  # type: ignore[attr-defined]
    if core not in symmetric and (
        is_symmetric(fgraph, core)
        or getattr(core.tag, "symmetric", False)
        or any(_promises_symmetry(client, i) for client, i in clients_of(fgraph, core))
    ):
        symmetric.add(core)
    return core in symmetric


def clients_of(fgraph: FunctionGraph, var: TensorVariable) -> Iterator[tuple[Apply, int]]:
    """Yield the nodes that use a variable, itself or transposed and with axes added.

    And which of their inputs it is.
    """
    for client, i in fgraph.clients.get(var, ()):
        if isinstance(client.op, DimShuffle):
            yield from clients_of(fgraph, client.outputs[0])
        else:
            yield client, i


def _promises_symmetry(node: Apply, i: int) -> bool:
    """Whether a node promises that its i-th input is symmetric.

    It is the covariance of a normal distribution, not the mean, and the matrix of a solve, not the
    right-hand side.
    """
    match getattr(node.op, "core_op", node.op):
        case MvNormalRV() as op:
            _, covariance = op.dist_params(node)
            return node.inputs[i] is covariance
        case Solve(assume_a="pos" | "sym" | "her"):
            return i == 0
        case Cholesky() | Eigh() | Eigvalsh():
            return True
    return False
