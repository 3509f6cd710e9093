import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    PY,
    WITHOUT_KRON,
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    symbolic_matrices,
)

SHAPES = [((3, 3), (2, 2)), ((3, 4), (5, 2)), ((2, 3), (1, 4), (5, 2)), ((3, 2), (2, 3))]


def nested_kron(factors):
    *others, product = factors
    for factor in reversed(others):
        product = pt.linalg.kron(factor, product)
    return product


def arrays_and_factors(shapes, *, static, dtype="float64"):
    rng = np.random.default_rng(31)
    arrays = [(4 * rng.normal(size=shape)).astype(dtype) for shape in shapes]
    if static:
        factors = [pt.tensor(f"A{i}", dtype=dtype, shape=a.shape) for i, a in enumerate(arrays)]
    else:
        factors = symbolic_matrices(arrays)
    return arrays, factors


def check(value, inputs, arguments, expected, *, mode=PY):
    function = pytensor.function(inputs, value, mode=mode, on_unused_input="ignore")
    assert not has_kron(function.maker.fgraph)
    result = np.asarray(function(*arguments))
    assert result.dtype == value.type.dtype
    assert result.shape == np.shape(expected)
    assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("offset", [-20, -7, -1, 0, 1, 2, 5, 20])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_diagonal(shapes, static, offset):
    arrays, factors = arrays_and_factors(shapes, static=static)
    K, dense = nested_kron(factors), dense_kron(*arrays)
    values = [pt.diagonal(K, offset), pt.diagonal(3 * K.T, offset), pt.diagonal(K, offset, 1, 0)]
    expected = [dense.diagonal(offset), 3 * dense.T.diagonal(offset), dense.diagonal(offset, 1, 0)]
    function = compile_py(factors, values)
    assert not has_kron(function.maker.fgraph)
    for result, diagonal in zip(function(*arrays), expected, strict=True):
        assert_allclose(result, diagonal, rtol=1e-10)


@pytest.mark.parametrize("offset", [0, 1])
def test_diagonal_computes_nothing_dense(offset):
    arrays, factors = arrays_and_factors([(7, 7), (6, 6)], static=False)
    value = pt.diagonal(pt.linalg.kron(*factors), offset)
    assert largest_size_in(compile_py(factors, value), *arrays) <= 49


def test_diagonal_of_square_factors_is_not_gathered():
    A, B = pt.dmatrices("A", "B")
    K = pt.linalg.kron(assume(A, positive_definite=True), B @ B.T)
    function = compile_py([A, B], pt.diag(K))
    assert not any("Advanced" in str(node.op) for node in function.maker.fgraph.apply_nodes)
    rng = np.random.default_rng(31)
    a, b = np.eye(3) + 1, rng.normal(size=(2, 4))
    assert_allclose(function(a, b), dense_kron(a, b @ b.T).diagonal(), rtol=1e-10)


@pytest.mark.parametrize("offset", [-1, 0, 2])
@pytest.mark.parametrize("square", [False, True])
def test_diagonals_of_batches(square, offset):
    shapes = [(5, 3, 3), (2, 2)] if square else [(5, 3, 4), (7, 1, 5, 2)]
    arrays, factors = arrays_and_factors(shapes, static=True)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    dense = dense_kron(*arrays)
    value = pt.diagonal(K, offset, axis1=-2, axis2=-1)
    check(value, factors, arrays, np.diagonal(dense, offset, axis1=-2, axis2=-1))
    # Along the batch, it is not the diagonal of a product
    value = pt.diagonal(K, offset, axis1=0, axis2=-1)
    expected = np.diagonal(dense, offset, axis1=0, axis2=-1)
    assert_allclose(compile_py(factors, value)(*arrays), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "complex128"])
def test_dtypes(dtype):
    arrays, factors = arrays_and_factors([(3, 4), (5, 2)], static=False, dtype=dtype)
    K, dense = nested_kron(factors), dense_kron(*arrays)
    i = pt.lscalar("i")
    function = compile_py([*factors, i], [pt.diag(K), K[i], K[:, i], K[i, 1], K[[1, 2]]])
    assert not has_kron(function.maker.fgraph)
    expected = dense.diagonal(), dense[3], dense[:, 3], dense[3, 1], dense[[1, 2]]
    for result, value in zip(function(*arrays, 3), expected, strict=True):
        assert result.dtype == dtype
        assert_allclose(result, value, rtol=1e-6)


V, W = np.array([3, -1, 7, 0, 0]), np.array([0, 7, -2, -8, 1])

# With i = -4, j = 5, v = V and w = W
INDICES = {
    "row": lambda K, i, j, v, w: K[i],
    "constant row": lambda K, i, j, v, w: K[3, :],
    "column": lambda K, i, j, v, w: K[:, j],
    "last column": lambda K, i, j, v, w: K[..., -1],
    "entry": lambda K, i, j, v, w: K[i, j],
    "constant entry": lambda K, i, j, v, w: K[-2, 4],
    "part of a row": lambda K, i, j, v, w: K[i, 2:5],
    "part of a column": lambda K, i, j, v, w: K[j::-2, 1],
    "entry of a scaled transpose": lambda K, i, j, v, w: (-2 * K).T[i, j],
    "rows": lambda K, i, j, v, w: K[v],
    "constant rows": lambda K, i, j, v, w: K[[1, 2, -1]],
    "columns": lambda K, i, j, v, w: K[:, v],
    "grid of rows": lambda K, i, j, v, w: K[v[:4].reshape((2, 2))],
    "grid of columns": lambda K, i, j, v, w: K[:, v[:4].reshape((2, 2))],
    "part of rows": lambda K, i, j, v, w: K[v, 1:4],
    "part of columns": lambda K, i, j, v, w: K[1:4, v],
    "entries": lambda K, i, j, v, w: K[v, w],
    "entries of a row": lambda K, i, j, v, w: K[i, v],
    "submatrix": lambda K, i, j, v, w: K[v[:, None], w],
    "submatrix in two steps": lambda K, i, j, v, w: K[v][:, w],
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shapes", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_indexing(name, shapes, static):
    arrays, factors = arrays_and_factors(shapes, static=static)
    index_variables = pt.bscalar("i"), pt.lscalar("j"), pt.ivector("v"), pt.lvector("w")
    value = INDICES[name](nested_kron(factors), *index_variables)
    expected = INDICES[name](dense_kron(*arrays), -4, 5, V, W)
    arguments = [*arrays, np.int8(-4), 5, V.astype("int32"), W]
    check(value, [*factors, *index_variables], arguments, expected)


@pytest.mark.parametrize(
    "index", [np.s_[2:5], np.s_[:, 2:5], np.s_[-2:], np.s_[::3, 2:], np.s_[1:, 1:3], np.s_[4:4]]
)
def test_short_slices_of_known_size(index):
    arrays, factors = arrays_and_factors([(3, 4), (5, 2)], static=True)
    check(pt.linalg.kron(*factors)[index], factors, arrays, dense_kron(*arrays)[index])


@pytest.mark.parametrize(
    "name", ["row", "column", "entry", "rows", "columns", "entries", "submatrix"]
)
def test_indexing_computes_nothing_dense(name):
    arrays, factors = arrays_and_factors([(8, 7), (9, 10)], static=False)
    index_variables = pt.lscalar("i"), pt.lscalar("j"), pt.lvector("v"), pt.lvector("w")
    value = INDICES[name](pt.linalg.kron(*factors), *index_variables)
    function = compile_py([*factors, *index_variables], value)
    largest = largest_size_in(function, *arrays, -4, 5, V, W)
    assert largest <= {"rows": 5 * 70, "columns": 5 * 72}.get(name, 90)


@pytest.mark.parametrize(
    "select",
    [
        lambda K, i, v: K[..., i, :],
        lambda K, i, v: K[..., i],
        lambda K, i, v: K[..., i, 1],
        lambda K, i, v: K[1, :, i],
        lambda K, i, v: K[1:, ..., i, 2:4],
        lambda K, i, v: K[..., v, :],
        lambda K, i, v: K[..., v],
        lambda K, i, v: K[..., v, v],
        lambda K, i, v: K[:, :2][..., v],
    ],
)
@pytest.mark.parametrize("second", [(5, 2), (7, 1, 5, 2)], ids=str)
def test_indexing_of_batches(second, select):
    arrays, factors = arrays_and_factors([(4, 3, 4), second], static=True)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    inputs = [*factors, pt.lscalar("i"), pt.lvector("v")]
    expected = select(dense_kron(*arrays), 3, V[:3])
    check(select(K, *inputs[-2:]), inputs, [*arrays, 3, V[:3]], expected)


@pytest.mark.parametrize("index", [15, -16, 100, -100])
@pytest.mark.parametrize("kind", ["symbolic", "constant", "vector", "entry", "column"])
@pytest.mark.parametrize("static", [False, True])
def test_out_of_bounds_is_still_an_error(static, kind, index):
    shapes = [(3, 3), (5, 5)]
    arrays, factors = arrays_and_factors(shapes, static=static)
    K, i, v = pt.linalg.kron(*factors), pt.lscalar("i"), pt.lvector("v")
    value = {
        "symbolic": K[i],
        "constant": K[index],
        "vector": K[v],
        "entry": K[1, i],
        "column": K[:, i],
    }[kind]
    function = compile_py([*factors, i, v], value)
    assert not has_kron(function.maker.fgraph)
    with pytest.raises(IndexError, match="out of bounds"):
        function(*arrays, index, [0, index])


@pytest.mark.parametrize("index", [-15, 14])
def test_the_last_indices_within_bounds(index):
    arrays, factors = arrays_and_factors([(3, 3), (5, 5)], static=True)
    i = pt.lscalar("i")
    function = compile_py([*factors, i], pt.linalg.kron(*factors)[i])
    assert_allclose(function(*arrays, index), dense_kron(*arrays)[index], rtol=1e-10)


def test_a_first_factor_with_one_row():
    arrays, factors = arrays_and_factors([(1, 3), (4, 2)], static=True)
    i = pt.lscalar("i")
    function = compile_py([*factors, i], pt.linalg.kron(*factors)[i])
    assert_allclose(function(*arrays, -1), dense_kron(*arrays)[-1], rtol=1e-10)
    with pytest.raises(IndexError, match="out of bounds"):
        function(*arrays, 4)


def test_no_rows_of_an_empty_product():
    arrays = [np.empty((0, 3)), np.ones((2, 2))]
    factors = symbolic_matrices(arrays)
    v = pt.lvector("v")
    function = compile_py([*factors, v], pt.linalg.kron(*factors)[v])
    assert function(*arrays, np.empty(0, dtype=int)).shape == (0, 6)


@pytest.mark.parametrize("mode", ["NUMBA", "JAX"])
def test_other_backends(mode):
    arrays, factors = arrays_and_factors([(3, 4), (5, 2)], static=True)
    K, dense = pt.linalg.kron(*factors), dense_kron(*arrays)
    i, v = pt.lscalar("i"), pt.lvector("v")
    values = [pt.diagonal(K, -2), pt.diag(K @ K.T), K[i], K[:, -1], K[v, i], K[:, 2:5]]
    expected = [
        dense.diagonal(-2),
        (dense @ dense.T).diagonal(),
        dense[-4],
        dense[:, -1],
        dense[V, -4],
        dense[:, 2:5],
    ]
    function = pytensor.function([*factors, i, v], values, mode=mode)
    assert not has_kron(function.maker.fgraph)
    for result, value in zip(function(*arrays, -4, V), expected, strict=True):
        assert_allclose(result, value, rtol=1e-10)


@pytest.mark.parametrize(
    ("select", "static", "reason"),
    [
        (lambda K, v, m: K[2:5], False, "at most half"),
        (lambda K, v, m: K[:-1, 1:], True, "at most half"),
        (lambda K, v, m: K[v[0] :], True, "at most half"),
        (lambda K, v, m: K[m], False, "mask"),
        (lambda K, v, m: K[::-1][np.arange(15)], True, "at most half"),
        (lambda K, v, m: K[np.arange(15)[::-1]], True, "as many rows"),
    ],
)
def test_refusals(select, static, reason):
    arrays, factors = arrays_and_factors([(3, 4), (5, 2)], static=static)
    v, mask = pt.lvector("v"), pt.vector("m", dtype="bool")
    value = select(pt.linalg.kron(*factors), v, mask)
    inputs = [*factors, v, mask]
    with listening() as entries:
        function = compile_py(inputs, value)
    assert has_kron(function.maker.fgraph)
    assert any(
        reason in entry.refusal.reason for entry in entries if entry.rewrite == "subtensor_of_kron"
    )
    arguments = [*arrays, V, np.arange(15) % 2 == 0]
    dense = compile_py(inputs, value, mode=WITHOUT_KRON)
    assert_allclose(function(*arguments), dense(*arguments), rtol=1e-10)


def test_refuses_arrays_that_index_batch_dimensions():
    arrays, factors = arrays_and_factors([(4, 3, 4), (5, 2)], static=True)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    v = pt.lvector("v")
    with listening() as entries:
        function = compile_py([*factors, v], K[v, :, v])
    assert "batch dimension" in entries[0].refusal.reason
    index = np.array([1, -2])
    expected = dense_kron(*arrays)[index, :, index]
    assert_allclose(function(*arrays, index), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diagonal_of_kron", lambda K: pt.diagonal(K, axis1=1, axis2=2)),
        ("subtensor_of_kron", lambda K: K[0, 1, 2]),
    ],
)
def test_turned_off_by_name(name, value):
    A, B = pt.tensor3("A"), pt.matrix("B")
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(A, B)
    assert has_kron(compile_py([A, B], value(K), mode=PY.excluding(name)).maker.fgraph)
    assert not has_kron(compile_py([A, B], value(K)).maker.fgraph)
