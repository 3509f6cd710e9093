"""How numba calls the routines of `pymc_kron.routines`.

Arrays in C order are read as their transposes in Fortran order, and nothing is copied.
"""

from collections.abc import Callable

import numba
import numpy as np
from numba.core import types
from numba.np.linalg import get_blas_kind
from pytensor.link.numba.cache import _call_cached_ptr
from pytensor.link.numba.dispatch.basic import numba_njit, register_funcify_default_op_cache_key
from pytensor.link.numba.dispatch.linalg._BLAS import get_blas_ptr
from pytensor.link.numba.dispatch.linalg._LAPACK import (
    _get_nb_float_from_dtype,
    get_lapack_ptr,
    nb_i32p,
    val_to_int_ptr,
)
from pytensor.link.numba.dispatch.linalg.decomposition.eigen import _eigh_evd

from pymc_kron.routines import (
    BlasContract,
    BlasGram,
    BlasMultiplyAlong,
    BlasSolveAlong,
    BlasTransposedMultiplyAlong,
    LapackFiniteEigh,
    LapackTriangularGram,
    LapackTriangularInverse,
)


def _routine(get_pointer: Callable, name: str, dtype: np.dtype, arguments: str) -> Callable:
    """Return a function that calls a routine.

    Parameters
    ----------
    get_pointer
        A function that returns its address, given the dtype and the name.
    name
        Its name, without the letter for the dtype.
    dtype
        The dtype of its arrays.
    arguments
        A letter for each argument: "i" for an integer or a character, "x" for an array.
    """
    numba_type = getattr(types, dtype.name)
    kind = get_blas_kind(numba_type)
    pointers = {"x": _get_nb_float_from_dtype(kind), "i": nb_i32p}
    function_type = types.FunctionType(types.void(*(pointers[letter] for letter in arguments)))
    unique_name = f"pymc_kron.{kind}{name}"

    @numba_njit
    def pointer():
        with numba.objmode(address=types.intp):
            address = get_pointer(numba_type, name)
        # numba needs the variable that it is told the type of
        return address  # noqa: RET504

    @numba_njit
    def call(*args):
        function = _call_cached_ptr(
            get_ptr_func=pointer, func_type_ref=function_type, unique_func_name_lit=unique_name
        )
        function(*args)

    return call


@numba_njit
def _copy_upper_to_lower(C):
    for i in range(C.shape[0]):
        for j in range(i):
            C[i, j] = C[j, i]


@numba_njit
def _copy_lower_to_upper(C):
    for i in range(C.shape[0]):
        for j in range(i):
            C[j, i] = C[i, j]


@numba_njit
def _identity(n, dtype):
    identity = np.zeros((n, n), dtype)
    for i in range(n):
        identity[i, i] = 1
    return identity


@register_funcify_default_op_cache_key(BlasGram)
def numba_funcify_gram(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype
    syrk = _routine(get_blas_ptr, "syrk", dtype, "iiiixxixxi")
    zero, one = np.zeros(1, dtype=dtype), np.ones(1, dtype=dtype)

    @numba_njit
    def gram(grid):
        p, n, q = grid.shape
        if grid.size == 0:
            return np.zeros((n, n), dtype)
        grid = np.ascontiguousarray(grid)
        C = np.empty((n, n), dtype)
        # The lower triangle in Fortran order is the upper one in C order
        UPLO, N, LDC = val_to_int_ptr(ord("L")), val_to_int_ptr(n), val_to_int_ptr(n)
        if q == 1:
            # The rows are the columns of a matrix in Fortran order, (n, p)
            TRANS, K, LDA = val_to_int_ptr(ord("N")), val_to_int_ptr(p), val_to_int_ptr(n)
            syrk(UPLO, TRANS, N, K, one.ctypes, grid.ctypes, LDA, zero.ctypes, C.ctypes, LDC)
        else:
            TRANS, K, LDA = val_to_int_ptr(ord("T")), val_to_int_ptr(q), val_to_int_ptr(q)
            for i in range(p):
                block, beta = grid[i], zero if i == 0 else one
                syrk(UPLO, TRANS, N, K, one.ctypes, block.ctypes, LDA, beta.ctypes, C.ctypes, LDC)
        _copy_upper_to_lower(C)
        return C

    return gram


def _solve_rows(dtype: np.dtype) -> Callable:
    """Return a function that solves for a matrix in C order, and overwrites it.

    The transpose of ``L X = B`` is ``X' L' = B'``, with matrices in Fortran order.
    """
    trsm = _routine(get_blas_ptr, "trsm", dtype, "iiiiiixxixi")
    one = np.ones(1, dtype=dtype)

    @numba_njit
    def solve_rows(chol, B):
        n, q = B.shape
        SIDE, UPLO, DIAG = (
            val_to_int_ptr(ord("R")),
            val_to_int_ptr(ord("U")),
            val_to_int_ptr(ord("N")),
        )
        TRANS = val_to_int_ptr(ord("N"))
        M, N = val_to_int_ptr(q), val_to_int_ptr(n)
        trsm(SIDE, UPLO, TRANS, DIAG, M, N, one.ctypes, chol.ctypes, N, B.ctypes, M)

    return solve_rows


@register_funcify_default_op_cache_key(BlasContract)
def numba_funcify_contract(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype
    gemm = _routine(get_blas_ptr, "gemm", dtype, "iiiiixxixixxi")
    zero, one = np.zeros(1, dtype=dtype), np.ones(1, dtype=dtype)

    @numba_njit
    def contract(left, right):
        p, n, q = left.shape
        m = right.shape[1]
        C = np.empty((n, m), dtype)
        if left.size == 0 or m == 0:
            C[:] = 0
            return C
        A, B = np.ascontiguousarray(left), np.ascontiguousarray(right)
        # C' in Fortran order, from the transposes of the matrices
        N, M = val_to_int_ptr(n), val_to_int_ptr(m)
        YES, NO = val_to_int_ptr(ord("T")), val_to_int_ptr(ord("N"))
        if q == 1:
            P = val_to_int_ptr(p)
            gemm(NO, YES, M, N, P, one.ctypes, B.ctypes, M, A.ctypes, N, zero.ctypes, C.ctypes, M)
        else:
            Q = val_to_int_ptr(q)
            for i in range(p):
                a, b, beta = A[i], B[i], zero if i == 0 else one
                gemm(
                    YES, NO, M, N, Q, one.ctypes, b.ctypes, Q, a.ctypes, Q, beta.ctypes, C.ctypes, M
                )
        return C

    return contract


@register_funcify_default_op_cache_key(BlasMultiplyAlong)
def numba_funcify_multiply_along(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype

    @numba_njit
    def multiply_along(matrix, grid):
        p, n, q = grid.shape
        k = matrix.shape[0]
        matrix, x = np.ascontiguousarray(matrix), np.ascontiguousarray(grid)
        out = np.empty((p, k, q), dtype)
        if x.size == 0 or k == 0:
            out[:] = 0
        elif q == 1:
            np.dot(x.reshape((p, n)), matrix.T, out.reshape((p, k)))
        else:
            for i in range(p):
                np.dot(matrix, x[i], out[i])
        return out

    return multiply_along


@register_funcify_default_op_cache_key(LapackFiniteEigh)
def numba_funcify_finite_eigh(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype

    @numba_njit
    def finite_eigh(symmetric):
        n = symmetric.shape[0]
        # A copy in Fortran order of a symmetric matrix, to be overwritten
        work = np.empty((n, n), dtype).T
        for i in range(n):
            for j in range(n):
                entry = symmetric[i, j]
                if not np.isfinite(entry):
                    return np.full(n, np.nan, dtype), np.full((n, n), np.nan, dtype).T
                work[j, i] = entry
        return _eigh_evd(work, 0, True)

    return finite_eigh


@register_funcify_default_op_cache_key(LapackTriangularInverse)
def numba_funcify_triangular_inverse(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype
    solve_rows = _solve_rows(dtype)

    @numba_njit
    def triangular_inverse(chol):
        inverse = _identity(chol.shape[0], dtype)
        if inverse.size > 0:
            solve_rows(np.ascontiguousarray(chol), inverse)
        return inverse

    return triangular_inverse


@register_funcify_default_op_cache_key(LapackTriangularGram)
def numba_funcify_triangular_gram(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype
    lauum = _routine(get_lapack_ptr, "lauum", dtype, "iixii")

    @numba_njit
    def triangular_gram(triangle):
        C = triangle.copy()
        if C.size == 0:
            return C
        N, INFO = val_to_int_ptr(C.shape[0]), val_to_int_ptr(0)
        # T in C order is U = T' in Fortran order, and U U' = T' T
        lauum(val_to_int_ptr(ord("U")), N, C.ctypes, N, INFO)
        _copy_lower_to_upper(C)
        return C

    return triangular_gram


@register_funcify_default_op_cache_key(BlasSolveAlong)
def numba_funcify_solve_along(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype
    inplace = op.inplace
    solve_rows = _solve_rows(dtype)
    trsm = _routine(get_blas_ptr, "trsm", dtype, "iiiiiixxixi")
    trmm = _routine(get_blas_ptr, "trmm", dtype, "iiiiiixxixi")
    one = np.ones(1, dtype=dtype)

    @numba_njit
    def solve_along(chol, grid):
        p, n, q = grid.shape
        x = np.ascontiguousarray(grid) if inplace else grid.copy()
        if x.size == 0:
            return x
        chol = np.ascontiguousarray(chol)
        if q > 1:
            for i in range(p):
                solve_rows(chol, x[i])
            return x

        # The rows are the columns of a matrix in Fortran order, (n, p)
        SIDE, UPLO, TRANS, DIAG = (
            val_to_int_ptr(ord("L")),
            val_to_int_ptr(ord("U")),
            val_to_int_ptr(ord("T")),
            val_to_int_ptr(ord("N")),
        )
        M, N = val_to_int_ptr(n), val_to_int_ptr(p)
        if p <= 2 * n:
            trsm(SIDE, UPLO, TRANS, DIAG, M, N, one.ctypes, chol.ctypes, M, x.ctypes, M)
        else:
            # From the left, OpenBLAS multiplies in half the time that it takes to solve
            inverse = _identity(n, dtype)
            solve_rows(chol, inverse)
            trmm(SIDE, UPLO, TRANS, DIAG, M, N, one.ctypes, inverse.ctypes, M, x.ctypes, M)
        return x

    return solve_along


@register_funcify_default_op_cache_key(BlasTransposedMultiplyAlong)
def numba_funcify_transposed_multiply_along(op, node, **kwargs):
    dtype = node.outputs[0].type.numpy_dtype
    inplace = op.inplace
    trmm = _routine(get_blas_ptr, "trmm", dtype, "iiiiiixxixi")
    one = np.ones(1, dtype=dtype)

    @numba_njit
    def transposed_multiply_along(triangle, grid):
        p, n, q = grid.shape
        x = np.ascontiguousarray(grid) if inplace else grid.copy()
        if x.size == 0:
            return x
        triangle = np.ascontiguousarray(triangle)
        LDA = val_to_int_ptr(n)
        UPLO, DIAG = val_to_int_ptr(ord("U")), val_to_int_ptr(ord("N"))
        if q == 1:
            # The rows are the columns of a matrix in Fortran order: U Y with U = T'
            SIDE, TRANS = val_to_int_ptr(ord("L")), val_to_int_ptr(ord("N"))
            N = val_to_int_ptr(p)
            trmm(SIDE, UPLO, TRANS, DIAG, LDA, N, one.ctypes, triangle.ctypes, LDA, x.ctypes, LDA)
        else:
            # The transpose of T' X is X' T = X' U'
            SIDE, TRANS = val_to_int_ptr(ord("R")), val_to_int_ptr(ord("T"))
            M = val_to_int_ptr(q)
            for i in range(p):
                block = x[i]
                trmm(
                    SIDE,
                    UPLO,
                    TRANS,
                    DIAG,
                    M,
                    LDA,
                    one.ctypes,
                    triangle.ctypes,
                    LDA,
                    block.ctypes,
                    M,
                )
        return x

    return transposed_multiply_along
