import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    PY,
    RTOL,
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    symbolic_matrices,
)

# Only the product of the last ones is square
SHAPES = [((3, 3), (2, 2)), ((3, 2), (4, 5)), ((2, 3), (1, 4), (5, 2)), ((3, 2), (2, 3))]


def nested_kron(factors):
    *others, product = factors
    for factor in reversed(others):
        product = pt.linalg.kron(factor, product)
    return product


def check(value, factors, arrays, expected, *, rtol=1e-10, largest=None):
    function = compile_py(factors, value)
    assert not has_kron(function.maker.fgraph)
    result = function(*arrays)
    assert result.dtype == value.type.dtype
    assert result.shape == np.shape(expected)
    assert_allclose(result, expected, rtol=rtol, atol=rtol)
    if largest is not None:
        assert largest_size_in(function, *arrays) <= largest


REDUCTIONS = {
    "sum": lambda K, np: K.sum(),
    "sum of rows": lambda K, np: K.sum(axis=0),
    "sum of columns": lambda K, np: K.sum(axis=1),
    "keepdims": lambda K, np: K.sum(axis=-1, keepdims=True),
    "both axes": lambda K, np: K.sum(axis=(1, 0)),
    "mean": lambda K, np: K.mean(),
    "mean of rows": lambda K, np: K.mean(axis=0),
    "scaled and transposed": lambda K, np: (-2 * K.T).sum(axis=0),
    "trace": lambda K, np: np.trace(K),
    "trace with an offset": lambda K, np: np.trace(K, offset=-2),
    "squares": lambda K, np: (K**2).sum(),
    "norm": lambda K, np: np.linalg.norm(K),
    "Frobenius norm": lambda K, np: np.linalg.norm(K, ord="fro"),
    "norm over both axes": lambda K, np: np.linalg.norm(K, axis=(0, 1)),
    "norms of rows": lambda K, np: np.linalg.norm(K, axis=1),
    "1-norm": lambda K, np: np.linalg.norm(K, ord=1),
    "inf-norm": lambda K, np: np.linalg.norm(K, ord=float("inf")),
    "2-norm": lambda K, np: np.linalg.norm(K, ord=2),
    "nuclear norm": lambda K, np: np.linalg.norm(K, ord="nuc"),
    "inner product": lambda K, np: K.ravel() @ K.ravel(),
    "norm of a multiple": lambda K, np: np.linalg.norm(-K / 3),
    "inner product of multiples": lambda K, np: (2 * K.ravel()) @ (-K.ravel() / 3),
}


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name, shapes):
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=shape) for shape in shapes]
    factors = symbolic_matrices(arrays)
    K = dense_kron(*arrays)
    value = REDUCTIONS[name](nested_kron(factors), pt)
    check(value, factors, arrays, REDUCTIONS[name](K, np), largest=max(*K.shape, 20))


@pytest.mark.parametrize("dtype", ["float32", "int64", "complex128"])
@pytest.mark.parametrize("name", ["sum", "sum of rows", "trace", "squares", "inner product"])
def test_dtypes(name, dtype):
    rng = np.random.default_rng(29)
    arrays = [(3 * rng.normal(size=size)).astype(dtype) for size in [(3, 3), (2, 2)]]
    factors = [pt.tensor(f"A{i}", dtype=dtype, shape=a.shape) for i, a in enumerate(arrays)]
    value = REDUCTIONS[name](nested_kron(factors), pt)
    expected = REDUCTIONS[name](dense_kron(*arrays), np)
    check(value, factors, arrays, expected, rtol=RTOL.get(dtype, 1e-10))


def test_float32_factors_of_a_float64_product():
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=(3, 3)).astype("float32"), rng.normal(size=(4, 4))]
    factors = symbolic_matrices(arrays)
    K, dense = pt.linalg.kron(*factors), dense_kron(*arrays)
    for value, expected in [(K.sum(), dense.sum()), (pt.linalg.norm(K), np.linalg.norm(dense))]:
        check(value, factors, arrays, expected, rtol=1e-14)


def test_trace_of_factors_that_are_square_by_assumption_or_by_size():
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=(3, 3)), rng.normal(size=(2, 5))]
    A, B = factors = symbolic_matrices(arrays)
    a, b = arrays
    K = pt.linalg.kron(assume(A, symmetric=True), B @ B.T)
    check(pt.trace(K), factors, arrays, a.trace() * (b @ b.T).trace())


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (1, 2), (0, 1, 2)])
def test_batches(axis):
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=(5, 3, 2)), rng.normal(size=(4, 3))]
    factors = symbolic_matrices(arrays)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    dense = dense_kron(*arrays)
    function = compile_py(factors, K.sum(axis=axis))
    # A sum over nothing but the batch is none of ours
    assert has_kron(function.maker.fgraph) == (axis == 0)
    assert_allclose(function(*arrays), dense.sum(axis=axis), rtol=1e-10)
    if axis not in (0, 1):
        check(K[None].sum(axis=axis), factors, arrays, dense[None].sum(axis=axis))


def test_batched_traces():
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=(5, 3, 3)), rng.normal(size=(4, 4))]
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    traces = np.trace(dense_kron(*arrays), axis1=1, axis2=2)
    diagonals = pt.diagonal(K, axis1=1, axis2=2)
    check(diagonals.sum(axis=-1), factors, arrays, traces)
    check(diagonals.sum(), factors, arrays, traces.sum())


def test_inner_product_of_two_products():
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=size) for size in [(3, 2), (4, 5), (3, 2), (4, 5)]]
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    K, M = pt.linalg.kron(*factors[:2]), pt.linalg.kron(*factors[2:])
    expected = (dense_kron(*arrays[:2]) * dense_kron(*arrays[2:])).sum()
    check(K.ravel() @ M.ravel(), factors, arrays, expected, largest=20)
    check((K * M).sum(), factors, arrays, expected, largest=20)
    # tr(K' M)
    check(pt.trace(K.T @ M), factors, arrays, expected, largest=25)


def refusal_of(value, factors, rewrite):
    with listening() as entries:
        function = compile_py(factors, value)
    assert has_kron(function.maker.fgraph)
    [reason] = {entry.refusal.reason for entry in entries if entry.rewrite == rewrite}
    return function, reason


@pytest.mark.parametrize(
    ("dtype", "reason"), [("bool", "dtype bool"), ("int8", "overflow"), ("int32", "overflow")]
)
def test_refused_dtypes(dtype, reason):
    rng = np.random.default_rng(29)
    arrays = [rng.integers(0, 2, size=size).astype(dtype) for size in [(3, 2), (4, 5)]]
    factors = symbolic_matrices(arrays)
    function, refusal = refusal_of(pt.linalg.kron(*factors).sum(), factors, "sum_of_kron")
    assert reason in refusal
    assert function(*arrays) == dense_kron(*arrays).sum()


def test_refused_inner_product():
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=size) for size in [(3, 2), (4, 5), (4, 5), (3, 2)]]
    factors = symbolic_matrices(arrays)
    K, M = pt.linalg.kron(*factors[:2]), pt.linalg.kron(*factors[2:])
    function, refusal = refusal_of(K.ravel() @ M.ravel(), factors, "frobenius_product_of_kron")
    assert "aren't known to agree" in refusal
    expected = dense_kron(*arrays[:2]).ravel() @ dense_kron(*arrays[2:]).ravel()
    assert_allclose(function(*arrays), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "reduction",
    [
        lambda K: K.max(),
        lambda K: K.prod(),
        lambda K: pt.exp(K).sum(),
        # The entries of a reshaped product in another order
        lambda K: K.reshape((9, 4))[:, 0] @ K.reshape((9, 4))[:, 1],
    ],
)
def test_other_reductions_are_left_alone(reduction):
    rng = np.random.default_rng(29)
    arrays = [rng.normal(size=(3, 3)), rng.normal(size=(2, 2))]
    factors = symbolic_matrices(arrays)
    value = reduction(pt.linalg.kron(*factors))
    function = compile_py(factors, value)
    assert has_kron(function.maker.fgraph)
    assert_allclose(
        function(*arrays), compile_py(factors, value, mode=PY.excluding("kron"))(*arrays)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sum_of_kron", lambda K: K.sum()),
        ("frobenius_product_of_kron", lambda K: pt.linalg.norm(K)),
    ],
)
def test_turned_off_by_name(name, value):
    A, B = pt.dmatrices("A", "B")
    K = pt.linalg.kron(A, B)
    assert has_kron(compile_py([A, B], value(K), mode=PY.excluding(name)).maker.fgraph)
