import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.subtensor import AdvancedSubtensor

from pymc_kron.rewriting import bundle_rewriter
from tests.helpers import (
    WITHOUT_KRON,
    compile_py,
    count_ops,
    dense_kron,
    has_kron,
    largest_size_in,
)

SHAPES = (6, 5), (7, 8)
ORDER = np.random.default_rng(7).permutation(40)

# Functions of the matrix K, a vector p of indices, and vectors w and v of its columns and rows,
# that work for NumPy and for PyTensor alike
MATRICES = {
    "columns": lambda K, p, w, v: K[:, p],
    "transposed columns": lambda K, p, w, v: K[:, p].T,
    "rows": lambda K, p, w, v: K[p],
    "transposed rows": lambda K, p, w, v: K[p].T,
    "columns of the transpose": lambda K, p, w, v: K.T[:, p],
    "last columns": lambda K, p, w, v: K[:, p][:, -25:],
    "every other row": lambda K, p, w, v: K[::2, :][:, p],
    "scaled columns": lambda K, p, w, v: K[:, p] * w,
    "scaled rows": lambda K, p, w, v: v[:, None] * K[:, p],
    "scaled on both sides": lambda K, p, w, v: 2 * v[:, None] * K * w,
    "scaled and transposed": lambda K, p, w, v: (v[:, None] * K[:, p] * w).T,
    "divided columns": lambda K, p, w, v: (K[:, p] / w).T,
    "divided rows": lambda K, p, w, v: K / v[:, None],
    "multiple": lambda K, p, w, v: (-2 * K[:, p]) / 3,
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_products(matrix, side, known):
    rng = np.random.default_rng(7)
    arrays = [rng.normal(size=shape) for shape in SHAPES]
    w, v = rng.normal(size=40), rng.normal(size=42)
    M = MATRICES[matrix](dense_kron(*arrays), ORDER, w, v)
    x = rng.normal(size=(M.shape[1], 3)) if side == "left" else rng.normal(size=M.shape[0])

    inputs = [pt.tensor(shape=a.shape if known else (None,) * a.ndim) for a in (*arrays, w, v)]
    A, B, w_var, v_var = inputs
    x_var = pt.tensor("x", shape=x.shape)
    M_var = MATRICES[matrix](pt.linalg.kron(A, B), pt.constant(ORDER), w_var, v_var)
    product = M_var @ x_var if side == "left" else x_var @ M_var
    values = [*arrays, w, v, x]
    function = compile_py([*inputs, x_var], product)
    assert not has_kron(function.maker.fgraph)
    expected = M @ x if side == "left" else x @ M
    assert_allclose(function(*values), expected, rtol=1e-9, atol=1e-9)
    assert largest_size_in(function, *values) <= 3 * 48


def test_a_column_that_is_selected_twice():
    rng = np.random.default_rng(7)
    arrays = [rng.normal(size=(2, 3)), rng.normal(size=(3, 2))]
    A, B = factors = [pt.tensor(shape=array.shape) for array in arrays]
    p, x = np.array([1, 1, -1, 5, 0, 3, 2]), rng.normal(size=7)
    p_var, x_var = pt.lvector("p"), pt.dvector("x")
    function = compile_py([*factors, p_var, x_var], pt.linalg.kron(A, B)[:, p_var] @ x_var)
    assert_allclose(function(*arrays, p, x), dense_kron(*arrays)[:, p] @ x, rtol=1e-10)


def test_stack_of_right_hand_sides():
    rng = np.random.default_rng(7)
    arrays = [rng.normal(size=(3, 2)), rng.normal(size=(2, 4))]
    A, B = factors = [pt.tensor(shape=array.shape) for array in arrays]
    p, x = rng.permutation(8), rng.normal(size=(5, 8, 2))
    K, x_var = pt.linalg.kron(A, B)[:, p], pt.dtensor3("x")
    function = compile_py([*factors, x_var], [K @ x_var, x_var.mT @ K.T])
    assert not has_kron(function.maker.fgraph)
    expected = dense_kron(*arrays)[:, p] @ x
    for result in zip(function(*arrays, x), (expected, np.swapaxes(expected, 1, 2)), strict=True):
        assert_allclose(*result, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool"])
def test_integers_and_booleans(dtype):
    rng = np.random.default_rng(7)
    arrays = [rng.integers(0, 2, size=shape).astype(dtype) for shape in ((3, 2), (2, 4))]
    A, B = factors = [pt.tensor(dtype=dtype, shape=array.shape) for array in arrays]
    p, x = np.array([0, 0, 1, 7, 7, 2, 3, 4]), rng.integers(0, 2, size=8).astype(dtype)
    x_var = pt.vector("x", dtype=dtype)
    product = pt.linalg.kron(A, B)[:, p] @ x_var
    function = compile_py([*factors, x_var], product)
    dense = compile_py([*factors, x_var], product, mode=WITHOUT_KRON)
    assert function(*arrays, x).dtype == dense(*arrays, x).dtype
    np.testing.assert_array_equal(function(*arrays, x), dense(*arrays, x))


def test_what_is_left_alone():
    A, B, x = pt.tensor("A", shape=(2, 2)), pt.tensor("B", shape=(3, 3)), pt.dvector("x")
    K = pt.linalg.kron(A, B)
    p = np.array([3, 1, 0, 2, 5, 4])
    arrays = [np.arange(4.0).reshape(2, 2), np.arange(9.0).reshape(3, 3)]
    k = dense_kron(*arrays)
    cases = [
        (K[p, p] @ x, k[p, p] @ p),
        (K[0] @ x, k[0] @ p),
        (K[:, p] @ K[p], k[:, p] @ k[p]),
        ((K * K.T) @ x, (k * k.T) @ p),
        (pt.exp(K) @ x, np.exp(k) @ p),
    ]
    for product, expected in cases:
        function = compile_py([A, B, x], product)
        assert_allclose(function(*arrays, p.astype(float)), expected, rtol=1e-6)


def test_a_selection_of_something_else_is_no_business_of_the_bundle():
    A, x = pt.dmatrix("A"), pt.dvector("x")
    fgraph = compile_py([A, x], A[:, np.array([1, 3, 0])] @ x).maker.fgraph
    assert not hasattr(fgraph, "kron_journal")
    assert count_ops(fgraph, AdvancedSubtensor) == 1


def test_the_shape_of_the_product_is_not_used():
    # Rewrites of PyTensor's replace shapes in some phases only
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    fgraph = FunctionGraph([A, B, x], [pt.linalg.kron(A, B)[:, ::-1] @ x], clone=True)
    bundle_rewriter().rewrite(fgraph)
    assert not has_kron(fgraph)
