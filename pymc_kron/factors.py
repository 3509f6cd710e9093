"""Factors of a covariance, as they are given: covariances, roots, precisions, eigenvectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pytensor import tensor as pt
from pytensor.assumptions.specify import assume
from pytensor.tensor.variable import TensorVariable

from pymc_kron.kernels import inverse_from_cholesky
from pymc_kron.roots import CholeskyRoot, EigenRoot, PrecisionRoot, Root
from pymc_kron.structure import Size, column_sizes

type Form = Literal["cov", "chol", "tau", "evd"]
"""What a factor is: a covariance, its lower Cholesky factor, its inverse, its eigenvectors."""


@dataclass(frozen=True)
class Factor:
    """A covariance matrix ``(..., n, n)`` and what describes it.

    Attributes
    ----------
    form
        What describes it.
    parts
        The matrix that the form is about, or the eigenvalues ``(..., n)`` and eigenvectors.
    """

    form: Form
    parts: tuple[TensorVariable, ...]

    @property
    def size(self) -> Size:
        """The number ``n``."""
        [size] = column_sizes(self.parts[-1:])
        return size

    @property
    def batch_ndim(self) -> int:
        """The number of batch dimensions."""
        return max(
            part.type.ndim - core_ndim
            for part, core_ndim in zip(self.parts, core_ndims(self.form), strict=True)
        )

    def covariance(self) -> TensorVariable:
        """Write down the covariance: ``(n,n)->(n,n)``."""
        match self.form, self.parts:
            case "cov", (cov,):
                pass
            case "chol", (chol,):
                chol = assume(chol, lower_triangular=True)
                cov = chol @ chol.mT
            case "tau", (tau,):
                cov = pt.linalg.inv(tau)
            case "evd", (values, vectors):
                vectors = assume(vectors, orthogonal=True)
                cov = (vectors * values[..., None, :]) @ vectors.mT
        return assume(cov, positive_definite=True)

    def precision(self) -> TensorVariable:
        """Write down the inverse of the covariance: ``(n,n)->(n,n)``."""
        match self.form, self.parts:
            case "tau", (tau,):
                return tau
            case "evd", (values, vectors):
                return (vectors / values[..., None, :]) @ vectors.mT
        root = self.root()
        assert isinstance(root, CholeskyRoot)
        return inverse_from_cholesky(root.chol)

    def root(self) -> Root:
        """Return the root of the covariance."""
        match self.form, self.parts:
            case "chol", (chol,):
                return CholeskyRoot(chol)
            case "tau", (tau,):
                return PrecisionRoot(pt.linalg.cholesky(tau))
            case "evd", (values, vectors):
                return EigenRoot(values, vectors)
        [cov] = self.parts
        return CholeskyRoot(pt.linalg.cholesky(cov))


def core_ndims(form: Form) -> tuple[int, ...]:
    """Return the number of core dimensions of each part."""
    return (1, 2) if form == "evd" else (2,)


def factors_of(forms: Sequence[Form], parts: Sequence[TensorVariable]) -> list[Factor]:
    """Return the factors that some variables are the parts of, one after the other."""
    remaining = iter(parts)
    return [Factor(form, tuple(next(remaining) for _ in core_ndims(form))) for form in forms]
