import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.tensor.linalg.products import KroneckerProduct

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    RTOL,
    WITHOUT_KRON,
    compile_py,
    dense_kron,
    has_kron,
    largest_size_in,
    random_matrix,
    symbolic_matrices,
)

batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")

WRAPPERS = {
    "plain": lambda K: K,
    "transposed": lambda K: K.mT,
    "negated": lambda K: -K,
    "scaled": lambda K: -2.5 * K / 3,
}


def check(inverse, factors, arrays, expected, dtype="float64"):
    function = compile_py(factors, inverse)
    result = function(*arrays)
    assert result.dtype == inverse.type.dtype == dtype
    assert_allclose(result, expected, rtol=RTOL[dtype], atol=RTOL[dtype])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inv(wrapper, dtype):
    rng = np.random.default_rng(5)
    arrays = [random_matrix(rng, n, n, dtype=dtype) for n in (3, 2, 4)]
    A, B, C = factors = symbolic_matrices(arrays)
    wrap = WRAPPERS[wrapper]
    K = wrap(pt.linalg.kron(A, pt.linalg.kron(B, C).T).astype(dtype))
    inverse = pt.linalg.inv(K)
    rewritten = rewrite_graph(inverse, include=("canonicalize",))
    assert isinstance(rewritten.owner.op, KroneckerProduct)
    A_, B_, C_ = arrays
    expected = np.linalg.inv(wrap(dense_kron(A_, B_.T, C_.T)))
    check(inverse.astype(dtype), factors, arrays, expected, dtype)


def test_batched_inv():
    rng = np.random.default_rng(5)
    arrays = [random_matrix(rng, 5, 3, 3), random_matrix(rng, 2, 2)]
    factors = symbolic_matrices(arrays)
    inverse = pt.linalg.inv(batched_kron(*factors))
    check(inverse, factors, arrays, np.linalg.inv(dense_kron(*arrays)))


def test_inv_of_complex_factors():
    rng = np.random.default_rng(5)
    arrays = [random_matrix(rng, n, n) + 1j * rng.normal(size=(n, n)) for n in (3, 2)]
    factors = symbolic_matrices(arrays)
    function = compile_py(factors, pt.linalg.inv(pt.linalg.kron(*factors)))
    assert_allclose(function(*arrays), np.linalg.inv(dense_kron(*arrays)), rtol=1e-10)


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("int64", "float32"), ("int64",) * 2])
def test_a_factor_of_a_smaller_dtype_is_inverted_in_that_of_the_product(dtypes):
    rng = np.random.default_rng(5)
    arrays = [(4 * random_matrix(rng, n, n)).astype(d) for n, d in zip((3, 2), dtypes, strict=True)]
    factors = symbolic_matrices(arrays)
    K = dense_kron(*(array.astype("float64") for array in arrays))
    for inverse in (pt.linalg.inv, pt.linalg.pinv):
        check(inverse(pt.linalg.kron(*factors)), factors, arrays, np.linalg.inv(K))


@pytest.mark.parametrize("inverse", [pt.linalg.inv, pt.linalg.pinv])
def test_a_product_with_the_inverse_forms_neither(inverse):
    rng = np.random.default_rng(5)
    arrays = [random_matrix(rng, n, n) for n in (7, 6)]
    factors = symbolic_matrices(arrays)
    x, x_var = rng.normal(size=42), pt.dvector("x")
    product = inverse(pt.linalg.kron(*factors)) @ x_var
    function = compile_py([*factors, x_var], product)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays, x), np.linalg.solve(dense_kron(*arrays), x), rtol=1e-10)
    assert largest_size_in(function, *arrays, x) <= 49


PINV_SHAPES = [((3, 3), (2, 2)), ((4, 2), (3, 2)), ((2, 4), (3, 2)), ((3, 2), (2, 3))]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shapes", PINV_SHAPES, ids=str)
def test_pinv(shapes, wrapper):
    rng = np.random.default_rng(5)
    arrays = [rng.normal(size=shape) for shape in (*shapes, (2, 3))]
    A, B, C = factors = symbolic_matrices(arrays)
    wrap = WRAPPERS[wrapper]
    inverse = pt.linalg.pinv(wrap(pt.linalg.kron(pt.linalg.kron(A, B), C)))
    rewritten = rewrite_graph(inverse, include=("canonicalize",))
    assert isinstance(rewritten.owner.op, KroneckerProduct)
    check(inverse, factors, arrays, np.linalg.pinv(wrap(dense_kron(*arrays))))


def test_batched_pinv():
    rng = np.random.default_rng(5)
    arrays = [rng.normal(size=(4, 2)), rng.normal(size=(5, 3, 2))]
    factors = symbolic_matrices(arrays)
    inverse = pt.linalg.pinv(batched_kron(*factors))
    check(inverse, factors, arrays, np.linalg.pinv(dense_kron(*arrays)))


def test_pinv_of_singular_factors():
    rng = np.random.default_rng(5)
    arrays = [rng.normal(size=(4, 2)) @ rng.normal(size=(2, 3)), np.zeros((2, 2))]
    arrays[1][0, 1] = 3
    factors = symbolic_matrices(arrays)
    inverse = pt.linalg.pinv(pt.linalg.kron(*factors))
    check(inverse, factors, arrays, np.linalg.pinv(dense_kron(*arrays), rtol=1e-12))


def test_pinv_keeps_products_of_small_singular_values():
    # Each is far above rounding error, 1e-16 of the product is below NumPy's cutoff
    arrays = [np.diag([1.0, 1e-8]), np.diag([1.0, 1e-8, 1e-3])]
    factors = symbolic_matrices(arrays)
    inverse = pt.linalg.pinv(pt.linalg.kron(*factors))
    expected = np.diag(1 / dense_kron(*arrays).diagonal())
    assert_allclose(compile_py(factors, inverse)(*arrays), expected, rtol=1e-10)
    assert np.linalg.pinv(dense_kron(*arrays))[4, 4] == 0


def test_hermitian_pinv_of_skew_symmetric_factors():
    skew = np.array([[0.0, 2.0], [-2.0, 0.0]])
    other = np.array([[0.0, 1.0, 3.0], [-1.0, 0.0, 2.0], [-3.0, -2.0, 0.0]])
    arrays = [skew, other]
    K = dense_kron(*arrays)
    assert_allclose(K, K.T)
    factors = symbolic_matrices(arrays)
    inverse = pt.linalg.pinv(pt.linalg.kron(*factors), hermitian=True)
    check(inverse, factors, arrays, np.linalg.pinv(K, hermitian=True))


@pytest.mark.parametrize(
    ("inverse", "shapes", "dtype", "reason"),
    [
        (pt.linalg.inv, ((3, 2), (2, 3)), "float64", "factor 1 is 3 x 2, not square"),
        (pt.linalg.inv, ((0, 0), (2, 2)), "float64", "factor 1 is empty"),
        (pt.linalg.inv, ((2, 2), (3, 3)), "bool", "the product is of dtype bool"),
        (pt.linalg.pinv, ((0, 2), (2, 2)), "float64", "a factor is empty"),
        (pt.linalg.pinv, ((2, 2), (3, 3)), "bool", "the product is of dtype bool"),
    ],
)
def test_refusals(inverse, shapes, dtype, reason):
    factors = [pt.tensor(dtype=dtype, shape=shape) for shape in shapes]
    with listening() as entries:
        rewrite_graph(inverse(pt.linalg.kron(*factors)), include=("canonicalize",))
    assert {entry.refusal.reason for entry in entries} == {reason}


def test_empty_products_of_unknown_shape():
    factors = symbolic_matrices([np.eye(2)] * 2)
    arrays = [np.empty((0, 2)), np.ones((3, 4))]
    inverse = pt.linalg.pinv(pt.linalg.kron(*factors))
    for mode in (None, WITHOUT_KRON):
        function = compile_py(factors, inverse, **({} if mode is None else {"mode": mode}))
        assert function(*arrays).shape == (8, 0)
