"""Roots of positive definite factors: ``Sigma = R R'``, from a covariance or from a precision."""

from dataclasses import dataclass
from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.variable import TensorVariable

_solve_lower = partial(pt.linalg.solve_triangular, lower=True)
_solve_upper = partial(pt.linalg.solve_triangular, lower=False)


@dataclass(frozen=True)
class Root:
    """A root ``R`` of a covariance ``Sigma = R R'``, kept as a Cholesky factor.

    Attributes
    ----------
    chol
        The lower Cholesky factor, ``(..., n, n)``, of the covariance, or of the precision.
    of_precision
        If False, ``Sigma = chol chol'`` and ``R = chol``; if True, ``inv(Sigma) = chol chol'``
        and ``R = inv(chol)'``, which is never formed.
    """

    chol: TensorVariable
    of_precision: bool = False

    def whiten(self, columns: TensorVariable) -> TensorVariable:
        """Return ``inv(R) columns``: ``(n,m)->(n,m)``."""
        return self.chol.mT @ columns if self.of_precision else _solve_lower(self.chol, columns)

    def color(self, columns: TensorVariable) -> TensorVariable:
        """Return ``R columns``: ``(n,m)->(n,m)``."""
        return _solve_upper(self.chol.mT, columns) if self.of_precision else self.chol @ columns

    @property
    def logdet(self) -> TensorVariable:
        """The log-determinant of ``Sigma``: ``(n,n)->()``."""
        # A triangular root that was given may have negative entries on its diagonal
        diagonal = pt.abs(pt.diagonal(self.chol, axis1=-2, axis2=-1))
        return (-2 if self.of_precision else 2) * pt.log(diagonal).sum(axis=-1)

    @property
    def exists(self) -> TensorVariable:
        """Whether the matrix that ``chol`` is the root of is positive definite: ``(n,n)->()``."""
        return pt.all(pt.abs(pt.diagonal(self.chol, axis1=-2, axis2=-1)) > 0, axis=-1)
