"""Operations on grids and factors that BLAS and LAPACK have and PyTensor hasn't.

Each is defined by a graph, which every backend runs. For numba, `pymc_kron.routines` has the
routines: no copy between C and Fortran order for the axes of a grid, half the operations of a
symmetric product, a third of those of an inverse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from pytensor import tensor as pt
from pytensor.compile.rewriting import inline_ofg_node
from pytensor.graph.rewriting.basic import node_rewriter
from pytensor.tensor.variable import TensorVariable

from pymc_kron.closed_form import OpaqueOp, register_before_specialize
from pymc_kron.linalg import AxisMap, contract_grids, map_axis


class Kernel(OpaqueOp):
    """An operation that gives way to its graph, or to a routine.

    Its signature tells `pymc_kron.sizes.Sizes` which sizes agree.
    """

    gufunc_signature: str


class Gram(Kernel):
    """Sum of the Gram matrices of the rows, ``sum_p X[p] X[p]'``: ``(p,n,q)->(n,n)``."""

    gufunc_signature = "(p,n,q)->(n,n)"

    def build_inner_graph(self, grid):
        return [contract_grids(grid, grid)]

    def pullback(self, inputs, outputs, cotangents):
        [grid], [gram_bar] = inputs, cotangents
        return [MultiplyAlong()(gram_bar + gram_bar.mT, grid)]


class InverseFromCholesky(Kernel):
    """Inverse of ``L L'`` from the lower triangular L: ``(n,n)->(n,n)``."""

    gufunc_signature = "(n,n)->(n,n)"

    def build_inner_graph(self, chol):
        identity = pt.eye(chol.shape[-1], dtype=chol.type.dtype)
        return [pt.linalg.cho_solve((chol, True), identity, b_ndim=2)]

    def pullback(self, inputs, outputs, cotangents):
        # dP = -P (dL L' + L dL') P with P = inv(L L')
        [chol], [inverse], [inverse_bar] = inputs, outputs, cotangents
        return [-pt.tril(inverse @ (inverse_bar + inverse_bar.mT) @ inverse @ chol)]


class SolveAlong(Kernel):
    """Solution with a triangular matrix along an axis: ``(n,n),(p,n,q)->(p,n,q)``.

    Parameters
    ----------
    transposed
        Whether to solve with ``L'`` rather than with the lower triangular ``L``.
    """

    __props__ = ("transposed",)
    gufunc_signature = "(n,n),(p,n,q)->(p,n,q)"
    transposed: bool

    def build_inner_graph(self, chol, grid):
        solve = _solve_upper if self.transposed else _solve_lower
        return [map_axis(partial(solve, chol), grid)]

    def pullback(self, inputs, outputs, cotangents):
        [chol, _], [x], [x_bar] = inputs, outputs, cotangents
        b_bar = type(self)(transposed=not self.transposed)(chol, x_bar)
        left, right = (x, b_bar) if self.transposed else (b_bar, x)
        return [-pt.tril(Contract()(left, right)), b_bar]


def _solve_lower(chol: TensorVariable, columns: TensorVariable) -> TensorVariable:
    return pt.linalg.solve_triangular(chol, columns, lower=True)


def _solve_upper(chol: TensorVariable, columns: TensorVariable) -> TensorVariable:
    return pt.linalg.solve_triangular(chol.mT, columns, lower=False)


class Contract(Kernel):
    """Sum of the products of the rows, ``sum_p A[p] B[p]'``: ``(p,n,q),(p,m,q)->(n,m)``."""

    gufunc_signature = "(p,n,q),(p,m,q)->(n,m)"

    def build_inner_graph(self, left, right):
        return [contract_grids(left, right)]

    def pullback(self, inputs, outputs, cotangents):
        [left, right], [product_bar] = inputs, cotangents
        return [MultiplyAlong()(product_bar, right), MultiplyAlong()(product_bar.mT, left)]


class MultiplyAlong(Kernel):
    """Product with a matrix along an axis: ``(k,n),(p,n,q)->(p,k,q)``."""

    gufunc_signature = "(k,n),(p,n,q)->(p,k,q)"

    def build_inner_graph(self, matrix, grid):
        return [map_axis(matrix.__matmul__, grid)]

    def pullback(self, inputs, outputs, cotangents):
        [matrix, grid], [product_bar] = inputs, cotangents
        return [Contract()(product_bar, grid), type(self)()(matrix.mT, product_bar)]


def eigh_of_finite(
    eigh: Callable, matrix: TensorVariable, *metrics: TensorVariable
) -> list[TensorVariable]:
    """Return eigenvalues and eigenvectors, with NaN eigenvalues of a matrix that isn't finite.

    LAPACK may run for ever on NaN, and SciPy raises an error. A sampler that has strayed off
    needs to be told NaN, as by a Cholesky factor.

    Parameters
    ----------
    eigh
        What decomposes the matrix into its eigenvalues, and eigenvectors if it gives any.
    matrix
        The matrix.
    *metrics
        The metric of a generalised problem.
    """
    is_finite = pt.all(pt.lt(pt.abs(matrix), np.inf), axis=(-2, -1), keepdims=True)
    finite = pt.switch(is_finite, matrix, 0).astype(matrix.type.dtype)
    values, *vectors = eigh(finite, *metrics)
    values = pt.switch(is_finite[..., 0], values, np.nan).astype(values.type.dtype)
    return [values, *vectors]


class FiniteEigh(Kernel):
    """Eigenvalues and eigenvectors of a symmetric matrix: ``(n,n)->(n),(n,n)``.

    As by `eigh_of_finite`. It has no pullback: it is for operations that have one of their own.
    """

    gufunc_signature = "(n,n)->(n),(n,n)"

    def build_inner_graph(self, matrix):
        return eigh_of_finite(partial(pt.linalg.eigh, driver="evd"), matrix)


def gram(grid: TensorVariable) -> TensorVariable:
    """Return ``sum_p X[p] X[p]'``: ``(p,n,q)->(n,n)``."""
    return Gram()(grid)


def contract(left: TensorVariable, right: TensorVariable) -> TensorVariable:
    """Return ``sum_p A[p] B[p]'``: ``(p,n,q),(p,m,q)->(n,m)``."""
    return Contract()(left, right)


def finite_eigh(matrix: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
    """Return eigenvalues and eigenvectors, with NaN eigenvalues of what isn't finite."""
    return FiniteEigh()(matrix)


def inverse_from_cholesky(chol: TensorVariable) -> TensorVariable:
    """Return the inverse of ``L L'``: ``(n,n)->(n,n)``."""
    return InverseFromCholesky()(chol)


@dataclass(frozen=True)
class Multiply(AxisMap):
    """A matrix as a linear map.

    Attributes
    ----------
    matrix
        The matrix, ``(..., k, n)``.
    """

    matrix: TensorVariable

    def __call__(self, columns):
        return self.matrix @ columns

    def along(self, grid):
        return MultiplyAlong()(self.matrix, grid)


@dataclass(frozen=True)
class TriangularSolve(AxisMap):
    """The inverse of a lower triangular matrix, or of its transpose, as a linear map.

    Attributes
    ----------
    chol
        The lower triangular matrix, ``(..., n, n)``.
    transposed
        Whether to solve with the transpose.
    """

    chol: TensorVariable
    transposed: bool = False

    def __call__(self, columns):
        return (_solve_upper if self.transposed else _solve_lower)(self.chol, columns)

    def along(self, grid):
        return SolveAlong(transposed=self.transposed)(self.chol, grid)


@node_rewriter([Kernel])
def inline_kernel(fgraph, node):
    """An operation on a grid or a factor -> the graph that defines it"""
    return inline_ofg_node(node)


BEFORE_KERNELS_ARE_INLINED = 1.9
register_before_specialize(inline_kernel, "fast_run", "fast_compile", position=1.91)
