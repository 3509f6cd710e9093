"""Roots of positive definite factors: ``Sigma = R R'``, from whatever describes the factor."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pytensor import tensor as pt
from pytensor.tensor.variable import TensorVariable

from pymc_kron.kernels import Multiply, TriangularSolve
from pymc_kron.linalg import MatrixMap


class Root(ABC):
    """A root ``R`` of a covariance ``Sigma = R R'``, which is applied and never formed."""

    @property
    @abstractmethod
    def whiten(self) -> MatrixMap:
        """The map to ``inv(R) columns``: ``(n,m)->(n,m)``."""

    @property
    @abstractmethod
    def unwhiten(self) -> MatrixMap:
        """The map to ``inv(R)' columns``: ``(n,m)->(n,m)``. ``inv(Sigma) = inv(R)' inv(R)``."""

    @property
    @abstractmethod
    def color(self) -> MatrixMap:
        """The map to ``R columns``: ``(n,m)->(n,m)``."""

    @property
    @abstractmethod
    def logdet(self) -> TensorVariable:
        """The log-determinant of ``Sigma``: ``(n,n)->()``."""

    @property
    @abstractmethod
    def exists(self) -> TensorVariable:
        """Whether ``Sigma`` is positive definite: ``(n,n)->()``."""


@dataclass(frozen=True)
class CholeskyRoot(Root):
    """The root ``R = chol`` of a covariance ``chol chol'``.

    Attributes
    ----------
    chol
        A lower triangular matrix, ``(..., n, n)``.
    """

    chol: TensorVariable

    @property
    def whiten(self) -> MatrixMap:
        return TriangularSolve(self.chol)

    @property
    def unwhiten(self) -> MatrixMap:
        return TriangularSolve(self.chol, transposed=True)

    @property
    def color(self) -> MatrixMap:
        return Multiply(self.chol)

    @property
    def diagonal(self) -> TensorVariable:
        """The absolute diagonal: that of a triangular root that was given may be negative."""
        return pt.abs(pt.diagonal(self.chol, axis1=-2, axis2=-1))

    @property
    def logdet(self) -> TensorVariable:
        return 2.0 * pt.log(self.diagonal).sum(axis=-1)

    @property
    def exists(self) -> TensorVariable:
        return pt.all(self.diagonal > 0, axis=-1)


@dataclass(frozen=True)
class PrecisionRoot(Root):
    """The root ``R = inv(chol)'`` of a covariance whose inverse is ``chol chol'``.

    Attributes
    ----------
    chol
        A lower triangular matrix, ``(..., n, n)``.
    """

    chol: TensorVariable

    @property
    def whiten(self) -> MatrixMap:
        return Multiply(self.chol.mT)

    @property
    def unwhiten(self) -> MatrixMap:
        return Multiply(self.chol)

    @property
    def color(self) -> MatrixMap:
        return TriangularSolve(self.chol, transposed=True)

    @property
    def logdet(self) -> TensorVariable:
        return -CholeskyRoot(self.chol).logdet

    @property
    def exists(self) -> TensorVariable:
        return CholeskyRoot(self.chol).exists


@dataclass(frozen=True)
class EigenRoot(Root):
    """The root ``R = Q diag(sqrt(w))`` of a covariance ``Q diag(w) Q'``.

    Attributes
    ----------
    values
        The eigenvalues ``w``, ``(..., n)``.
    vectors
        The orthogonal matrix ``Q``, ``(..., n, n)``.
    """

    values: TensorVariable
    vectors: TensorVariable

    @property
    def _scales(self) -> TensorVariable:
        return pt.sqrt(self.values)[..., None, :]

    @property
    def whiten(self) -> MatrixMap:
        return Multiply((self.vectors / self._scales).mT)

    @property
    def unwhiten(self) -> MatrixMap:
        return Multiply(self.vectors / self._scales)

    @property
    def color(self) -> MatrixMap:
        return Multiply(self.vectors * self._scales)

    @property
    def logdet(self) -> TensorVariable:
        return pt.log(self.values).sum(axis=-1)

    @property
    def exists(self) -> TensorVariable:
        return pt.all(self.values > 0, axis=-1)


@dataclass(frozen=True)
class IdentityRoot(Root):
    """The root ``R = I`` of an identity matrix, which takes no operation.

    Attributes
    ----------
    identity
        The matrix, ``(..., n, n)``.
    """

    identity: TensorVariable

    @property
    def whiten(self) -> MatrixMap:
        return lambda columns: columns

    unwhiten = color = whiten

    @property
    def logdet(self) -> TensorVariable:
        return pt.zeros((), dtype=self.identity.type.dtype)

    @property
    def exists(self) -> TensorVariable:
        return pt.constant(True)
