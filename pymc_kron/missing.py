"""Missing cells of a grid, integrated out exactly.

With ``P = inv(K)``, the cells ``m`` that are missing and the cells ``o`` that are observed, a
residual ``x ~ N(0, K)`` has::

    x_m | x_o ~ N(-inv(P_mm) P_mo x_o, inv(P_mm))
    log det K_oo = log det K + log det P_mm

(Rue and Held (2005), "Gaussian Markov random fields", theorem 2.5). With this mean in place of
``x_m``, the quadratic form of the whole grid is that of the observed cells, ``x' P x = x_o'
inv(K_oo) x_o``, and their log-density is ::

    log N(x_o; 0, K_oo) = log N(x; 0, K) - 1/2 log det P_mm + M/2 log(2 pi)

``P_mm`` is of shape ``(M, M)``, and its entries come from the inverses of the factors. Where fewer
cells are observed than missing, ``K_oo`` is the smaller of the two matrices, and its entries are
those of the factors. Levels of an axis without any data are left out before: the covariance of the
others is a product as well.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from pytensor import tensor as pt
from pytensor.graph.basic import Constant
from pytensor.tensor import TensorLike
from pytensor.tensor.variable import TensorVariable

from pymc_kron.covariances import Covariance
from pymc_kron.kernels import inverse_from_cholesky
from pymc_kron.linalg import MatrixMap, apply_to_vectors
from pymc_kron.roots import CholeskyRoot
from pymc_kron.structure import current_length, evaluated


@dataclass(frozen=True)
class Cells:
    """Which cells of a grid are missing, in row-major order.

    Attributes
    ----------
    missing
        The indices of the missing cells, ``(M,)``.
    observed
        Those of the others, ``(O,)``.
    """

    missing: TensorVariable
    observed: TensorVariable

    @classmethod
    def of(cls, is_missing: TensorVariable) -> "Cells":
        """Return the cells for which this is true, ``(N,)``; constants where it is one."""
        known = evaluated(is_missing, Constant)
        if known is None:
            return cls(*(pt.nonzero(cells)[0] for cells in (is_missing, ~is_missing)))
        return cls(*(pt.constant(np.flatnonzero(cells)) for cells in (known, ~known)))

    def regression(self, covariance: Covariance) -> "Regression":
        """Return the regression with the smaller matrix, for the numbers that there are now."""
        n_missing, n_observed = (
            current_length(cells.shape[0]) for cells in (self.missing, self.observed)
        )
        if n_missing is not None and n_observed is not None and n_observed < n_missing:
            return OnFewObserved(covariance, self)
        return OfFewMissing(covariance, self)


@dataclass(frozen=True)
class Regression(ABC):
    """The distribution of the observed cells, and that of the missing ones given them.

    Residuals are of shape ``(..., N)``. It doesn't matter which numbers, other than NaN, stand in
    their missing cells.

    Attributes
    ----------
    covariance
        The covariance of all cells.
    cells
        Which ones are missing.
    """

    covariance: Covariance
    cells: Cells

    @abstractmethod
    def log_density(self, x: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        """Return the log-density of the observed cells and whether there is one."""

    @abstractmethod
    def mean(self, x: TensorVariable) -> TensorVariable:
        """Return the conditional mean of the missing cells: ``(N)->(M)``."""

    @abstractmethod
    def variance(self) -> TensorVariable:
        """Return the conditional variances of the missing cells, ``(..., M)``."""

    def draw(self, x: TensorVariable, z: TensorVariable) -> TensorVariable:
        """Return a draw of the missing cells from standard normals: ``(N),(N)->(M)``.

        The error of a prediction doesn't depend on the data. It is drawn with a grid of its own.
        """
        grid = self.covariance.color(z)
        return self.mean(x) + grid[..., self.cells.missing] - self.mean(grid)


class OfFewMissing(Regression):
    """A regression with the precision ``P_mm`` of the missing cells."""

    def log_density(self, x: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        mean = self.mean(x)
        n_missing = mean.shape[-1]
        # The batch of the covariance may be larger than that of the residual
        grids = pt.zeros((*tuple(mean.shape)[:-1], x.shape[-1]), dtype=mean.type.dtype)
        filled = self._with_missing(x, 0.0) + self._with_missing(grids, mean)
        logp, exists = self.covariance.log_density(filled)
        root = self._root
        logp = logp - 0.5 * root.logdet + n_missing * (0.5 * math.log(2 * math.pi))
        return logp, exists & root.exists

    def mean(self, x: TensorVariable) -> TensorVariable:
        slope = self.covariance.solve(self._with_missing(x, 0.0))
        return -_solve(self._root, slope[..., self.cells.missing])

    def variance(self) -> TensorVariable:
        return pt.diagonal(inverse_from_cholesky(self._root.chol), axis1=-2, axis2=-1)

    @property
    def _root(self) -> CholeskyRoot:
        return CholeskyRoot(
            pt.linalg.cholesky(self.covariance.precision_entries(self.cells.missing))
        )

    def _with_missing(self, x: TensorVariable, values: TensorLike) -> TensorVariable:
        return pt.set_subtensor(x[..., self.cells.missing], values)


class OnFewObserved(Regression):
    """A regression with the covariance ``K_oo`` of the observed cells."""

    def log_density(self, x: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
        observed = x[..., self.cells.observed]
        n_observed = observed.shape[-1]
        root = self._root
        whitened = _map(root.whiten, root, observed)
        logp = -0.5 * (whitened**2).sum(axis=-1) - 0.5 * root.logdet
        return logp - n_observed * (0.5 * math.log(2 * math.pi)), root.exists

    def mean(self, x: TensorVariable) -> TensorVariable:
        weights = _solve(self._root, x[..., self.cells.observed])
        grids = pt.zeros((*tuple(weights.shape)[:-1], x.shape[-1]), dtype=weights.type.dtype)
        grids = pt.set_subtensor(grids[..., self.cells.observed], weights)
        return self.covariance.multiply(grids)[..., self.cells.missing]

    def variance(self) -> TensorVariable:
        observed, missing = self.cells.observed, self.cells.missing
        explained = self._root.whiten(self.covariance.entries(observed, missing)) ** 2
        return self.covariance.diagonal()[..., missing] - explained.sum(axis=-2)

    @property
    def _root(self) -> CholeskyRoot:
        observed = self.cells.observed
        return CholeskyRoot(pt.linalg.cholesky(self.covariance.entries(observed, observed)))


def _map(linear_map: MatrixMap, root: CholeskyRoot, x: TensorVariable) -> TensorVariable:
    """Apply a map to vectors: ``(k)->(k)``. Those that share a matrix go through it together."""
    size, batch_ndim = x.shape[-1], root.chol.type.ndim - 2
    return apply_to_vectors([linear_map], [size], [size], x, batch_ndim=batch_ndim)


def _solve(root: CholeskyRoot, x: TensorVariable) -> TensorVariable:
    return _map(root.unwhiten, root, _map(root.whiten, root, x))


def marginal_log_density(
    covariance: Covariance, x: TensorVariable, is_missing: TensorVariable
) -> tuple[TensorVariable, TensorVariable]:
    """Return the log-density of the observed cells of residuals and whether there is one.

    Parameters
    ----------
    covariance
        The covariance of all cells.
    x
        The residuals, ``(..., N)``, with any numbers in the missing cells.
    is_missing
        Which cells are missing, ``(N,)``.
    """
    x = pt.switch(is_missing, 0, x)
    sizes, known = covariance.sizes, evaluated(is_missing, Constant)
    if known is not None and all(isinstance(size, int) for size in sizes):
        # Without levels that have no data, the covariance is a product too, and a smaller one
        grid = known.reshape(sizes)
        levels = [np.flatnonzero(~grid.all(axis=_others(grid.ndim, i))) for i in range(grid.ndim)]
        cells = np.arange(grid.size).reshape(sizes)[np.ix_(*levels)].ravel()
        if len(cells) < grid.size:
            covariance = covariance.restricted(
                [own if len(own) < n else None for own, n in zip(levels, sizes, strict=True)]
            )
            x, is_missing = x[..., cells], pt.constant(known[cells])
        if not known[cells].any():
            return covariance.log_density(x)
    return Cells.of(is_missing).regression(covariance).log_density(x)


def _others(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(ndim) if other != axis)
