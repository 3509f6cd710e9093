"""Factors of unlike dtypes, and integers, which overflow."""

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.configdefaults import config

from pymc_kron.rewriting.journal import listening
from tests.helpers import AS_WRITTEN, compile_py, has_kron, symbolic_dense_kron

USES = {
    "-K @ x": lambda K, x: -K @ x,
    "x @ (3 K)": lambda K, x: x @ (3 * K),
    "K / 3 @ x": lambda K, x: (K / 3) @ x,
    "K @ float32 x": lambda K, x: K @ x.astype("float32"),
    "x @ -K @ x": lambda K, x: x @ -K @ x,
    "(K + I) @ x": lambda K, x: (K + pt.eye(6)) @ x,
    "(I - K) @ x": lambda K, x: (pt.eye(6) - K) @ x,
    "row": lambda K, x: (5 * K)[2],
    "trace": lambda K, x: pt.trace(-K),
    "sum": lambda K, x: (5 * K).sum(),
    "squares": lambda K, x: (-K * K).sum(axis=0),
    "inv": lambda K, x: pt.linalg.inv(3 * K) @ x,
    "solve": lambda K, x: pt.linalg.solve(K, x),
    "slogdet": lambda K, x: pt.linalg.slogdet(K)[1],
    "solve, pos": lambda K, x: pt.linalg.solve(K, x, assume_a="pos"),
    "quadratic form": lambda K, x: x @ pt.linalg.solve(K, x, assume_a="pos"),
    "cholesky": lambda K, x: pt.linalg.cholesky(K) @ x,
    "eigvalsh": lambda K, x: pt.linalg.eigvalsh(K),
    "noise": lambda K, x: pt.linalg.solve(K + 2.0 * pt.eye(6), x, assume_a="pos"),
    "right-hand side": lambda K, x: pt.linalg.solve(pt.linalg.kron(pt.eye(2), np.eye(3)), K) @ x,
}


def factors_of(*dtypes):
    rng = np.random.default_rng(2)
    arrays = []
    for n, dtype in zip((2, 3), dtypes, strict=True):
        matrix = rng.integers(1, 20, size=(n, n))
        if "float" in dtype:
            # Numbers that single precision hasn't
            matrix = matrix + rng.normal(size=(n, n))
        arrays.append((matrix + matrix.T + 60 * np.eye(n)).astype(dtype))
    variables = [
        pt.tensor(letter, dtype=array.dtype, shape=array.shape)
        for letter, array in zip("AB", arrays, strict=True)
    ]
    return variables, arrays


def compare(uses, dtypes, *, rtol):
    """Compare results with those from the dense product, and return the program."""
    variables, arrays = factors_of(*dtypes)
    x = pt.dvector("x")
    inputs, values = [*variables, x], [*arrays, np.linspace(-1, 2, 6)]
    sparse, dense = (
        [USES[use](kron(*variables), x) for use in uses]
        for kron in (pt.linalg.kron, symbolic_dense_kron)
    )
    function = compile_py(inputs, sparse)
    expected = compile_py(inputs, dense, mode=AS_WRITTEN)(*values)
    for use, result, other in zip(uses, function(*values), expected, strict=True):
        assert result.dtype == other.dtype, use
        assert_allclose(result, other, rtol=rtol, err_msg=use)
    return function


@pytest.mark.parametrize(
    "dtypes",
    [("uint8", "float64"), ("float64", "int8"), ("float32", "float64"), ("float64", "float32")],
    ids=str,
)
def test_the_precision_is_that_of_the_product(dtypes):
    assert not has_kron(compare(USES, dtypes, rtol=1e-11).maker.fgraph)


# Without those that PyTensor itself rewrites to what doesn't overflow, and those of a positive
# definite matrix, which the product isn't once it has overflowed
INTEGER_USES = [
    *("-K @ x", "x @ (3 K)", "K / 3 @ x", "K @ float32 x", "x @ -K @ x", "(K + I) @ x"),
    *("(I - K) @ x", "row", "trace", "squares", "inv", "solve", "right-hand side"),
]


@pytest.mark.parametrize(
    "dtypes", [("int8", "int8"), ("int8", "int32"), ("int64", "int64")], ids=str
)
def test_integers_overflow_as_in_the_product(dtypes):
    # 60 * 60 is more than an int8 holds
    compare(INTEGER_USES, dtypes, rtol=1e-11)


@pytest.mark.parametrize("use", ["K @ float32 x", "solve", "eigvalsh"])
def test_integers_that_may_overflow_are_refused(use):
    A, B, x = pt.matrix("A", dtype="int8"), pt.matrix("B", dtype="int8"), pt.dvector("x")
    with listening() as entries:
        function = compile_py([A, B, x], USES[use](pt.linalg.kron(A, B), x))
    assert has_kron(function.maker.fgraph)
    assert any("overflow" in entry.refusal.reason for entry in entries if entry.refusal)


def test_a_product_of_booleans_has_no_negative_factor():
    A = pt.matrix("A", dtype="bool", shape=(2, 2))
    B, x = pt.matrix("B", shape=(3, 3)), pt.dvector("x")
    arrays = [np.eye(2, dtype=bool), np.arange(9.0).reshape(3, 3), np.ones(6)]
    function = compile_py([A, B, x], -pt.linalg.kron(A, B) @ x)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays), -np.kron(*arrays[:2]) @ arrays[2])


def test_a_complex_matrix_without_a_product():
    Z = pt.zmatrix("Z")
    with config.change_flags(on_opt_error="raise"):
        function = compile_py([Z], pt.linalg.cholesky(Z))
    assert_allclose(
        function(np.array([[2, 1j], [-1j, 3]])), np.linalg.cholesky([[2, 1j], [-1j, 3]])
    )
