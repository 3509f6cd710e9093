import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pytensor.compile.mode import Mode
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.scalar.basic import Mul
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.linalg.products import KroneckerProduct

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    PY,
    RTOL,
    compile_py,
    count_ops,
    dense_kron,
    largest_size_in,
    symbolic_matrices,
)

SHAPES = [(3, 2), (4, 5)]


def random_arrays(shapes=SHAPES, dtype="float64", seed=17):
    rng = np.random.default_rng(seed)
    return [(3 * rng.normal(size=shape)).astype(dtype) for shape in shapes]


def static_matrices(arrays):
    return [pt.tensor(f"A{i}", dtype=a.dtype, shape=a.shape) for i, a in enumerate(arrays)]


def is_kron(var):
    return isinstance(getattr(var.owner.op, "core_op", var.owner.op), KroneckerProduct)


def rewritten(var):
    return rewrite_graph(var, include=("canonicalize",))


BINARY = {
    "K * M": lambda K, M: K * M,
    "K / M": lambda K, M: K / M,
    "scaled and transposed": lambda K, M: ((2 * K).T * (-M).T).T / 3,
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("name", BINARY)
def test_products_and_quotients(name, dtype):
    left, right = random_arrays(dtype=dtype), random_arrays(dtype=dtype, seed=18)
    A, B, C, D = factors = static_matrices([*left, *right])
    result_var = BINARY[name](pt.linalg.kron(A, B), pt.linalg.kron(C, D))
    function = compile_py(factors, result_var)
    assert count_ops(function.maker.fgraph, KroneckerProduct) == 1
    expected = BINARY[name](dense_kron(*left), dense_kron(*right))
    result = function(*left, *right)
    assert result.dtype == result_var.type.dtype
    assert_allclose(result, expected, rtol=RTOL.get(dtype, 1e-10))


def test_unequal_numbers_of_factors():
    left, right = random_arrays([(3, 2), (2, 2), (2, 1)]), random_arrays([(3, 2), (4, 2)])
    A, B, C, D, E = factors = static_matrices([*left, *right])
    product = pt.linalg.kron(pt.linalg.kron(A, B), C) * pt.linalg.kron(D, E)
    assert is_kron(rewritten(product))
    result = compile_py(factors, product)(*left, *right)
    assert_allclose(result, dense_kron(*left) * dense_kron(*right), rtol=1e-10)


def test_other_operands_are_left_over():
    arrays = [array for seed in (1, 2, 3) for array in random_arrays(seed=seed)]
    factors = static_matrices(arrays)
    # The first product doesn't conform with the others
    K = pt.linalg.kron(factors[1], factors[0])
    M, P = pt.linalg.kron(*factors[2:4]), pt.linalg.kron(*factors[4:6])
    c, X = pt.dscalar("c"), pt.tensor("X", shape=(12, 10))
    product = pt.mul(c, M, X, K, P)
    function = compile_py([*factors, c, X], product)
    assert count_ops(function.maker.fgraph, KroneckerProduct) == 2
    x = np.random.default_rng(1).normal(size=(12, 10))
    dense = dense_kron(arrays[1], arrays[0]) * dense_kron(*arrays[2:4]) * dense_kron(*arrays[4:6])
    assert_allclose(function(*arrays, 0.5, x), 0.5 * x * dense, rtol=1e-10)


def test_a_product_with_itself_needs_no_static_shapes():
    # As the square of a covariance, in a rational quadratic kernel
    arrays = random_arrays([(3, 3), (2, 2)])
    A, B = factors = symbolic_matrices(arrays)
    x, x_var = np.arange(6.0), pt.dvector("x")
    K = pt.linalg.kron(A, B)
    product = (K * pt.linalg.kron(A, pt.exp(B)) * K) @ x_var
    a, b = arrays
    expected = (dense_kron(a**3, b**2 * np.exp(b))) @ x
    function = compile_py([*factors, x_var], product)
    assert_allclose(function(*arrays, x), expected, rtol=1e-10)
    assert largest_size_in(function, *arrays, x) <= 9


def test_a_scalar_divided_by_a_product():
    arrays = random_arrays()
    factors = symbolic_matrices(arrays)
    c = pt.dscalar("c")
    quotient = c / pt.linalg.kron(*factors)
    assert is_kron(rewritten(quotient))
    result = compile_py([*factors, c], quotient)(*arrays, 0.7)
    assert_allclose(result, 0.7 / dense_kron(*arrays), rtol=1e-10)


def evaluated(value, factors, arrays):
    """Return the value with the bundle and without."""
    # With all rewrites, the Python linker raises OverflowError for a power of integers
    mode = Mode(linker="py", optimizer="fast_compile")
    return [
        compile_py(factors, value, mode=mode)(*arrays) for mode in (mode, mode.excluding("kron"))
    ]


def kron_of(dtype="float64", shape=(None, None)):
    return pt.linalg.kron(*(pt.tensor(name, dtype=dtype, shape=shape) for name in "AB"))


FUNCTIONS = {
    "square": (lambda K: K**2, "fciu"),
    "cube": (lambda K: K**3, "fciu"),
    "a float exponent": (lambda K: K**4.0, "fc"),
    "inverse square": (lambda K: K**-2, "fc"),
    "sqr": (pt.sqr, "fciu"),
    "abs": (lambda K: abs(K), "fc"),
    "reciprocal": (lambda K: 1 / K, "fc"),
    "sign": (pt.sign, "f"),
    "conj": (lambda K: K.conj(), "c"),
    "real": (pt.real, "f"),
    "cast": (lambda K: K.astype("complex128" if K.type.dtype[0] == "c" else "float32"), "fc"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, (_, kinds) in FUNCTIONS.items()
        for dtype in ("float32", "float64", "int64", "int8", "complex128")
        if np.dtype(dtype).kind in kinds
    ],
)
def test_multiplicative_functions(name, dtype):
    function, _ = FUNCTIONS[name]
    arrays = random_arrays(dtype=dtype)
    factors = symbolic_matrices(arrays)
    value = function(pt.linalg.kron(*factors))
    assert is_kron(rewritten(value))
    result, expected = evaluated(value, factors, arrays)
    assert result.dtype == value.type.dtype
    assert_allclose(result, expected, rtol=1e-5 if result.dtype == "float32" else 1e-10)


def test_batches():
    rng = np.random.default_rng(17)
    arrays = [rng.normal(size=size) for size in [(5, 3, 2), (4, 5), (3, 2), (7, 1, 4, 5)]]
    A, B, C, D = factors = static_matrices(arrays)
    kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
    a, b, c, d = arrays
    dense = dense_kron(a, b), dense_kron(c, d)
    for value, expected in [
        (kron(A, B) * kron(C, D), dense[0] * dense[1]),
        (kron(A, B) / kron(C, D), dense[0] / dense[1]),
        (kron(A, B)[None] ** 2, dense[0][None] ** 2),
        (abs(kron(A, D)), abs(dense_kron(a, d))),
    ]:
        function = compile_py(factors, value)
        graph = function.maker.fgraph
        assert count_ops(graph, KroneckerProduct) == 1
        assert not any(
            isinstance(node.op, Elemwise) and isinstance(node.op.scalar_op, Mul)
            for node in graph.apply_nodes
            for inp in node.inputs
            if isinstance(inp.owner_op, Blockwise)
        )
        assert_allclose(function(*arrays), expected, rtol=1e-10)


def test_integers_overflow_as_in_the_product():
    arrays = [np.array([[100, -3]], dtype="int8"), np.array([[2, 7], [5, -128]], dtype="int8")]
    factors = symbolic_matrices(arrays)
    K = pt.linalg.kron(*factors)
    for value in (K**2, K**3, K * pt.linalg.kron(factors[0], -factors[1]), pt.sqr(K)):
        assert is_kron(rewritten(value))
        assert_array_equal(*evaluated(value, factors, arrays))


def refusal_of(var, rewrite):
    with listening() as entries:
        result = rewritten(var)
    assert not is_kron(result)
    reasons = {entry.refusal.reason for entry in entries if entry.rewrite == rewrite}
    assert len(reasons) == 1
    return reasons.pop()


@pytest.mark.parametrize(
    ("value", "rewrite", "reason"),
    [
        (kron_of() * kron_of(), "mul_of_kron", "aren't known to agree"),
        (kron_of() / kron_of(), "div_of_kron", "aren't known to agree"),
        (kron_of("bool") * kron_of("bool"), "mul_of_kron", "dtype bool"),
        (kron_of("int8") * kron_of("int16"), "mul_of_kron", "overflow"),
        (1 / kron_of("int64"), "div_of_kron", "dtype int64"),
        (kron_of() ** 0.5, "elemwise_of_kron", "two negative numbers"),
        (kron_of() ** float("inf"), "elemwise_of_kron", "two negative numbers"),
        (kron_of() ** pt.dscalar("p"), "elemwise_of_kron", "isn't a known number"),
        # Broadcasts the product
        (kron_of(shape=(2, 1)) ** np.full((4, 3), 2), "elemwise_of_kron", "isn't a known number"),
        (kron_of("int8") ** -1, "elemwise_of_kron", "negative powers"),
        (kron_of("int8") ** pt.constant(2, dtype="int64"), "elemwise_of_kron", "overflow"),
        # The square of unsigned integers is signed
        (kron_of("uint8") ** 2, "elemwise_of_kron", "overflow"),
        (abs(kron_of("int8")), "elemwise_of_kron", "dtype int8"),
        (kron_of("int8").astype("float64"), "elemwise_of_kron", "dtype int8"),
        (kron_of().astype("int64"), "elemwise_of_kron", "dtype int64"),
        (pt.real(kron_of("complex128")), "elemwise_of_kron", "dtype complex128"),
    ],
)
def test_refusals(value, rewrite, reason):
    assert reason in refusal_of(value, rewrite)


@pytest.mark.parametrize(
    "function", [pt.exp, pt.sqrt, lambda K: K + K.T, lambda K: K * pt.dmatrix("X")]
)
def test_what_is_not_multiplicative_is_left_alone(function):
    with listening() as entries:
        assert not is_kron(rewritten(function(kron_of(shape=(2, 2)))))
    assert not entries


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mul_of_kron", lambda K: K * (-K)),
        ("div_of_kron", lambda K: 1 / K),
        ("elemwise_of_kron", lambda K: abs(K)),
    ],
)
def test_turned_off_by_name(name, value):
    A, B = pt.dmatrices("A", "B")
    with listening() as entries:
        compile_py([A, B], value(pt.linalg.kron(A, B)), mode=PY.excluding(name))
    assert name not in {entry.rewrite for entry in entries}
