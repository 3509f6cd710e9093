import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.assumptions.specify import assume
from pytensor.compile.mode import Mode
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.summary import SLogDet

from tests.helpers import (
    PY,
    compile_py,
    count_ops,
    dense_kron,
    finite_differences,
    has_kron,
    random_matrix,
    random_spd,
    symbolic_matrices,
)


def negative_determinant(rng, n):
    matrix = random_matrix(rng, n, n)
    matrix[0] *= -np.sign(np.linalg.det(matrix))
    return matrix


@pytest.mark.parametrize("sizes", [(3, 2), (2, 4, 3), (3, 5), (1, 4), (3,) * 2], ids=str)
@pytest.mark.parametrize("kind", ["general", "negative determinants", "positive definite"])
def test_slogdet_and_det(kind, sizes):
    rng = np.random.default_rng(7)
    make = {
        "general": lambda n: random_matrix(rng, n, n),
        "negative determinants": lambda n: negative_determinant(rng, n),
        "positive definite": lambda n: random_spd(rng, n),
    }[kind]
    arrays = [make(n) for n in sizes]
    factors = symbolic_matrices(arrays)
    K = factors[-1]
    for factor in reversed(factors[:-1]):
        K = pt.linalg.kron(factor, K)
    det = pt.linalg.det(K)
    function = compile_py(factors, [*pt.linalg.slogdet(K), det, pt.log(pt.abs(det)), pt.log(det)])
    assert not has_kron(function.maker.fgraph)
    sign, logabsdet, det, log_abs_det, log_det = function(*arrays)
    expected_sign, expected = np.linalg.slogdet(dense_kron(*arrays))
    assert sign == expected_sign
    assert_allclose([logabsdet, log_abs_det], expected, rtol=1e-10)
    assert_allclose(det, expected_sign * np.exp(expected), rtol=1e-10)
    assert_allclose(log_det, expected if expected_sign > 0 else np.nan, rtol=1e-10)


@pytest.mark.parametrize("optimizer", ["fast_run", "fast_compile"])
@pytest.mark.parametrize("exponent", [-400, -50, 50, 400])
def test_never_infinite_while_the_value_is_finite(exponent, optimizer):
    # det(A) = 10^exponent, and det(A (x) B) = 10^(5 exponent)
    rng = np.random.default_rng(7)
    scale = 10.0 ** (exponent / 40)
    arrays = [scale * np.linalg.qr(rng.normal(size=(40, 40)))[0], np.eye(5)]
    factors = symbolic_matrices(arrays)
    sign, logabsdet = pt.linalg.slogdet(pt.linalg.kron(*factors))
    mode = Mode(linker="py", optimizer=optimizer)
    result_sign, result = compile_py(factors, [sign, logabsdet], mode=mode)(*arrays)
    assert_allclose(result, 5 * exponent * np.log(10), rtol=1e-10)
    assert result_sign == np.linalg.slogdet(arrays[0])[0] ** 5


@pytest.mark.parametrize("exponent", [-400, 0, 400])
@pytest.mark.parametrize("sizes", [(1000, 1000), (99, 100, 101), (5, 1000, 200)], ids=str)
def test_a_million_cells(sizes, exponent):
    # The determinant of each factor is 10^exponent or minus that; det(K_i) counts N / n_i times
    rng = np.random.default_rng(7)
    arrays, expected, expected_sign = [], 0.0, 1
    N = int(np.prod(sizes))
    for i, n in enumerate(sizes):
        sign = -1 if i == 0 else 1
        diagonal = np.full(n, 10.0 ** (exponent / n))
        diagonal[0] *= sign
        # Triangular up to a permutation of the rows, so that the determinant is known
        order = rng.permutation(n)
        arrays.append((np.diag(diagonal) + np.triu(rng.normal(size=(n, n)), 1) / n)[order])
        order_sign = np.linalg.slogdet(np.eye(n)[order])[0]
        expected += N // n * exponent * np.log(10)
        expected_sign *= (sign * order_sign) ** (N // n)
    factors = symbolic_matrices(arrays)
    K = factors[-1]
    for factor in reversed(factors[:-1]):
        K = pt.linalg.kron(factor, K)
    sign, logabsdet = compile_py(factors, [*pt.linalg.slogdet(K)])(*arrays)
    assert sign == expected_sign
    # A log-determinant of zero is the difference of large numbers
    assert_allclose(logabsdet, expected, rtol=1e-10, atol=1e-9 * N)


def test_factor_determinants_that_cancel():
    # det = 10^400 10^-400 = 1 is representable, though neither factor's determinant is
    scale = 10.0**10
    factors = symbolic_matrices([np.eye(2)] * 2)
    det = pt.linalg.det(pt.linalg.kron(*factors))
    function = compile_py(factors, det)
    assert_allclose(function(scale * np.eye(20), np.eye(20) / scale), 1.0, rtol=1e-9)
    squared_exponential = np.exp(-0.5 * np.subtract.outer(np.arange(60), np.arange(60)) ** 2 / 4)
    _, logabsdet = pt.linalg.slogdet(pt.linalg.kron(*factors))
    K = squared_exponential + 1e-8 * np.eye(60)
    assert np.linalg.det(K) ** 61 == 0
    assert_allclose(
        compile_py(factors, logabsdet)(K, np.eye(61)), 61 * np.linalg.slogdet(K)[1], rtol=1e-10
    )


def test_singular_factor():
    factors = symbolic_matrices([np.eye(2)] * 2)
    sign, logabsdet = pt.linalg.slogdet(pt.linalg.kron(*factors))
    det = pt.linalg.det(pt.linalg.kron(*factors))
    result = compile_py(factors, [sign, logabsdet, det])(np.zeros((2, 2)), np.eye(3))
    assert_allclose(result, [0, -np.inf, 0])


@pytest.mark.parametrize(
    ("shapes", "static"),
    [
        (((0, 0), (2, 2)), True),
        (((0, 0), (2, 2)), False),
        (((2, 2), (0, 0)), True),
        (((2, 2), (0, 0)), False),
        # Only static shapes show that these are not square
        (((0, 2), (2, 0)), True),
    ],
    ids=str,
)
def test_the_determinant_of_an_empty_product_is_one(shapes, static):
    arrays = [np.zeros(shape) for shape in shapes]
    factors = [
        pt.tensor(f"A{i}", shape=shape if static else (None, None))
        for i, shape in enumerate(shapes)
    ]
    det = pt.linalg.det(pt.linalg.kron(*factors))
    assert compile_py(factors, det, mode=PY.excluding("det_of_kronecker"))(*arrays) == 1


def test_batches():
    rng = np.random.default_rng(7)
    arrays = [random_spd(rng, 3, batch=(4, 1)), random_spd(rng, 2, batch=(5,)), random_spd(rng, 2)]
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
    sign, logabsdet = pt.linalg.slogdet(kron(kron(factors[0], factors[1]), factors[2]))
    function = compile_py(factors, [sign, logabsdet])
    assert not has_kron(function.maker.fgraph)
    expected = np.linalg.slogdet(dense_kron(*arrays))
    for result, dense in zip(function(*arrays), expected, strict=True):
        assert result.shape == (4, 5)
        assert_allclose(result, dense, rtol=1e-10)


def test_gradient_after_the_bundle_where_the_determinant_underflows():
    rng = np.random.default_rng(7)
    arrays = [1e-8 * random_matrix(rng, 50, 50), random_matrix(rng, 3, 3)]
    assert np.linalg.det(arrays[0]) == 0
    A, B = factors = symbolic_matrices(arrays)
    _, logabsdet = pt.linalg.slogdet(pt.linalg.kron(A, B))
    gradient = pt.grad(rewrite_pregrad(logabsdet), factors)
    dA, dB = compile_py(factors, gradient)(*arrays)
    assert_allclose(dA, 3 * np.linalg.inv(arrays[0]).T, rtol=1e-10)
    assert_allclose(dB, 50 * np.linalg.inv(arrays[1]).T, rtol=1e-10)


def test_second_derivative():
    rng = np.random.default_rng(7)
    A_array, B_array = random_matrix(rng, 2, 2), random_matrix(rng, 3, 3)
    A, B = symbolic_matrices([A_array, B_array])
    _, logabsdet = pt.linalg.slogdet(pt.linalg.kron(A, B))
    dA = pt.grad(rewrite_pregrad(logabsdet), A)
    d2A = compile_py([A, B], pt.grad(dA[0, 1], A))(A_array, B_array)
    first = compile_py([A, B], dA[0, 1])
    assert_allclose(d2A, finite_differences(lambda a: first(a, B_array), A_array), rtol=1e-6)


def test_the_sign_has_no_gradient():
    A, B = factors = symbolic_matrices([np.eye(2)] * 2)
    sign, _ = pt.linalg.slogdet(pt.linalg.kron(A, B))
    dA = pt.grad(rewrite_pregrad(sign), A)
    assert_allclose(compile_py(factors, dA)(2 * np.eye(2), np.eye(3)), 0)


def test_known_structure_chooses_the_factorisation():
    A, B, C = pt.dmatrices("A", "B", "C")
    K = pt.linalg.kron(
        assume(A, positive_definite=True),
        pt.linalg.kron(assume(B, lower_triangular=True), C),
    )
    function = compile_py([A, B, C], pt.linalg.slogdet(K))
    assert count_ops(function.maker.fgraph, Cholesky) == 1
    assert count_ops(function.maker.fgraph, SLogDet) == 1
    rng = np.random.default_rng(7)
    arrays = [random_spd(rng, 3), np.tril(negative_determinant(rng, 4)), random_matrix(rng, 3, 3)]
    arrays[1][2, 2] *= -1
    sign, logabsdet = function(*arrays)
    expected_sign, expected = np.linalg.slogdet(dense_kron(*arrays))
    assert sign == expected_sign
    assert_allclose(logabsdet, expected, rtol=1e-10)


def test_triangular_root_with_a_negative_diagonal():
    L_var, B = pt.dmatrix("L"), pt.dmatrix("B")
    L = assume(L_var, lower_triangular=True)
    K = pt.linalg.kron(assume(L @ L.T, positive_definite=True), B)
    L_array, B_array = np.array([[-2.0, 0.0], [1.0, 3.0]]), np.diag([1.0, 2.0, 3.0])
    function = compile_py([L_var, B], pt.linalg.slogdet(K))
    assert count_ops(function.maker.fgraph, Cholesky) == 0
    expected = np.linalg.slogdet(dense_kron(L_array @ L_array.T, B_array))
    assert_allclose(function(L_array, B_array), expected, rtol=1e-10)


def test_square_product_of_rectangular_factors_is_singular():
    # PyTensor's own rewrite raises here
    rng = np.random.default_rng(7)
    arrays = [rng.normal(size=(3, 2)), rng.normal(size=(2, 3))]
    A, B = pt.tensor("A", shape=(3, 2)), pt.tensor("B", shape=(2, 3))
    det = pt.linalg.det(pt.linalg.kron(A, B))
    assert compile_py([A, B], det)(*arrays) == 0
    assert_allclose(np.linalg.det(np.kron(*arrays)), 0, atol=1e-12)


def test_complex_determinant():
    rng = np.random.default_rng(7)
    arrays = [random_matrix(rng, n, n) + 1j * rng.normal(size=(n, n)) for n in (2, 3)]
    factors = symbolic_matrices(arrays)
    det = pt.linalg.det(pt.linalg.kron(*factors))
    function = compile_py(factors, [det, pt.sign(det), pt.log(pt.abs(det)), pt.log(det)])
    assert not has_kron(function.maker.fgraph)
    dense = np.linalg.det(dense_kron(*arrays))
    # The logarithm is the principal value, which a sum over the factors isn't
    expected = [dense, dense / abs(dense), np.log(abs(dense)), np.log(dense)]
    for result, value in zip(function(*arrays), expected, strict=True):
        assert_allclose(result, value, rtol=1e-10)


def test_right_if_the_rewrite_of_pytensor_comes_first():
    rng = np.random.default_rng(7)
    arrays = [negative_determinant(rng, 3), random_matrix(rng, 4, 4)]
    factors = symbolic_matrices(arrays)
    outputs = pt.linalg.slogdet(pt.linalg.kron(*factors))
    function = compile_py(factors, outputs, mode=PY.excluding("det_of_kron"))
    assert_allclose(function(*arrays), np.linalg.slogdet(dense_kron(*arrays)), rtol=1e-10)
