"""Covariances of all cells of a grid: what can be done with one, factorwise.

A covariance is a product of factors, or a sum of products that one basis diagonalises, such as a
product with noise. It is described by its structure, which is known when the graph is built, and
its parts, which are variables.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from pytensor import tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_kron.factors import Factor, Form, core_ndims, factors_of
from pymc_kron.kron_sum import Basis, KronSum, KronSumSLogDet, KronSumSolve, Layout
from pymc_kron.kron_sum_logp import KronSumLogp
from pymc_kron.kronecker_logp import KroneckerLogp
from pymc_kron.linalg import (
    MatrixMap,
    apply_to_vectors,
    copies_of,
    kron_diagonal,
    kron_entries,
    kron_matmul,
    kron_of_vectors,
)
from pymc_kron.structure import Matrices, Size, column_sizes, row_sizes

type Structure = tuple[Form, ...] | Layout
"""What the parts of a covariance are: a form for each factor, or the layout of a `KronSum`."""


class Covariance(ABC):
    """A covariance ``K = R R'`` of the cells of a grid, in row-major order.

    Vectors are of shape ``(..., N)``.
    """

    @property
    @abstractmethod
    def structure(self) -> Structure:
        """What the parts are."""

    @property
    @abstractmethod
    def parts(self) -> list[TensorVariable]:
        """All variables."""

    @property
    @abstractmethod
    def core_shapes(self) -> list[str]:
        """The core shape of each part, as in the signature of a gufunc: ``(n0,n0)``."""

    @property
    @abstractmethod
    def sizes(self) -> Sequence[Size]:
        """The sizes of the axes, ``n_1, ..., n_d``."""

    @abstractmethod
    def log_density(self, delta: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Return the log-density of a residual and whether there is one: ``(N)->(),()``."""

    @property
    @abstractmethod
    def logdet(self) -> TensorVariable:
        """The log-determinant of ``K``, ``(...)``."""

    @property
    @abstractmethod
    def exists(self) -> TensorVariable:
        """Whether ``K`` is positive definite, ``(...)``."""

    @abstractmethod
    def color(self, z: TensorVariable) -> TensorVariable:
        """Return ``R z``: ``(N)->(N)``."""

    @abstractmethod
    def whiten(self, x: TensorVariable) -> TensorVariable:
        """Return ``inv(R) x``: ``(N)->(N)``."""

    @abstractmethod
    def solve(self, x: TensorVariable) -> TensorVariable:
        """Return ``inv(K) x``: ``(N)->(N)``."""

    @abstractmethod
    def multiply(self, x: TensorVariable) -> TensorVariable:
        """Return ``K x``: ``(N)->(N)``."""

    @abstractmethod
    def diagonal(self) -> TensorVariable:
        """Return the diagonal of ``K``, ``(..., N)``."""

    @abstractmethod
    def precision_diagonal(self) -> TensorVariable:
        """Return the diagonal of ``inv(K)``, ``(..., N)``."""

    @abstractmethod
    def entries(self, rows: TensorVariable, columns: TensorVariable) -> TensorVariable:
        """Return ``K[rows, columns]``: ``(m),(k)->(m,k)``."""

    @abstractmethod
    def precision_entries(self, cells: TensorVariable) -> TensorVariable:
        """Return ``inv(K)[cells, cells]``: ``(m)->(m,m)``."""

    @abstractmethod
    def restricted(self, levels: Sequence[np.ndarray | None]) -> "Covariance":
        """Return the covariance of the cells with some levels of each axis, or None for all."""

    # Prediction, where K is S_1 (x) ... (x) S_d alone or with noise: C = C_1 (x) ... (x) C_d are
    # the covariances of new cells with those of the grid, C_i of shape (m_i, n_i), or None for S_i
    # where the new cells have the points of the grid

    @property
    @abstractmethod
    def signal(self) -> Sequence[Factor]:
        """The factors ``S_i`` of the product without noise."""

    @abstractmethod
    def signal_root(self, axis: int) -> TensorVariable:
        """Return a root of ``S_i``, which may be singular: ``(n,n)``."""

    @property
    @abstractmethod
    def noise(self) -> "KroneckerCovariance | None":
        """The covariance of the noise, if there is any."""

    @abstractmethod
    def regress(
        self, crosses: Sequence[TensorVariable | None], x: TensorVariable
    ) -> TensorVariable:
        """Return ``C inv(K) x``: ``(N)->(M)``."""

    @abstractmethod
    def explained_variance(self, crosses: Sequence[TensorVariable | None]) -> TensorVariable:
        """Return the diagonal of ``C inv(K) C'``, ``(..., M)``."""


@dataclass(frozen=True)
class KroneckerCovariance(Covariance):
    """The covariance ``K_1 (x) ... (x) K_d``, whose root is that of the factors.

    Attributes
    ----------
    factors
        The factors ``K_i``.
    """

    factors: Sequence[Factor]

    @property
    def structure(self) -> Structure:
        return tuple(factor.form for factor in self.factors)

    @property
    def parts(self) -> list[TensorVariable]:
        return [part for factor in self.factors for part in factor.parts]

    @property
    def core_shapes(self) -> list[str]:
        return [
            f"({','.join([f'n{i}'] * ndim)})"
            for i, factor in enumerate(self.factors)
            for ndim in core_ndims(factor.form)
        ]

    @property
    def sizes(self) -> Sequence[Size]:
        return [factor.size for factor in self.factors]

    def log_density(self, delta: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        return KroneckerLogp(forms=self.structure)(delta, *self.parts)

    @property
    def logdet(self) -> TensorVariable:
        return sum(
            copies_of(self.sizes, i) * factor.root().logdet for i, factor in enumerate(self.factors)
        )

    @property
    def exists(self) -> TensorVariable:
        return reduce(pt.and_, [factor.root().exists for factor in self.factors])

    def color(self, z: TensorVariable) -> TensorVariable:
        return self._apply([factor.root().color for factor in self.factors], z)

    def whiten(self, x: TensorVariable) -> TensorVariable:
        return self._apply([factor.root().whiten for factor in self.factors], x)

    def solve(self, x: TensorVariable) -> TensorVariable:
        roots = [factor.root() for factor in self.factors]
        whitened = self._apply([root.whiten for root in roots], x)
        return self._apply([root.unwhiten for root in roots], whitened)

    def multiply(self, x: TensorVariable) -> TensorVariable:
        return kron_matmul(self._covariances, x)

    def diagonal(self) -> TensorVariable:
        return kron_diagonal(self._covariances)

    def precision_diagonal(self) -> TensorVariable:
        return kron_diagonal(self._precisions)

    def entries(self, rows: TensorVariable, columns: TensorVariable) -> TensorVariable:
        return kron_entries(self._covariances, rows, columns)

    def precision_entries(self, cells: TensorVariable) -> TensorVariable:
        return kron_entries(self._precisions, cells, cells)

    def restricted(self, levels: Sequence[np.ndarray | None]) -> "Covariance":
        return KroneckerCovariance(
            [
                factor if own is None else Factor("cov", (_restricted(factor.covariance(), own),))
                for factor, own in zip(self.factors, levels, strict=True)
            ]
        )

    @property
    def _covariances(self) -> list[TensorVariable]:
        return [factor.covariance() for factor in self.factors]

    @property
    def _precisions(self) -> list[TensorVariable]:
        return [factor.precision() for factor in self.factors]

    @property
    def signal(self) -> Sequence[Factor]:
        return self.factors

    def signal_root(self, axis: int) -> TensorVariable:
        factor = self.factors[axis]
        return factor.root().color(pt.eye(factor.size, dtype=factor.parts[-1].dtype))

    @property
    def noise(self) -> "KroneckerCovariance | None":
        return None

    def regress(
        self, crosses: Sequence[TensorVariable | None], x: TensorVariable
    ) -> TensorVariable:
        maps: list[MatrixMap] = []
        out_sizes = list(self.sizes)
        for i, (factor, cross) in enumerate(zip(self.factors, crosses, strict=True)):
            if cross is None:
                # S inv(S) = I
                maps.append(lambda columns: columns)
                continue
            root = factor.root()
            maps.append(root.unwhiten(root.whiten(cross.mT)).mT.__matmul__)
            [out_sizes[i]] = row_sizes([cross])
        batch_ndims = [cross.type.ndim - 2 for cross in crosses if cross is not None]
        batch_ndim = max(*batch_ndims, *(factor.batch_ndim for factor in self.factors), 0)
        return apply_to_vectors(maps, self.sizes, out_sizes, x, batch_ndim=batch_ndim)

    def explained_variance(self, crosses: Sequence[TensorVariable | None]) -> TensorVariable:
        # C inv(S) C' = W' W with W = inv(R) C'
        return kron_of_vectors(
            [
                kron_diagonal([factor.covariance()])
                if cross is None
                else (factor.root().whiten(cross.mT) ** 2).sum(axis=-2)
                for factor, cross in zip(self.factors, crosses, strict=True)
            ]
        )

    def _apply(self, maps: Sequence[MatrixMap], x: TensorVariable) -> TensorVariable:
        batch_ndim = max(factor.batch_ndim for factor in self.factors)
        return apply_to_vectors(maps, self.sizes, self.sizes, x, batch_ndim=batch_ndim)


@dataclass(frozen=True)
class KronSumCovariance(Covariance):
    """A covariance ``R Lambda R'``, with the root ``R sqrt(Lambda)``.

    Attributes
    ----------
    kron_sum
        The sum of products.
    """

    kron_sum: KronSum

    @property
    def structure(self) -> Structure:
        return self.kron_sum.layout

    @property
    def parts(self) -> list[TensorVariable]:
        return self.kron_sum.inputs

    @property
    def core_shapes(self) -> list[str]:
        layout = self.kron_sum.layout
        matrices = [f"(n{i},n{i})" for i in range(len(self.kron_sum.signals))]
        metrics = [shape for shape, has in zip(matrices, layout.has_metric, strict=True) if has]
        eigenvalues = [f"(n{i})" for i, decomposed in enumerate(layout.is_decomposed) if decomposed]
        return ["()" for _ in self.kron_sum.scales] + matrices + metrics + eigenvalues

    @property
    def sizes(self) -> Sequence[Size]:
        return column_sizes(self.kron_sum.signals)

    def log_density(self, delta: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        return KronSumLogp(layout=self.structure)(*self.parts, delta)

    @property
    def logdet(self) -> TensorVariable:
        _, logdet = KronSumSLogDet(layout=self.structure)(*self.parts)
        return logdet

    @property
    def exists(self) -> TensorVariable:
        return pt.all(pt.gt(self._basis.values, 0), axis=-1)

    def color(self, z: TensorVariable) -> TensorVariable:
        basis = self._basis
        return kron_matmul(self.kron_sum.roots(basis), pt.sqrt(basis.values) * z)

    def whiten(self, x: TensorVariable) -> TensorVariable:
        basis = self._basis
        return basis.project(x) / pt.sqrt(basis.values)

    def solve(self, x: TensorVariable) -> TensorVariable:
        return KronSumSolve(layout=self.structure)(*self.parts, x)

    def multiply(self, x: TensorVariable) -> TensorVariable:
        return self._sum(lambda factors: kron_matmul(factors, x), core_ndim=1)

    def diagonal(self) -> TensorVariable:
        return self._sum(kron_diagonal, core_ndim=1)

    def precision_diagonal(self) -> TensorVariable:
        basis = self._basis
        return kron_matmul([vectors**2 for vectors in basis.vectors], 1 / basis.values)

    def entries(self, rows: TensorVariable, columns: TensorVariable) -> TensorVariable:
        return self._sum(lambda factors: kron_entries(factors, rows, columns), core_ndim=2)

    def precision_entries(self, cells: TensorVariable) -> TensorVariable:
        n_cells = cells.shape[0]
        units = pt.zeros((n_cells, math.prod(self.sizes)), dtype=self.parts[-1].dtype)
        units = pt.set_subtensor(units[pt.arange(n_cells), cells], 1.0)
        # The unit vectors are a batch before that of the covariance
        solutions = self.solve(pt.expand_dims(units, range(1, 1 + self.kron_sum.batch_ndim)))
        return pt.moveaxis(solutions[..., cells], 0, -2)

    def restricted(self, levels: Sequence[np.ndarray | None]) -> "Covariance":
        layout = self.kron_sum.layout
        signals, metrics, eigenvalues, is_decomposed = [], [], [], []
        for axis, own in zip(self.kron_sum.axes, levels, strict=True):
            signals.append(axis.signal if own is None else _restricted(axis.signal_matrix, own))
            if axis.metric is not None:
                metrics.append(axis.metric if own is None else _restricted(axis.metric, own))
            is_decomposed.append(own is None and axis.eigenvalues is not None)
            if is_decomposed[-1]:
                eigenvalues.append(axis.eigenvalues)
        layout = replace(layout, is_decomposed=tuple(is_decomposed))
        return KronSumCovariance(
            KronSum(layout, self.kron_sum.scales, signals, metrics, eigenvalues)
        )

    def _sum(
        self, part_of: Callable[[Matrices], TensorVariable], *, core_ndim: int
    ) -> TensorVariable:
        """Return what is linear in the covariance, from that of each product."""
        terms = [
            pt.expand_dims(scale, tuple(range(-core_ndim, 0))) * part_of(self.kron_sum.factors(t))
            for t, scale in enumerate(self.kron_sum.scales)
        ]
        return reduce(pt.add, terms)

    @property
    def signal(self) -> Sequence[Factor]:
        return [
            Factor("cov", (axis.signal,))
            if axis.eigenvalues is None
            else Factor("evd", (axis.eigenvalues, axis.signal))
            for axis in self.kron_sum.axes
        ]

    def signal_root(self, axis: int) -> TensorVariable:
        # S = (D P) diag(w) (D P)'; the eigenvalues of a singular factor are zeros, up to rounding
        basis = self._basis
        values = pt.maximum(basis.axes[axis].values, 0)
        return self.kron_sum.roots(basis)[axis] * pt.sqrt(values)[..., None, :]

    @property
    def noise(self) -> "KroneckerCovariance | None":
        scale = self.kron_sum.scales[1][..., None, None]
        first, *others = self.kron_sum.factors(1)
        return KroneckerCovariance(
            [Factor("cov", (metric,)) for metric in (scale * first, *others)]
        )

    def regress(
        self, crosses: Sequence[TensorVariable | None], x: TensorVariable
    ) -> TensorVariable:
        basis = self._basis
        return kron_matmul(self._projected(crosses, basis), basis.project(x) / basis.values)

    def explained_variance(self, crosses: Sequence[TensorVariable | None]) -> TensorVariable:
        basis = self._basis
        return kron_matmul(
            [projected**2 for projected in self._projected(crosses, basis)], 1 / basis.values
        )

    def _projected(
        self, crosses: Sequence[TensorVariable | None], basis: Basis
    ) -> list[TensorVariable]:
        """Return ``C_i P_i``: ``C inv(K) C' = C P diag(1 / Lambda) (C P)'``."""
        return [
            (axis.signal_matrix if cross is None else cross) @ vectors
            for axis, cross, vectors in zip(self.kron_sum.axes, crosses, basis.vectors, strict=True)
        ]

    @property
    def _basis(self) -> Basis:
        return self.kron_sum.basis()


def _restricted(matrix: TensorVariable, levels: np.ndarray) -> TensorVariable:
    return matrix[..., levels[:, None], levels]


def covariance_of(structure: Structure, parts: Sequence[TensorVariable]) -> Covariance:
    """Return the covariance of which these are the parts."""
    if isinstance(structure, Layout):
        return KronSumCovariance(KronSum.from_inputs(structure, parts))
    return KroneckerCovariance(factors_of(structure, parts))
