"""The kernels as graphs, as routines of BLAS and LAPACK, and as NumPy."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.linalg
from numpy.testing import assert_allclose
from pytensor.compile.mode import get_mode
from pytensor.gradient import verify_grad

from pymc_kron.kernels import Gram, InverseFromCholesky, SolveAlong
from pymc_kron.routines import (
    AlongAxisOp,
    BlasGram,
    BlasSolveAlong,
    BlasTransposedMultiplyAlong,
    LapackTriangularGram,
    LapackTriangularInverse,
)
from tests.helpers import PY, RTOL, count_ops, random_spd

GRIDS = [(1, 3, 4), (5, 3, 1), (2, 3, 4), (7, 3, 1), (1, 1, 1), (0, 3, 2), (2, 0, 3)]


def arrays(grid, dtype="float64"):
    rng = np.random.default_rng(83)
    chol = np.linalg.cholesky(random_spd(rng, grid[1])).astype(dtype)
    return chol, rng.normal(size=grid).astype(dtype)


def solve(chol, grid, *, transposed):
    columns = np.swapaxes(grid, 0, 1).reshape(len(chol), grid.shape[0] * grid.shape[2])
    solution = scipy.linalg.solve_triangular(chol, columns, lower=True, trans=int(transposed))
    return np.swapaxes(solution.reshape(len(chol), grid.shape[0], -1), 0, 1)


KERNELS = {
    "gram": (lambda chol, x: Gram()(x), lambda chol, x: np.einsum("piq,pjq->ij", x, x)),
    "inverse": (
        lambda chol, x: InverseFromCholesky()(chol),
        lambda chol, x: np.linalg.inv(chol @ chol.T),
    ),
    "solve": (
        lambda chol, x: SolveAlong(transposed=False)(chol, x),
        lambda chol, x: solve(chol, x, transposed=False),
    ),
    "transposed solve": (
        lambda chol, x: SolveAlong(transposed=True)(chol, x),
        lambda chol, x: solve(chol, x, transposed=True),
    ),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_numba_and_python_agree_with_numpy(kernel, dtype):
    symbolic, dense = KERNELS[kernel]
    chol, x = pt.matrix(dtype=dtype), pt.tensor3(dtype=dtype)
    outputs = symbolic(chol, x)
    numba = pytensor.function([chol, x], outputs, mode="NUMBA", on_unused_input="ignore")
    python = pytensor.function([chol, x], outputs, mode=PY, on_unused_input="ignore")
    # A graph with the routines that Python runs
    optimizer = get_mode("NUMBA").provided_optimizer
    mode = pytensor.compile.mode.Mode(linker="py", optimizer=optimizer)
    performed = pytensor.function([chol, x], outputs, mode=mode, on_unused_input="ignore")
    for grid in GRIDS:
        values = arrays(grid, dtype)
        expected = dense(*values) if 0 not in grid else symbolic(*map(pt.as_tensor, values)).shape
        for function in (numba, python, performed):
            result = function(*values)
            if 0 in grid:
                assert result.shape == tuple(expected.eval(mode=PY))
            else:
                assert_allclose(result, expected, rtol=RTOL[dtype], atol=RTOL[dtype])


def test_numba_takes_arrays_in_any_order():
    chol, x = pt.matrix(), pt.tensor3()
    outputs = [symbolic(chol, x) for symbolic, _ in KERNELS.values()]
    function = pytensor.function([chol, x], outputs, mode="NUMBA")
    L, grid = arrays((6, 3, 4))
    for order in ("C", "F"):
        for values in (grid, grid[::2], np.asfortranarray(grid)):
            before = values.copy()
            results = function(np.asarray(L, order=order), values)
            # Nothing that is given is overwritten
            assert_allclose(values, before)
            for result, (_, dense) in zip(results, KERNELS.values(), strict=True):
                assert_allclose(result, dense(L, values), rtol=1e-10, atol=1e-12)


def test_one_inverse_serves_all():
    chol, x = pt.matrix(), pt.tensor3()
    solutions = [SolveAlong(transposed=True)(chol, x + i) for i in (0, 1)]
    outputs = [InverseFromCholesky()(chol), *solutions]
    fgraph = pytensor.function([chol, x], outputs, mode="NUMBA").maker.fgraph
    assert count_ops(fgraph, LapackTriangularInverse) == 1
    assert count_ops(fgraph, LapackTriangularGram) == 1
    assert count_ops(fgraph, BlasTransposedMultiplyAlong) == 2


def test_work_in_place_where_nothing_else_needs_the_grid():
    chol, x = pt.matrix(), pt.tensor3()
    outputs = SolveAlong(transposed=False)(chol, SolveAlong(transposed=False)(chol, x))
    fgraph = pytensor.function([chol, x], outputs, mode="NUMBA").maker.fgraph
    inplace = [node.op.inplace for node in fgraph.toposort() if isinstance(node.op, AlongAxisOp)]
    assert inplace == [False, True]


@pytest.mark.parametrize("batched", [pytest.param("chol", marks=pytest.mark.nightly), "grid"])
def test_batches_are_left_to_the_graph(batched):
    rng = np.random.default_rng(83)
    L = np.linalg.cholesky(random_spd(rng, 3, batch=(5,) if batched == "chol" else ()))
    grid = rng.normal(size=(5, 2, 3, 4) if batched == "grid" else (2, 3, 4))
    chol, x = pt.tensor(shape=L.shape), pt.tensor(shape=grid.shape)
    outputs = [InverseFromCholesky()(chol), Gram()(x)]
    fgraph = pytensor.function([chol, x], outputs, mode="NUMBA")
    inverse, gram = fgraph(L, grid)
    assert_allclose(inverse, np.linalg.inv(L @ np.swapaxes(L, -1, -2)), rtol=1e-10)
    assert_allclose(gram, np.einsum("...piq,...pjq->...ij", grid, grid), rtol=1e-10)
    routine = LapackTriangularGram if batched == "chol" else BlasGram
    assert count_ops(fgraph.maker.fgraph, routine) == 0


def test_other_dtypes_are_left_to_the_graph():
    chol, x = pt.matrix(dtype="float64"), pt.tensor3(dtype="float32")
    function = pytensor.function([chol, x], SolveAlong(transposed=False)(chol, x), mode=PY)
    assert count_ops(function.maker.fgraph, BlasSolveAlong) == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(kernel):
    symbolic, _ = KERNELS[kernel]
    L, grid = arrays((2, 3, 4))
    rng = np.random.default_rng(89)
    verify_grad(
        lambda chol, x: symbolic(pt.tril(chol), x), [L, grid], mode=PY, rng=rng, abs_tol=1e-6
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_jax(kernel):
    pytest.importorskip("jax")
    symbolic, dense = KERNELS[kernel]
    chol, x = pt.matrix(), pt.tensor3()
    function = pytensor.function([chol, x], symbolic(chol, x), mode="JAX", on_unused_input="ignore")
    values = arrays((2, 3, 4))
    assert_allclose(function(*values), dense(*values), rtol=1e-10)
