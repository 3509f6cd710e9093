from itertools import permutations

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.math import Dot

from pymc_kron.linalg import visiting_order
from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    RTOL,
    all_nodes,
    compile_py,
    count_ops,
    dense_kron,
    has_kron,
    largest_size_in,
    random_spd,
    symbolic_matrices,
)

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


SPARSE = {
    "rows": lambda zeros, X: zeros[::2].set(X[::2]),
    "few of them": lambda zeros, X: zeros[5:8].set(X[5:8]),
    "columns": lambda zeros, X: zeros[:, :2].set(X[:, :2]),
    "a block": lambda zeros, X: zeros[1::3, ::2].set(X[1::3, ::2]),
}
USES = {
    "left": lambda K, X: K @ X,
    "right": lambda K, X: X.T @ K,
    "solve": pt.linalg.solve,
    "cho_solve": lambda K, X: pt.linalg.cho_solve((pt.linalg.cholesky(K), True), X),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", SPARSE)
def test_vectors_with_few_entries_that_are_set(name, use):
    # The unit vectors of the rows that are set are such vectors themselves
    rng = np.random.default_rng(12)
    arrays = [random_spd(rng, 4), random_spd(rng, 3), rng.normal(size=(12, 5))]
    *factors, X = symbolic_matrices(arrays)
    sparse = SPARSE[name](pt.zeros((12, 5)), X)
    function = compile_py([*factors, X], USES[use](pt.linalg.kron(*factors), sparse))
    assert not has_kron(function.maker.fgraph)
    dense = USES[use](pt.as_tensor(np.kron(*arrays[:2])), sparse)
    assert_allclose(function(*arrays), compile_py([X], dense)(arrays[-1]), rtol=1e-9, atol=1e-12)


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


def static_matrices(arrays):
    return [
        pt.tensor(f"A{i}", dtype=array.dtype, shape=array.shape) for i, array in enumerate(arrays)
    ]


def flops(inputs, output):
    """Count the multiplications in the matrix products of the rewritten graph."""
    rewritten = rewrite_graph(output, include=("canonicalize",))
    nodes = all_nodes(FunctionGraph(inputs, [rewritten], clone=True))
    return sum(
        np.prod(node.out.type.shape) * node.inputs[0].type.shape[-1]
        for node in nodes
        if isinstance(getattr(node.op, "core_op", node.op), Dot)
    )


@pytest.mark.parametrize("n_columns", [None, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (5, 4)),
        ((6, 2), (2, 6)),
        ((2, 3), (4, 2), (2, 5)),
        ((1, 6), (4, 4), (3, 2)),
        ((7, 7), (2, 5), (3, 3)),
    ],
    ids=str,
)
def test_factors_of_known_size_are_applied_in_the_cheapest_order(shapes, n_columns):
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = static_matrices(arrays)
    K_var = factors[0]
    for factor in factors[1:]:
        K_var = pt.linalg.kron(K_var, factor)
    x = rng.normal(size=(K_var.type.shape[1], *([] if n_columns is None else [n_columns])))
    x_var = pt.tensor("x", shape=x.shape)
    function = compile_py([*factors, x_var], K_var @ x_var)
    assert_allclose(function(*arrays, x), dense_kron(*arrays) @ x, rtol=1e-10, atol=1e-12)

    def cost_of(order):
        sizes, total = [columns for _, columns in shapes], 0
        for i in order:
            total += np.prod(sizes) * shapes[i][0]
            sizes[i] = shapes[i][0]
        return total * (n_columns or 1)

    cheapest = min(map(cost_of, permutations(range(len(shapes)))))
    assert flops([*factors, x_var], K_var @ x_var) == cheapest


def test_square_factors_and_unknown_sizes_are_visited_last_to_first():
    assert visiting_order((3, 2, 4), (3, 2, 4)) == [2, 1, 0]
    assert visiting_order((3, pt.lscalar(), 4), (2, 2, 9)) == [2, 1, 0]
    assert visiting_order((3, 0), (2, 2)) == [1, 0]


CONFORMING = {
    "square": ([(3, 3), (2, 2)], [(3, 3), (2, 2)]),
    "rectangular": ([(3, 2), (4, 5)], [(2, 4), (5, 1)]),
    "three factors": ([(2, 3), (1, 4), (5, 2)], [(3, 1), (4, 2), (2, 3)]),
    "two and one": ([(2, 3), (3, 2), (2, 4)], [(3, 2), (8, 3)]),
    "one and two": ([(2, 6), (3, 2)], [(2, 3), (3, 2), (2, 4)]),
    "a factor of size one": ([(3, 3), (1, 1), (2, 2)], [(3, 3), (2, 2)]),
    "a last factor of size one": ([(3, 3), (2, 2)], [(3, 3), (2, 4), (1, 2)]),
}


def nested_kron(factors):
    *others, product = factors
    for factor in reversed(others):
        product = pt.linalg.kron(factor, product)
    return product


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "complex128"])
@pytest.mark.parametrize("case", CONFORMING)
def test_mixed_product(case, dtype):
    rng = np.random.default_rng(11)
    left, right = (
        [(3 * rng.normal(size=shape)).astype(dtype) for shape in shapes]
        for shapes in CONFORMING[case]
    )
    factors = static_matrices([*left, *right])
    K, M = nested_kron(factors[: len(left)]), nested_kron(factors[len(left) :])
    rewritten = rewrite_graph(K @ M, include=("canonicalize",))
    assert isinstance(rewritten.owner.op, KroneckerProduct)
    assert rewritten.type.dtype == dtype
    expected = dense_kron(*left) @ dense_kron(*right)
    result = compile_py(factors, K @ M)(*left, *right)
    assert_allclose(result, expected, rtol=RTOL.get(dtype, 1e-10), atol=1e-4)


@pytest.mark.parametrize("unequal", [False, True])
def test_nothing_dense_in_a_chain_of_products(unequal):
    rng = np.random.default_rng(11)
    shapes = [(3, 4), (2, 5)], [(4, 6), (5, 3)], [(6, 2), (3, 4)]
    if unequal:
        shapes = [(3, 4), (2, 5)], [(4, 6), (5, 3)], [(6, 2), (3, 2), (1, 2)]
    arrays = [[rng.normal(size=shape) for shape in group] for group in shapes]
    flat = [array for group in arrays for array in group]
    factors = iter(static_matrices(flat))
    inputs = list(factors)
    variables = iter(inputs)
    K, M, P = (nested_kron([next(variables) for _ in group]) for group in arrays)
    x, x_var = rng.normal(size=8), pt.dvector("x")
    product = (2 * K @ M.T.T @ -P) @ x_var
    dense = [dense_kron(*group) for group in arrays]
    function = compile_py([*inputs, x_var], product)
    assert_allclose(function(*flat, x), -2 * dense[0] @ dense[1] @ dense[2] @ x, rtol=1e-10)
    assert largest_size_in(function, *flat, x) <= 24


def test_mixed_product_of_batches():
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=size) for size in [(5, 3, 2), (4, 3), (2, 4), (7, 5, 3, 2)]]
    A, B, C, D = factors = static_matrices(arrays)
    kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
    product = kron(A, B) @ kron(C, D)
    rewritten = rewrite_graph(product, include=("canonicalize",))
    assert isinstance(rewritten.owner.op.core_op, KroneckerProduct)
    a, b, c, d = arrays
    result = compile_py(factors, product)(*arrays)
    assert_allclose(result, dense_kron(a, b) @ dense_kron(c, d), rtol=1e-10, atol=1e-12)


def test_sizes_that_agree_without_being_known():
    A, B = pt.dmatrices("A", "B")
    K = pt.linalg.kron(A, B)
    # The columns of exp(A.T) are the rows of A
    M = pt.linalg.kron(pt.exp(A.T), pt.linalg.inv(B @ B.T))
    rewritten = rewrite_graph(M @ K, include=("canonicalize",))
    assert isinstance(rewritten.owner.op, KroneckerProduct)
    rng = np.random.default_rng(11)
    a, b = rng.normal(size=(3, 2)), rng.normal(size=(2, 2))
    expected = dense_kron(np.exp(a.T), np.linalg.inv(b @ b.T)) @ dense_kron(a, b)
    assert_allclose(compile_py([A, B], M @ K)(a, b), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([(None, None)] * 4, "aren't known to agree"),
        ([(2, 2), (3, 3), (3, 3), (2, 2)], "aren't known to agree"),
        ([(2, 2), (0, 3), (2, 2), (3, 3)], "empty"),
    ],
    ids=["unknown", "only as a whole", "empty"],
)
def test_refused_mixed_products(shapes, reason):
    A, B, C, D = factors = [pt.tensor(f"A{i}", shape=shape) for i, shape in enumerate(shapes)]
    product = pt.linalg.kron(A, B) @ pt.linalg.kron(C, D)
    with listening() as entries:
        function = compile_py(factors, product)
    assert count_ops(function.maker.fgraph, KroneckerProduct) == 2
    [refusal] = {str(e.refusal) for e in entries if e.rewrite == "mixed_product_of_kron"}
    assert reason in refusal
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=[2 if size is None else size for size in shape]) for shape in shapes]
    a, b, c, d = arrays
    if reason != "empty":
        assert_allclose(function(*arrays), dense_kron(a, b) @ dense_kron(c, d), rtol=1e-10)


@pytest.mark.parametrize("dtypes", [("bool", "bool"), ("int8", "int16")])
def test_booleans_and_integers_of_unequal_widths_are_left_alone(dtypes):
    A, B = (pt.tensor(dtype=dtype, shape=(2, 2)) for dtype in dtypes)
    K = pt.linalg.kron(A, B)
    rewritten = rewrite_graph(K @ K.T, include=("canonicalize",))
    assert not isinstance(rewritten.owner.op, KroneckerProduct)


def test_a_lower_triangular_root_stays_one():
    # As PyMC writes a covariance that is given as ``chol``
    rng = np.random.default_rng(11)
    a, b = (np.linalg.cholesky(random_spd(rng, n)) for n in (3, 4))
    A, B = pt.dmatrices("A", "B")
    tagged = 2 * pt.linalg.kron(A, B)
    tagged.tag.lower_triangular = True
    assumed = 2 * pt.linalg.kron(*(assume(L, lower_triangular=True) for L in (A, B)))
    expected = 2 * dense_kron(a, b)
    for K in (tagged, assumed):
        function = compile_py([A, B], [pt.linalg.cholesky(K @ K.T), pt.linalg.slogdet(K @ K.T)[1]])
        assert count_ops(function.maker.fgraph, Cholesky) == 0
        chol, logdet = function(a, b)
        assert_allclose(chol, expected, rtol=1e-10)
        assert_allclose(logdet, 2 * np.linalg.slogdet(expected)[1], rtol=1e-10)
    # The factors of a root that isn't known to be triangular are decomposed
    K = pt.linalg.kron(A, B)
    function = compile_py([A, B], pt.linalg.cholesky(K @ K.T))
    assert count_ops(function.maker.fgraph, Cholesky) == 2
    assert_allclose(function(a, b), dense_kron(a, b), rtol=1e-8)


def test_pm_logp_with_a_cholesky_factor_decomposes_nothing():
    # It doesn't pass through PyMC's intermediate representation
    rng = np.random.default_rng(11)
    a, b = (np.linalg.cholesky(random_spd(rng, n)) for n in (3, 4))
    A, B = pt.dmatrices("A", "B")
    y = rng.normal(size=12)
    logp = pm.logp(pm.MvNormal.dist(np.zeros(12), chol=pt.linalg.kron(A, B)), y)
    function = compile_py([A, B], logp)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, Cholesky) == 0
    K = dense_kron(a, b)
    assert_allclose(
        function(a, b), scipy.stats.multivariate_normal(np.zeros(12), K @ K.T).logpdf(y), rtol=1e-9
    )


def test_a_product_that_does_not_conform_is_still_an_error():
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    function = compile_py([A, B, x], pt.linalg.kron(A, B) @ x)
    with pytest.raises(ValueError, match="reshape"):
        function(np.eye(2), np.eye(3), np.ones(12))
