from itertools import islice

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.basic import equal_computations
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.traversal import graph_inputs
from pytensor.tensor.linalg.products import KroneckerProduct

from pymc_kron import terms
from pymc_kron.rewriting import bundle_rewriter, combinations
from pymc_kron.rewriting.as_written import summands
from pymc_kron.rewriting.journal import journal_of, product_in
from pymc_kron.structure import Refusal
from tests.helpers import (
    AS_WRITTEN,
    PY,
    WITHOUT_KRON,
    compile_py,
    count_ops,
    has_kron,
    largest_size_in,
    symbolic_dense_kron,
)

N = 20
SHAPES = {
    "A": (4, 4),
    "B": (5, 5),
    "C": (4, 4),
    "D": (5, 5),
    "X": (N, 3),
    "Y": (3, N),
    "x": (N,),
    "u": (N,),
    "c": (),
}


def values_and_variables(*, static, dtype="float64", **shapes):
    rng = np.random.default_rng(9)
    shapes = SHAPES | shapes
    values = {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    variables = {
        name: pt.tensor(name, dtype=dtype, shape=shape if static else (None,) * len(shape))
        for name, shape in shapes.items()
    }
    return values, variables


def batched(kron):
    return pt.vectorize(kron, "(i,j),(k,l)->(m,n)")


def check(expression, *, static=True, rewrite=None, limit=N * N, **options):
    values, variables = values_and_variables(static=static, **options)
    inputs = list(variables.values())
    function = compile_py(inputs, expression(pt.linalg.kron, **variables), PY)
    fgraph = function.maker.fgraph
    assert not has_kron(fgraph)
    if rewrite is not None:
        assert rewrite in {entry.rewrite for entry in journal_of(fgraph).entries if fired(entry)}
    result = function(*values.values())
    dense = compile_py(inputs, expression(symbolic_dense_kron, **variables), AS_WRITTEN)
    expected = dense(*values.values())
    assert result.shape == expected.shape
    rtol = 2e-4 if options.get("dtype") == "float32" else 1e-10
    assert_allclose(result, expected, rtol=rtol, atol=rtol / 10 * np.abs(expected).max())
    size = largest_size_in(function, *values.values())
    assert size < limit


def fired(entry):
    return entry.refusal is None


MATMULS = {
    "(K + c I) X": lambda kron, A, B, c, X, **_: (kron(A, B) + c * pt.eye(N)) @ X,
    "Y (K + c I)": lambda kron, A, B, c, Y, **_: Y @ (kron(A, B) + c * pt.eye(N)),
    "(K + c I).T x": lambda kron, A, B, c, x, **_: (kron(A, B) + c * pt.eye(N)).T @ x,
    "(K - H / c) X": lambda kron, A, B, C, D, c, X, **_: (kron(A, B) - kron(C, D) / c) @ X,
    "x (K + diag(u))": lambda kron, A, B, x, u, **_: x @ (kron(A, B) + pt.diag(u)),
    "(K + u x') X": lambda kron, A, B, x, u, X, **_: (kron(A, B) + pt.outer(u, x)) @ X,
    "K diag(u) X": lambda kron, A, B, u, X, **_: (kron(A, B) * u) @ X,
    "(K + c) X": lambda kron, A, B, c, X, **_: (kron(A, B) + c) @ X,
}


@pytest.mark.parametrize("name", MATMULS)
def test_matmul_of_a_sum(name):
    check(MATMULS[name], rewrite="matmul_of_kron_sum")


def test_matmul_of_a_sum_of_unknown_sizes():
    def expression(kron, A, B, c, X, **_):
        K = kron(A, B)
        return (K + c * pt.eye(K.shape[0])) @ X

    # The eye is square, so the sum is
    check(expression, static=False, rewrite="matmul_of_kron_sum")


def test_matmul_in_single_precision():
    check(MATMULS["(K + c I) X"], dtype="float32", rewrite="matmul_of_kron_sum")


def test_batched_matmul():
    def expression(kron, A, B, c, X, **_):
        return (batched(kron)(A, B) + c[:, None, None] * pt.eye(N)) @ X

    check(
        expression, A=(7, 4, 4), c=(7,), X=(7, N, 3), rewrite="matmul_of_kron_sum", limit=7 * N * N
    )


INNER_PRODUCTS = {
    "sum(K * u x')": lambda kron, A, B, u, x, **_: (kron(A, B) * pt.outer(u, x)).sum(),
    "c sum(K * X Y)": lambda kron, A, B, X, Y, c, **_: (c * kron(A, B) * (X @ Y)).sum(),
    "sum(-K * u x' / c)": lambda kron, A, B, u, x, c, **_: (
        -kron(A, B) * pt.outer(u, x) / c**2
    ).sum(),
    "sum(K.T * u x' / c)": lambda kron, A, B, u, x, c, **_: (
        kron(A, B).T * u[:, None] * x / c
    ).sum(),
    "sum(K * x)": lambda kron, A, B, x, **_: (kron(A, B) * x).sum(),
    "sum(K * u' * x')": lambda kron, A, B, u, x, **_: (kron(A, B) * u * pt.exp(x)).sum(),
    "sum(K * H * u x')": lambda kron, A, B, C, D, u, x, **_: (
        kron(A, B) * kron(C, D) * pt.outer(u, x)
    ).sum(),
    "sum(K * (H + c I))": lambda kron, A, B, C, D, c, **_: (
        kron(A, B) * (kron(C, D) + c * pt.eye(N))
    ).sum(),
    "sum((K + c I) * (H + u x'))": lambda kron, A, B, C, D, c, u, x, **_: (
        (kron(A, B) + c * pt.eye(N)) * (kron(C, D) + pt.outer(u, x))
    ).sum(),
    "sum(K * H diag(u) H')": lambda kron, A, B, C, D, u, **_: (
        kron(A, B) * ((kron(C, D) * u) @ kron(C, D).T)
    ).sum(),
}


@pytest.mark.parametrize("name", INNER_PRODUCTS)
def test_inner_product(name):
    check(INNER_PRODUCTS[name])


def test_batched_inner_product():
    def expression(kron, A, B, u, x, c, **_):
        K = batched(kron)(A, B)
        return (c[:, None, None] * K * u[:, :, None] * x[:, None, :]).sum(axis=(-2, -1))

    def total(kron, **variables):
        return (expression(kron, **variables) ** 2).sum()

    def all_axes(kron, A, B, u, x, c, **_):
        K = batched(kron)(A, B)
        return (c[:, None, None] * K * u[:, :, None] * x[:, None, :]).sum()

    shapes = {"A": (7, 4, 4), "u": (7, N), "x": (7, N), "c": (7,)}
    for each in (expression, total, all_axes):
        check(each, limit=7 * N * N, **shapes)


def test_a_shared_term_in_a_batched_sum_counts_once_an_entry():
    def expression(kron, A, B, u, x, c, **_):
        return (kron(A, B)[None] * pt.outer(u, x) * c[:, None, None]).sum()

    check(expression, c=(7,), limit=7 * N * N)


def test_a_sum_over_one_axis_is_no_inner_product():
    values, variables = values_and_variables(static=True)
    A, B, x = (variables[name] for name in "ABx")
    for axis in (0, 1):
        product = (pt.linalg.kron(A, B) * (pt.exp(x) * x[:, None])).sum(axis=axis)
        dense = (symbolic_dense_kron(A, B) * (pt.exp(x) * x[:, None])).sum(axis=axis)
        inputs = list(variables.values())
        result, expected = (
            compile_py(inputs, var, mode)(*values.values())
            for var, mode in ((product, PY), (dense, AS_WRITTEN))
        )
        assert_allclose(result, expected, rtol=1e-10, atol=1e-12)


DIAGONALS = {
    "diagonal(K + H)": lambda kron, A, B, C, D, **_: pt.diagonal(kron(A, B) + kron(C, D)),
    "diagonal(K + c I)": lambda kron, A, B, c, **_: pt.diagonal(kron(A, B) + c * pt.eye(N)),
    "trace(K + c I)": lambda kron, A, B, c, **_: pt.trace(kron(A, B) + c * pt.eye(N)),
    "diagonal(K diag(u) K')": lambda kron, A, B, u, **_: pt.diagonal(
        (kron(A, B) * u) @ kron(A, B).T
    ),
}


@pytest.mark.parametrize("name", DIAGONALS)
def test_diagonal_of_a_sum(name):
    check(DIAGONALS[name])


GRADIENTS = {
    "sum (K + diag(u))**2": lambda K, u, x: (((K + pt.diag(u)) @ x) ** 2).sum(),
    "sum K * (x x' + diag(u))": lambda K, u, x: (K * (pt.outer(x, x) + pt.diag(u))).sum(),
    "x' diag(u) K diag(u) x": lambda K, u, x: x @ pt.diag(u) @ K @ pt.diag(u) @ x,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_pullback_of_a_diagonal_matrix(name):
    def expression(kron, A, B, u, x, **_):
        return pt.grad(GRADIENTS[name](kron(A, B), u, x), u)

    check(expression)


GRADIENTS_IN_NOISE = {
    "x' (K + c**2 I) x": lambda K, c, x: (x @ (K + c**2 * pt.eye(N)) @ x, c),
    "sum x * (K + c I) x": lambda K, c, x: ((x * ((K + c * pt.eye(N)) @ x)).sum(), c),
    "x' (c I - K) x": lambda K, c, x: (x @ (c * pt.eye(N) - K) @ x, c),
    "x' (K + diag(full(c))) x": lambda K, c, x: (x @ (K + pt.diag(pt.full((N,), c))) @ x, c),
    "x' (K + diag(x)) x": lambda K, c, x: (x @ (K + pt.diag(x)) @ x, x),
}


@pytest.mark.parametrize("name", GRADIENTS_IN_NOISE)
def test_a_gradient_that_the_product_is_only_behind(name):
    def expression(kron, A, B, c, x, **_):
        return pt.grad(*GRADIENTS_IN_NOISE[name](kron(A, B), c, x))

    check(expression)


def test_scaled_rows():
    check(lambda kron, A, B, u, X, **_: (u[:, None] * kron(A, B)) @ X)


def expressions_without_kron(A, B, X, u, x, c, **_):
    M = A @ A.T + c * pt.eye(4)
    return [
        M @ X[:4],
        (M * pt.outer(u[:4], x[:4])).sum(),
        pt.diagonal(M * A),
        pt.trace(M @ A),
        pt.grad((pt.diag(u[:4]) @ A).sum(), u),
        pt.grad((pt.outer(u[:4], x[:4]) * pt.diag(u[:4] ** 2)).sum(), u),
        (-(u[:, None] * x) / c).sum(),
    ]


@pytest.mark.parametrize("static", [False, True])
def test_graphs_without_kron_are_left_alone(static):
    _, variables = values_and_variables(static=static)
    inputs, outputs = list(variables.values()), expressions_without_kron(**variables)
    graphs = [compile_py(inputs, outputs, mode).maker.fgraph for mode in (PY, WITHOUT_KRON)]
    assert journal_of(graphs[0]) is None
    assert equal_computations(
        graphs[0].outputs, graphs[1].outputs, in_xs=graphs[0].inputs, in_ys=graphs[1].inputs
    )


def filtered_covariance(n_steps, noise, F, P, H, R):
    """Return the covariance after some steps of a Kalman filter: each uses the last one often."""
    for _ in range(n_steps):
        predicted = F @ P @ F.T + noise
        innovation = H @ predicted @ H.T + R
        P = predicted - predicted @ H.T @ pt.linalg.inv(innovation) @ H @ predicted
    return P


def test_a_deep_graph_without_kron_is_not_read(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(combinations, "terms_of", never)
    Q, *matrices = (pt.matrix(name) for name in "QFPHR")
    outputs = [filtered_covariance(50, Q, *matrices)]
    fgraph = FunctionGraph(outputs=outputs, clone=True)
    bundle_rewriter().rewrite(fgraph)
    assert journal_of(fgraph) is None
    assert equal_computations(fgraph.outputs, outputs, fgraph.inputs, [*graph_inputs(outputs)])


def test_a_deep_graph_is_read_once(monkeypatch):
    read = []

    def counted(var, sizes, terms_of_core=terms._terms_of_core):
        read.append(var)
        return terms_of_core(var, sizes)

    monkeypatch.setattr(terms, "_terms_of_core", counted)
    A, B, *matrices = (pt.matrix(name, shape=(N, N)) for name in "ABFPHR")
    K = pt.linalg.kron(A[:4, :4], B[:5, :5])
    covariance = filtered_covariance(30, K, *matrices)
    assert len(terms.terms_of(covariance)) == 4
    assert len(read) == len(set(read)) > 30


def test_deep_graphs_with_kron_compile():
    def expression(kron, A, B, X, F, P, H, R, **_):
        return filtered_covariance(5, kron(A, B), F, P, H, R) @ X

    rng = np.random.default_rng(10)
    values, variables = values_and_variables(static=True, **dict.fromkeys("FPHR", (N, N)))
    values = {name: value / 100 for name, value in values.items()} | {"R": np.eye(N)}
    values["P"] = values["P"] @ values["P"].T
    values["X"] = rng.normal(size=(N, 3))
    inputs = list(variables.values())
    result, expected = (
        compile_py(inputs, expression(kron, **variables), mode)(*values.values())
        for kron, mode in ((pt.linalg.kron, PY), (symbolic_dense_kron, WITHOUT_KRON))
    )
    assert_allclose(result, expected, rtol=1e-10, atol=1e-14)


def test_sums_of_too_many_terms_are_not_known():
    A, B = pt.matrix("A", shape=(4, 4)), pt.matrix("B", shape=(5, 5))
    multiplied = added = M = pt.linalg.kron(A, B) + pt.eye(N)
    for _ in range(100):
        multiplied, added = multiplied @ M, added + added.T
    assert len(terms.terms_of(M @ M @ M)) == 8
    assert terms.terms_of(multiplied) is None
    assert terms.terms_of(added) is None


def test_the_product_in_a_deep_sum():
    var = pt.matrix("M")
    for _ in range(100):
        var = var + pt.exp(var).T + var.T
    assert product_in(var) is None
    assert product_in(var + pt.linalg.kron(pt.matrix("A"), pt.matrix("B"))).names == ("A", "B")


def test_a_deep_sum_has_too_many_summands():
    var = pt.matrix("M")
    for _ in range(100):
        var = var + var * pt.exp(var)
    with pytest.raises(Refusal, match="more than 200 parts"):
        list(summands(var))
    [(whole, _), (first, _), *_] = islice(summands(var), 5)
    assert whole is var
    assert first is var.owner.inputs[0]


def check_dense(expression, rewrite=None, match="", *, static=True, **options):
    """Check what stays dense: the values, and the reason that the journal gives."""
    values, variables = values_and_variables(static=static, **options)
    inputs = list(variables.values())
    function = compile_py(inputs, expression(pt.linalg.kron, **variables))
    dense = compile_py(inputs, expression(symbolic_dense_kron, **variables), AS_WRITTEN)
    result, expected = function(*values.values()), dense(*values.values())
    assert result.dtype == expected.dtype
    assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
    assert count_ops(function.maker.fgraph, KroneckerProduct) > 0
    if rewrite is not None:
        reasons = [
            str(entry.refusal)
            for entry in journal_of(function.maker.fgraph).entries
            if entry.rewrite == rewrite and entry.refusal is not None
        ]
        assert any(match in reason for reason in reasons)


def test_refuses_factors_whose_sizes_may_not_agree():
    def expression(kron, A, B, C, D, c, **_):
        K = kron(A, B)
        return (K * (kron(C, D) + c * pt.eye(K.shape[0]))).sum()

    check_dense(expression, "inner_product_of_kron", "aren't known to agree", static=False)


def test_the_sizes_of_a_square_product_of_rectangular_factors():
    def expression(kron, A, B, C, D, c, **_):
        return (kron(A, B) * (kron(C, D) + c * pt.eye(6))).sum()

    shapes = {"A": (3, 2), "B": (2, 3), "C": (3, 2), "D": (2, 3)}
    check_dense(expression, "inner_product_of_kron", "isn't known to be square", **shapes)


def test_any_matrix_stays_dense():
    check_dense(lambda kron, A, B, M, **_: (kron(A, B) * M).sum(), M=(N, N))
    check_dense(lambda kron, A, B, M, X, **_: (kron(A, B) + M) @ X, M=(N, N))


def test_integers_overflow_as_they_do_in_the_product():
    A, B, u, v = inputs = pt.bmatrix("A"), pt.bmatrix("B"), pt.bvector("u"), pt.bvector("v")
    values = [np.full(shape, 27, "int8") for shape in ((2, 2), (3, 3), (6,), (6,))]
    result, expected = (
        compile_py(inputs, (kron(A, B) * pt.outer(u, v)).sum(), mode)(*values)
        for kron, mode in ((pt.linalg.kron, PY), (symbolic_dense_kron, WITHOUT_KRON))
    )
    assert result == expected
