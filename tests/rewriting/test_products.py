import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.tensor.linalg.products import KroneckerProduct

from tests.helpers import PY, RTOL, compile_py, dense_kron, has_kron, symbolic_matrices

SHAPES = [((3, 3), (2, 2)), ((3, 2), (4, 5)), ((2, 3), (1, 4), (5, 2)), ((3, 2), (2, 3))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("x_shape", ["vector", "matrix", "column", "batch", "transposed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_product_with_vectors_and_matrices(shapes, side, x_shape, dtype):
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    factors = symbolic_matrices(arrays)
    K_var = factors[-1]
    for factor in reversed(factors[:-1]):
        K_var = pt.linalg.kron(factor, K_var)
    K = dense_kron(*arrays)
    if x_shape == "transposed":
        K, K_var = K.T, K_var.T
    n = K.shape[1] if side == "left" else K.shape[0]
    shape = {"vector": (n,), "matrix": (n, 4), "column": (n, 1), "batch": (3, n, 2)}.get(
        x_shape, (n, 2)
    )
    x = rng.normal(size=shape).astype(dtype)
    if side == "right" and x.ndim > 1:
        x = np.swapaxes(x, -1, -2)
    x_var = pt.tensor("x", dtype=dtype, shape=tuple(1 if s == 1 else None for s in x.shape))
    product = K_var @ x_var if side == "left" else x_var @ K_var
    function = compile_py([*factors, x_var], product)
    assert not has_kron(function.maker.fgraph)
    result = function(*arrays, x)
    assert result.dtype == dtype
    assert_allclose(result, K @ x if side == "left" else x @ K, rtol=RTOL[dtype], atol=1e-5)


def test_batched_factors():
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=(5, 3, 2)), rng.normal(size=(4, 3))]
    factors = symbolic_matrices(arrays)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    x, x_var = rng.normal(size=(7, 5, 6, 2)), pt.tensor("x", shape=(7, 5, 6, 2))
    function = compile_py([*factors, x_var], K @ x_var)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays, x), dense_kron(*arrays) @ x, rtol=1e-10, atol=1e-12)


def test_complex():
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=(n, n)) + 1j * rng.normal(size=(n, n)) for n in (2, 3)]
    factors = symbolic_matrices(arrays)
    x, x_var = rng.normal(size=6) + 0j, pt.zvector("x")
    function = compile_py([*factors, x_var], pt.linalg.kron(*factors) @ x_var)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays, x), dense_kron(*arrays) @ x, rtol=1e-10)


def test_a_product_of_two_krons_is_left_alone():
    A, B, C, D = pt.dmatrices("A", "B", "C", "D")
    product = pt.linalg.kron(A, B) @ pt.linalg.kron(C, D)
    rewritten = rewrite_graph(product, include=("canonicalize",))
    assert all(isinstance(inp.owner.op, KroneckerProduct) for inp in rewritten.owner.inputs)


def test_a_product_that_does_not_conform_is_still_an_error():
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    function = compile_py([A, B, x], pt.linalg.kron(A, B) @ x, mode=PY)
    with pytest.raises(ValueError, match="reshape"):
        function(np.eye(2), np.eye(3), np.ones(12))
