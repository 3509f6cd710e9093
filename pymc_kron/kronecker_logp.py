"""The log-density of ``N(0, K_1 (x) ... (x) K_d)``, and its gradient in closed form.

With a root ``K_i = R_i R_i'`` of each factor, the whitened residual
``W = (inv(R_1) (x) ... (x) inv(R_d)) x`` and its unfolding ``W_(i)`` along axis i, of shape
``(n_i, N / n_i)``::

    logp       = -1/2 |W|^2 - 1/2 sum_i (N / n_i) log det K_i - N/2 log(2 pi)
    dlogp/dK_i = 1/2 (V_i V_i' - (N / n_i) inv(K_i)),    V_i = inv(R_i)' W_(i)
    dlogp/dx   = -(inv(R_1)' (x) ... (x) inv(R_d)') W

The second line is equation 137 of Petersen and Pedersen (2012), "The matrix cookbook", summed
over the blocks of the product. From it follow those in what else may describe a factor: with
``U_i = R_i W_(i)``, the residual whitened along the other axes alone,

- a Cholesky factor L, ``dK = dL L' + L dL'``: ``tril(V_i W_(i)') - (N / n_i) diag(1 / diag L)``;
- a precision Q, ``dK = -K dQ K``: ``1/2 ((N / n_i) K_i - U_i U_i')``;
- eigenvalues w: ``1/2 (sum of the rows of W_(i)^2 - N / n_i) / w``, and eigenvectors:
  ``-U_i (W_(i) / sqrt(w))'``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from pytensor import tensor as pt
from pytensor.assumptions.specify import SpecifyAssumptions
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.variable import TensorVariable

from pymc_kron.closed_form import LogDensityOp, summed_to
from pymc_kron.factors import Factor, Form, factors_of
from pymc_kron.kernels import contract, gram, inverse_from_cholesky
from pymc_kron.linalg import (
    MatrixMap,
    apply_to_vectors,
    copies_of,
    grid_along,
    kron,
    map_axis,
)
from pymc_kron.rewriting import bundle_rewriter
from pymc_kron.roots import CholeskyRoot, EigenRoot, PrecisionRoot, Root
from pymc_kron.structure import Size


def dense_logp(delta: TensorVariable, factors: Sequence[Factor]) -> TensorVariable:
    """Write down the log-density of a multivariate normal with covariance ``kron(*covs)``.

    ``-1/2 x' K^-1 x - 1/2 log|K| - N/2 log(2 pi)``, with the dense ``K``: the formula that
    `KroneckerLogp` is after the rewrites.

    Parameters
    ----------
    delta
        The residual ``x``, ``(..., N)``.
    factors
        The factors of ``K``.
    """
    covs = [factor.covariance() for factor in factors]
    if len(covs) == 1:
        # The bundle is for products, and K = K (x) 1 is one
        covs.append(pt.eye(1, dtype=covs[0].type.dtype))
    K = kron(*covs)
    quadratic_form = (delta * pt.linalg.solve(K, delta, assume_a="pos", b_ndim=1)).sum(axis=-1)
    _, logdet = pt.linalg.slogdet(K)
    N = math.prod(factor.size for factor in factors)
    return -0.5 * quadratic_form - 0.5 * logdet - N * (0.5 * math.log(2 * math.pi))


class KroneckerLogp(LogDensityOp):
    """Log-density of a residual: ``(n1*...*nd)`` and the parts of the factors ``->(),()``.

    Parameters
    ----------
    forms
        What the factors are.
    """

    __props__ = ("forms",)
    forms: tuple[Form, ...]

    def build_inner_graph(
        self, delta: TensorVariable, *parts: TensorVariable
    ) -> list[TensorVariable]:
        """Return `dense_logp` after the rewrite bundle, which sees nothing else."""
        factors = factors_of(self.forms, parts)
        fgraph = FunctionGraph([delta, *parts], [dense_logp(delta, factors)], clone=False)
        bundle_rewriter().rewrite(fgraph)
        # The assumptions have served: the gradient decomposes the factors without them
        for node in fgraph.toposort():
            if isinstance(node.op, SpecifyAssumptions):
                fgraph.replace(node.out, node.inputs[0])
        exists = reduce(pt.and_, [factor.root().exists for factor in factors])
        return [*fgraph.outputs, exists]

    def gradients(
        self, inputs: Sequence[TensorVariable], logp_bar: TensorVariable
    ) -> list[TensorVariable]:
        delta, *parts = inputs
        factors = factors_of(self.forms, parts)
        sizes = [factor.size for factor in factors]
        roots = [factor.root() for factor in factors]
        batch_ndim = max(factor.batch_ndim for factor in factors)

        def apply(maps: Sequence[MatrixMap], x: TensorVariable) -> TensorVariable:
            return apply_to_vectors(maps, sizes, sizes, x, batch_ndim=batch_ndim)

        whitened = apply([root.whiten for root in roots], delta)
        delta_bar = -logp_bar[..., None] * apply([root.unwhiten for root in roots], whitened)
        gradients = [summed_to(delta_bar, delta)]
        total = logp_bar.sum(axis=tuple(range(logp_bar.type.ndim - batch_ndim)))
        for axis, (factor, root) in enumerate(zip(factors, roots, strict=True)):
            residual = Residual(
                grid_along(whitened, sizes, axis, batch_ndim=batch_ndim),
                copies_of(sizes, axis) * total,
                _weights(logp_bar, whitened, sizes, axis, batch_ndim),
                batch_ndim,
            )
            news = residual.gradients_in(factor, root)
            gradients += map(summed_to, news, factor.parts)
        return gradients


@dataclass(frozen=True)
class Residual:
    """The whitened residual along one axis, and the weight of each of its vectors.

    Attributes
    ----------
    grid
        ``W``, ``(..., p, n, q)``.
    copies
        ``N / n`` times the sum of the weights, ``(...)``.
    weights
        The weights, of the shape of the grid, or one for all.
    batch_ndim
        How many batch dimensions there are.
    """

    grid: TensorVariable
    copies: TensorVariable
    weights: TensorVariable
    batch_ndim: int

    def map(self, linear_map: MatrixMap) -> TensorVariable:
        """Apply a linear map to the axis of the factor: ``(p,n,q)->(p,n,q)``."""
        return map_axis(linear_map, self.grid, batch_ndim=self.batch_ndim)

    def contract(self, left: TensorVariable, right: TensorVariable) -> TensorVariable:
        """Return the weighted sum of the products of two grids: ``(p,n,q),(p,n,q)->(n,n)``."""
        if self.weights.type.ndim == 0:
            product = gram(left) if left is right else contract(left, right)
            return self.weights * product
        return contract(self.weights * left, right)

    def gradients_in(self, factor: Factor, root: Root) -> list[TensorVariable]:
        """Return the gradient in each part of the factor, in the batch shape of the residual."""
        match root:
            case CholeskyRoot(chol) if factor.form == "cov":
                return [self._gram_excess(chol, root.unwhiten)]
            case PrecisionRoot(chol):
                return [-self._gram_excess(chol, root.color)]
            case CholeskyRoot(chol):
                cross = self.contract(self.map(root.unwhiten), self.grid)
                diagonal = pt.diagonal(chol, axis1=-2, axis2=-1)
                return [pt.tril(cross) - _diagonal_matrix(self.copies[..., None] / diagonal)]
        assert isinstance(root, EigenRoot)
        squares = pt.diagonal(self.contract(self.grid, self.grid), axis1=-2, axis2=-1)
        standardised = self.grid / pt.sqrt(root.values)[..., None, :, None]
        return [
            (squares - self.copies[..., None]) / (2 * root.values),
            -self.contract(self.map(root.color), standardised),
        ]

    def _gram_excess(self, chol: TensorVariable, unwhiten: MatrixMap) -> TensorVariable:
        """Return ``1/2 C^-T (W W' - (N / n) I) C^-1``, from ``unwhiten(X) = C^-T X``.

        In this order where the grid is larger than a matrix of the factor, and otherwise, in
        fewer operations, as ``1/2 (V V' - (N / n) (C C')^-1)`` with ``V = C^-T W``.
        """
        p, n, q = self.grid.type.shape[-3:]
        if None not in (p, n, q) and p * q <= n:
            V = self.map(unwhiten)
            return 0.5 * (self.contract(V, V) - self._copies_of(inverse_from_cholesky(chol)))
        identity = pt.eye(chol.shape[-1], dtype=chol.type.dtype)
        excess = self.contract(self.grid, self.grid) - self._copies_of(identity)
        return 0.5 * unwhiten(unwhiten(excess).mT)

    def _copies_of(self, matrix: TensorVariable) -> TensorVariable:
        return self.copies[..., None, None] * matrix


def _weights(
    logp_bar: TensorVariable,
    whitened: TensorVariable,
    sizes: Sequence[Size],
    axis: int,
    batch_ndim: int,
) -> TensorVariable:
    if logp_bar.type.ndim == 0:
        return logp_bar
    return grid_along(
        pt.broadcast_to(logp_bar[..., None], whitened.shape), sizes, axis, batch_ndim=batch_ndim
    )


_diagonal_matrix = pt.vectorize(pt.diag, "(n)->(n,n)")
