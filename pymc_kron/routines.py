"""Operations that are one routine of BLAS or LAPACK, for programs that numba compiles.

They take the place of the operations of `pymc_kron.kernels`, for matrices and grids without batch
dimensions.
"""

from abc import abstractmethod

import numpy as np
import scipy.linalg
from pytensor.compile.mode import optdb
from pytensor.graph.basic import Apply
from pytensor.graph.rewriting.basic import dfs_rewriter, node_rewriter
from pytensor.tensor.type import matrix, tensor3, vector

from pymc_kron.backend_op import BackendOp
from pymc_kron.closed_form import register_before_specialize
from pymc_kron.kernels import (
    BEFORE_KERNELS_ARE_INLINED,
    Contract,
    FiniteEigh,
    Gram,
    InverseFromCholesky,
    Kernel,
    MultiplyAlong,
    SolveAlong,
)


class Routine(BackendOp):
    """A routine that numba calls, and that Python has as well."""

    conversion = "pymc_kron.numba_kernels"


class BlasGram(Routine):
    """Sum of the Gram matrices of the rows, by ``syrk``: ``(p,n,q)->(n,n)``."""

    __props__ = ()

    def make_node(self, grid):
        _, n, _ = grid.type.shape
        return Apply(self, [grid], [matrix(dtype=grid.type.dtype, shape=(n, n))])

    def infer_shape(self, *args):
        # Older versions of PyTensor pass the graph, before the node and the shapes
        [(_, n, _)] = args[-1]
        return [(n, n)]

    def perform(self, node, inputs, output_storage):
        [grid] = inputs
        output_storage[0][0] = np.tensordot(grid, grid, axes=[[0, 2], [0, 2]])


class BlasContract(Routine):
    """Sum of the products of the rows, by ``gemm``: ``(p,n,q),(p,m,q)->(n,m)``."""

    __props__ = ()

    def make_node(self, left, right):
        shape = left.type.shape[1], right.type.shape[1]
        return Apply(self, [left, right], [matrix(dtype=left.type.dtype, shape=shape)])

    def infer_shape(self, *args):
        # Older versions of PyTensor pass the graph, before the node and the shapes
        [(_, n, _), (_, m, _)] = args[-1]
        return [(n, m)]

    def perform(self, node, inputs, output_storage):
        output_storage[0][0] = np.tensordot(*inputs, axes=[[0, 2], [0, 2]])


class BlasMultiplyAlong(Routine):
    """Product with a matrix along an axis, by ``gemm``: ``(k,n),(p,n,q)->(p,k,q)``."""

    __props__ = ()

    def make_node(self, matrix, grid):
        p, _, q = grid.type.shape
        shape = p, matrix.type.shape[0], q
        return Apply(self, [matrix, grid], [tensor3(dtype=grid.type.dtype, shape=shape)])

    def infer_shape(self, *args):
        [(k, _), (p, _, q)] = args[-1]
        return [(p, k, q)]

    def perform(self, node, inputs, output_storage):
        output_storage[0][0] = np.matmul(*inputs)


class LapackFiniteEigh(Routine):
    """Eigenvalues and eigenvectors of a symmetric matrix, by ``syevd``: ``(n,n)->(n),(n,n)``."""

    __props__ = ()

    def make_node(self, symmetric):
        dtype, shape = symmetric.type.dtype, symmetric.type.shape
        return Apply(
            self,
            [symmetric],
            [vector(dtype=dtype, shape=shape[:1]), matrix(dtype=dtype, shape=shape)],
        )

    def infer_shape(self, *args):
        [(n, _)] = args[-1]
        return [(n,), (n, n)]

    def perform(self, node, inputs, output_storage):
        [symmetric] = inputs
        n = len(symmetric)
        if np.isfinite(symmetric).all():
            values, vectors = scipy.linalg.eigh(symmetric, driver="evd", check_finite=False)
        else:
            values, vectors = np.full(n, np.nan, symmetric.dtype), np.eye(n, dtype=symmetric.dtype)
        output_storage[0][0], output_storage[1][0] = values, vectors


class LapackTriangularInverse(Routine):
    """Inverse of a lower triangular matrix, by ``trsm``: ``(n,n)->(n,n)``."""

    __props__ = ()

    def make_node(self, chol):
        return Apply(self, [chol], [chol.type()])

    def infer_shape(self, *args):
        return args[-1]

    def perform(self, node, inputs, output_storage):
        [chol] = inputs
        identity = np.eye(len(chol), dtype=chol.dtype)
        output_storage[0][0] = scipy.linalg.solve_triangular(
            chol, identity, lower=True, check_finite=False
        )


class LapackTriangularGram(Routine):
    """The product ``T' T`` of a lower triangular matrix, by ``lauum``: ``(n,n)->(n,n)``."""

    __props__ = ()

    def make_node(self, triangle):
        return Apply(self, [triangle], [triangle.type()])

    def infer_shape(self, *args):
        return args[-1]

    def perform(self, node, inputs, output_storage):
        [triangle] = inputs
        output_storage[0][0] = triangle.T @ triangle


class AlongAxisOp(Routine):
    """An operation with a triangular matrix along an axis: ``(n,n),(p,n,q)->(p,n,q)``.

    Parameters
    ----------
    inplace
        Whether to overwrite the grid.
    """

    __props__: tuple[str, ...] = ("inplace",)

    def __init__(self, *, inplace: bool = False):
        self.inplace = inplace
        if inplace:
            self.destroy_map = {0: [1]}

    def make_node(self, triangle, grid):
        return Apply(self, [triangle, grid], [grid.type()])

    def infer_shape(self, *args):
        return [args[-1][1]]

    def perform(self, node, inputs, output_storage):
        triangle, grid = inputs
        p, n, q = grid.shape
        columns = self.apply(triangle, np.swapaxes(grid, 0, 1).reshape(n, p * q))
        output_storage[0][0] = np.swapaxes(columns.reshape(n, p, q), 0, 1).copy()

    @abstractmethod
    def apply(self, triangle: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the result for a matrix: ``(n,n),(n,r)->(n,r)``."""


class BlasSolveAlong(AlongAxisOp):
    """Solution with a lower triangular matrix along an axis, by ``trsm``."""

    def apply(self, triangle, columns):
        return scipy.linalg.solve_triangular(triangle, columns, lower=True, check_finite=False)


class BlasTransposedMultiplyAlong(AlongAxisOp):
    """Product with the transpose of a lower triangular matrix along an axis, by ``trmm``."""

    def apply(self, triangle, columns):
        return triangle.T @ columns


@node_rewriter([Kernel])
def kernel_to_routine(fgraph, node):
    """An operation on a grid or a factor -> a routine of BLAS or LAPACK, for numba"""
    dtypes = {inp.type.dtype for inp in node.inputs}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
        return None
    match node.op, *(inp.type.ndim for inp in node.inputs):
        case Gram(), 3:
            result = BlasGram()(*node.inputs)
        case Contract(), 3, 3:
            result = BlasContract()(*node.inputs)
        case MultiplyAlong(), 2, 3:
            result = BlasMultiplyAlong()(*node.inputs)
        case FiniteEigh(), 2:
            result = LapackFiniteEigh()(*node.inputs)
        case InverseFromCholesky(), 2:
            # (L L')^-1 = T' T with T = L^-1, in less time than OpenBLAS's potri takes
            result = LapackTriangularGram()(LapackTriangularInverse()(*node.inputs))
        case SolveAlong(transposed=False), 2, 3:
            result = BlasSolveAlong()(*node.inputs)
        case SolveAlong(transposed=True), 2, 3:
            # In the gradient, where the inverse serves more than once. OpenBLAS multiplies in half
            # the time that it takes to solve, but for a lower triangle and rows of the grid.
            chol, grid = node.inputs
            result = BlasTransposedMultiplyAlong()(LapackTriangularInverse()(chol), grid)
        case _:
            return None
    # Importing numba takes a second, which only those who use it wait for
    import pymc_kron.numba_kernels  # noqa: F401

    return result if isinstance(result, list) else [result]


register_before_specialize(kernel_to_routine, "numba", position=BEFORE_KERNELS_ARE_INLINED)


@node_rewriter([AlongAxisOp], inplace=True)
def along_axis_inplace(fgraph, node):
    """Work in the memory of the grid, where nothing else needs it"""
    if node.op.inplace:
        return None
    return [type(node.op)(inplace=True)(*node.inputs)]


optdb.register(
    "along_axis_inplace", dfs_rewriter(along_axis_inplace), "fast_run", "inplace", position=50.3
)
