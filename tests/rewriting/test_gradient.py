"""Gradients that are taken before the rewrites, as ``pt.grad`` of what the user wrote."""

import itertools
from math import prod
from types import SimpleNamespace

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.linalg
from numpy.testing import assert_allclose
from pytensor.graph.basic import equal_computations
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky

from pymc_kron.rewriting.journal import journal_of
from tests.helpers import (
    AS_WRITTEN,
    PY,
    WITHOUT_KRON,
    compile_py,
    count_ops,
    dense_kron,
    finite_differences,
    has_kron,
    largest_size_in,
    random_matrix,
    random_spd,
    symbolic_dense_kron,
)

solve, inv, pinv, slogdet, det = (
    pt.linalg.solve,
    pt.linalg.inv,
    pt.linalg.pinv,
    pt.linalg.slogdet,
    pt.linalg.det,
)


def solve_pos(K, b):
    return solve(K, b, assume_a="pos")


# Each product with the shapes of its factors
SQUARE = {"A": (4, 4), "B": (5, 5)}
THREE = {"A": (3, 3), "B": (2, 2), "C": (4, 4)}
TALL = {"A": (4, 2), "B": (5, 3)}
MIXED = {"A": (4, 2), "B": (2, 5)}
TRAP = {"A": (3, 2), "B": (2, 3)}
PRODUCTS = {
    "A (x) B": (SQUARE, lambda kron, v: kron(v.A, v.B)),
    "c A (x) B": (SQUARE, lambda kron, v: v.c**2 * kron(v.A, v.B)),
    "-(A (x) B).T / c": (SQUARE, lambda kron, v: -kron(v.A, v.B).T / v.c),
    "A.T (x) c B": (SQUARE, lambda kron, v: kron(v.A.T, v.c * v.B)),
    "(A (x) B) (x) C": (THREE, lambda kron, v: kron(kron(v.A, v.B), v.C)),
    "A (x) (B (x) C)": (THREE, lambda kron, v: kron(v.A, kron(v.B, v.C))),
    "A (x) A": ({"A": (4, 4)}, lambda kron, v: kron(v.A, v.A)),
    "tall": (TALL, lambda kron, v: kron(v.A, v.B)),
    "mixed": (MIXED, lambda kron, v: kron(v.A, v.B)),
    "trap": (TRAP, lambda kron, v: kron(v.A, v.B)),
}

# Functions of a product K, with vectors x and u, a matrix X and a scalar c
SQUARE_LOSSES = {
    "solve": lambda K, v: (solve(K, v.x) * v.u).sum(),
    "solve, pos": lambda K, v: v.x @ solve_pos(K, v.x),
    "solve, pos, other vector": lambda K, v: v.u @ solve_pos(K, v.x),
    "solve, matrix": lambda K, v: (solve(K, v.X) ** 2).sum(),
    "slogdet": lambda K, v: slogdet(K)[1],
    "log abs det": lambda K, v: v.c * pt.log(pt.abs(det(K))),
    "det": lambda K, v: det(K),
    "inv": lambda K, v: v.u @ inv(K) @ v.x,
    "log density": lambda K, v: -v.x @ solve_pos(K, v.x) / 2 - slogdet(K)[1] / 2,
    "trace of inv": lambda K, v: pt.trace(inv(K)),
    "identity on the right": lambda K, v: v.u @ solve(K, v.c * pt.eye(20)) @ v.x,
    "rows, times a solution": lambda K, v: ((K[[1, 0, 5]] @ solve(K.T, v.u)) ** 2).sum(),
    "trace": lambda K, v: pt.trace(K) ** 2,
    "diagonal": lambda K, v: (pt.diagonal(K) ** 2 * v.x).sum(),
}
LOSSES = {
    "pinv": lambda K, v: v.x @ pinv(K) @ v.u,
    "K @ x": lambda K, v: ((K @ v.x) ** 2).sum(),
    "K @ X": lambda K, v: ((K @ v.X) ** 2).sum(),
    "u @ K": lambda K, v: ((v.u @ K) ** 3).sum(),
    "u @ K @ x": lambda K, v: v.u @ K @ v.x,
    "sum": lambda K, v: K.sum(),
    "sum over rows": lambda K, v: (K.sum(axis=0) ** 2 * v.x).sum(),
    "sum over columns": lambda K, v: (K.sum(axis=1) ** 2 * v.u).sum(),
    "norm": lambda K, v: pt.linalg.norm(K),
    "root of sum of squares": lambda K, v: pt.sqrt((K**2).sum()),
    "squares": lambda K, v: (K**2).sum(axis=0) @ v.x,
    "diagonal, offset 2": lambda K, v: (pt.diagonal(K, offset=2) ** 2).sum(),
    "diagonal, offset -1": lambda K, v: (pt.diagonal(K, offset=-1) ** 2).sum(),
    "row": lambda K, v: (K[1] ** 2 * v.x).sum(),
    "last row": lambda K, v: (K[-1] * v.x).sum(),
    "column": lambda K, v: (K[:, 3] ** 2 * v.u).sum(),
    "element": lambda K, v: K[2, 1] ** 2,
    "element from the end": lambda K, v: K[-1, -2] ** 2,
}
# Where sizes have to be known to agree
STATIC_LOSSES = {
    "K @ K @ x": lambda K, v: ((K @ K @ v.x) ** 2).sum(),
    "x @ K @ K @ K @ x": lambda K, v: v.x @ K @ K @ K @ v.x,
    "K * K.T": lambda K, v: v.u @ (K * K.T) @ v.x,
    "trace of a solution": lambda K, v: pt.trace(solve(K, K.T)),
    "K / K.T": lambda K, v: v.u @ (K / K.T) @ v.x,
    "first rows, times a solution": lambda K, v: ((K[:4] @ solve(K.T, v.u)) ** 2).sum(),
    "solve(K, K.T) @ x": lambda K, v: v.u @ solve(K, K.T) @ v.x,
    "diagonal": lambda K, v: (pt.diagonal(K) ** 2 * v.x).sum(),
    "trace of a product": lambda K, v: pt.trace(inv(K) @ K.T),
}

ALL_LOSSES = {**SQUARE_LOSSES, **LOSSES, **STATIC_LOSSES}


def values_for(product, *, definite, dtype="float64"):
    rng = np.random.default_rng(5)
    shapes, _ = PRODUCTS[product]
    if definite:
        factors = {name: random_spd(rng, n, dtype=dtype) for name, (n, _) in shapes.items()}
    else:
        factors = {name: random_matrix(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    copies = 2 if product == "A (x) A" else 1
    rows, columns = (prod(shape[i] for shape in shapes.values()) ** copies for i in (0, 1))
    others = {
        "x": rng.normal(size=columns),
        "X": rng.normal(size=(columns, 3)),
        "u": rng.normal(size=rows),
        "c": np.array(1.3),
    }
    return {**factors, **{name: value.astype(dtype) for name, value in others.items()}}


def variables_for(values, *, static):
    return {
        name: pt.tensor(
            name, dtype=value.dtype, shape=value.shape if static else (None,) * value.ndim
        )
        for name, value in values.items()
    }


def gradient_of(loss, product, kron, variables):
    _, build = PRODUCTS[product]
    v = SimpleNamespace(**variables)
    return pt.grad(loss(build(kron, v), v), list(variables.values()), disconnected_inputs="ignore")


def check(product, loss, *, static, definite=False, dtype="float64", rtol=1e-10):
    values = values_for(product, definite=definite, dtype=dtype)
    variables = variables_for(values, static=static)
    inputs = list(variables.values())
    gradient = gradient_of(loss, product, pt.linalg.kron, variables)
    function = compile_py(inputs, gradient)
    fgraph = function.maker.fgraph
    assert not has_kron(fgraph)
    results = function(*values.values())
    expected = dense_gradient(product, loss, variables, values)
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert_allclose(result, other, rtol=rtol, atol=rtol / 10 * np.abs(other).max())

    size = largest_size_in(function, *values.values())
    assert size < len(values["u"]) * len(values["x"])


def dense_gradient(product, loss, variables, values):
    gradient = gradient_of(loss, product, symbolic_dense_kron, variables)
    return compile_py(list(variables.values()), gradient, mode=AS_WRITTEN)(*values.values())


@pytest.mark.parametrize("name", SQUARE_LOSSES)
def test_losses_of_square_products(name):
    check("A (x) B", SQUARE_LOSSES[name], static=False, definite=is_of_definite(name))


def is_of_definite(name):
    return "pos" in name or "density" in name


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    check("A (x) B", LOSSES[name], static=False)


@pytest.mark.parametrize("name", STATIC_LOSSES)
def test_losses_where_sizes_have_to_be_known(name):
    check("A (x) B", STATIC_LOSSES[name], static=True)


@pytest.mark.parametrize("name", ["log density", "slogdet", "K @ X", "norm", "diagonal, offset 2"])
def test_known_sizes(name):
    check("A (x) B", ALL_LOSSES[name], static=True, definite=is_of_definite(name))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("product", ["(A (x) B) (x) C", "A (x) (B (x) C)"])
@pytest.mark.parametrize("name", ["log density", "K @ x", "row", "trace", "squares"])
def test_three_factors(name, product, static):
    check(product, ALL_LOSSES[name], static=static, definite=is_of_definite(name))


@pytest.mark.parametrize("product", ["c A (x) B", "-(A (x) B).T / c", "A.T (x) c B", "A (x) A"])
@pytest.mark.parametrize("name", ["solve", "slogdet", "K @ x", "sum over rows", "column", "norm"])
def test_multiples_transposes_and_powers(name, product):
    check(product, ALL_LOSSES[name], static=False)


@pytest.mark.parametrize("name", LOSSES)
def test_rectangular_factors(name):
    check("tall", LOSSES[name], static=False)


@pytest.mark.parametrize("name", ["pinv", "K @ X", "sum over rows", "diagonal, offset 2", "row"])
def test_a_tall_and_a_wide_factor(name):
    check("mixed", LOSSES[name], static=True)


@pytest.mark.parametrize("name", ["log density", "K @ X"])
def test_single_precision(name):
    check(
        "A (x) B",
        ALL_LOSSES[name],
        static=False,
        definite=is_of_definite(name),
        dtype="float32",
        rtol=2e-4,
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda K, v: ((K @ K @ v.x) ** 2).sum(),
        lambda K, v: ((K @ K.T @ v.x) ** 2).sum(),
        lambda K, v: v.u @ (K * K.T) @ v.x,
        lambda K, v: (K**2).sum(axis=0) @ v.x,
        lambda K, v: pt.trace(K @ K),
        lambda K, v: (pt.diagonal(K) ** 2 * v.x).sum(),
        lambda K, v: pt.trace(K),
        lambda K, v: pt.diagonal(K, offset=1).sum() + pt.linalg.norm(K),
    ],
    ids=["K K x", "K K.T x", "K * K.T", "squares", "trace of K K", "diagonal", "trace", "norm"],
)
def test_a_square_product_of_rectangular_factors(loss, static):
    # Factorwise or not, right it has to be
    values = values_for("trap", definite=False)
    variables = variables_for(values, static=static)
    gradient = gradient_of(loss, "trap", pt.linalg.kron, variables)
    results = compile_py(list(variables.values()), gradient)(*values.values())
    expected = dense_gradient("trap", loss, variables, values)
    for result, other in zip(results, expected, strict=True):
        assert_allclose(result, other, rtol=1e-10, atol=1e-11 * np.abs(other).max())


@pytest.mark.parametrize("name", ["solve", "slogdet", "norm", "diagonal, offset 2"])
def test_finite_differences(name):
    loss, (shapes, _) = ALL_LOSSES[name], PRODUCTS["A (x) B"]
    values = values_for("A (x) B", definite=is_of_definite(name))
    variables = variables_for(values, static=False)
    inputs = list(variables.values())
    gradient = gradient_of(loss, "A (x) B", pt.linalg.kron, variables)
    gradients = compile_py(inputs, gradient)(*values.values())
    value = loss(symbolic_dense_kron(variables["A"], variables["B"]), SimpleNamespace(**variables))
    function = compile_py(inputs, value, mode=AS_WRITTEN)
    for factor, result in zip(shapes, gradients, strict=False):
        expected = finite_differences(
            lambda array, factor=factor: function(*{**values, factor: array}.values()),
            values[factor],
        )
        assert_allclose(result, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


BATCHES = [
    (((7, 3, 3), (7, 2, 2)), (7, 6)),
    (((7, 3, 3), (2, 2)), (7, 6)),
    (((3, 2), (7, 2, 4)), (8,)),
    (((7, 3, 2), (1, 2, 4)), (7, 8)),
    (((5, 1, 3, 3), (7, 2, 2)), (5, 7, 6)),
]


@pytest.mark.parametrize(
    ("name", "factor_shapes", "x_shape"),
    [
        *((name, *batch) for name in ("K x", "K X") for batch in BATCHES),
        ("solve", *BATCHES[0]),
        *(("solve, pos", *batch) for batch in BATCHES[:2]),
    ],
    ids=str,
)
def test_batches_of_factors(name, factor_shapes, x_shape):
    def loss_of(K, x):
        match name:
            case "K x":
                result = (K @ x[..., None])[..., 0]
            case "K X":
                result = K @ pt.stack([x, x**2], axis=-1)
            case _:
                assume_a = "pos" if "pos" in name else "gen"
                result = solve(K, x, assume_a=assume_a, b_ndim=1)
        return (result**2).sum()

    check_batch(loss_of, factor_shapes, x_shape)


SELECTIONS = {
    "row": np.s_[..., 1, :],
    "column": np.s_[..., -2],
    "entry": np.s_[..., 2, 1],
    "part of a row": np.s_[..., 1, 2:5],
    "part of a column": np.s_[..., ::-2, 3],
    "rows": np.s_[..., 1:4, :],
    "columns": np.s_[..., ::3],
    "block": np.s_[..., 2:4, 1:],
    "columns of a block": np.s_[..., 1:, -2:],
}
SELECTIONS_OF_BATCHES = {
    "row of one matrix": np.s_[1, 2],
    "column of some": np.s_[::2, :, 2],
    "entry of one": np.s_[3, 1, -2],
    "block of one": np.s_[3, 1:3, 2:],
}


@pytest.mark.parametrize(
    ("name", "factor_shapes"),
    [
        *itertools.product(SELECTIONS, [((3, 3), (2, 2)), BATCHES[1][0], BATCHES[4][0]]),
        *itertools.product(SELECTIONS_OF_BATCHES, [BATCHES[0][0], BATCHES[3][0]]),
    ],
    ids=str,
)
def test_selections(name, factor_shapes):
    index = (SELECTIONS | SELECTIONS_OF_BATCHES)[name]
    shape = dense_kron(*map(np.empty, factor_shapes))[index].shape
    check_batch(lambda K, x: (pt.sin(K[index]) * x).sum(), factor_shapes, shape)


def check_batch(loss_of, factor_shapes, x_shape):
    rng = np.random.default_rng(5)
    arrays = [
        random_spd(rng, shape[-1], batch=shape[:-2])
        if shape[-1] == shape[-2]
        else rng.normal(size=shape)
        for shape in factor_shapes
    ]
    x = rng.normal(size=x_shape)
    A, B, x_var = inputs = [
        pt.tensor(letter, shape=array.shape)
        for letter, array in zip("ABx", (*arrays, x), strict=True)
    ]
    sparse, dense = (
        pt.grad(loss_of(pt.vectorize(kron, "(i,j),(k,l)->(m,n)")(A, B), x_var), inputs)
        for kron in (pt.linalg.kron, symbolic_dense_kron)
    )
    function = compile_py(inputs, sparse)
    assert not has_kron(function.maker.fgraph)
    results = function(*arrays, x)
    expected = compile_py(inputs, dense, mode=AS_WRITTEN)(*arrays, x)
    for result, other in zip(results, expected, strict=True):
        assert result.shape == other.shape
        assert_allclose(result, other, rtol=1e-10, atol=1e-11 * np.abs(other).max())
    assert largest_size_in(function, *arrays, x) < dense_kron(*arrays).size


# What stays dense


def test_gradients_through_singular_values_are_right():
    # Singular vectors come in the order of the singular values, and in another one from the factors
    values = values_for("A (x) B", definite=False)
    variables = variables_for(values, static=True)

    def loss(K, v):
        return (pt.linalg.svd(K, compute_uv=False) ** 3).sum()

    gradient = gradient_of(loss, "A (x) B", pt.linalg.kron, variables)
    results = compile_py(list(variables.values()), gradient)(*values.values())
    expected = dense_gradient("A (x) B", loss, variables, values)
    for result, other in zip(results, expected, strict=True):
        assert_allclose(result, other, rtol=1e-9, atol=1e-11 * np.abs(other).max())


def last_refusal(function):
    outcomes = [
        entry.refusal
        for entry in journal_of(function.maker.fgraph).entries
        if entry.rewrite == "pullback_of_kron"
    ]
    return str(outcomes[-1])


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda K, W: (W * K).sum(),
        lambda K, W: (pt.exp(W) * K**2).sum(),
        lambda K, W: pt.trace(W @ K),
        lambda K, W: ((K + W) ** 2).sum(),
        lambda K, W: (pt.exp(K) @ W).sum(),
    ],
    ids=["sum(W * K)", "sum(exp(W) * K**2)", "trace(W @ K)", "sum((K + W)**2)", "exp(K) @ W"],
)
def test_weights_without_structure(loss_of):
    rng = np.random.default_rng(5)
    arrays = [rng.normal(size=(2, 2)), rng.normal(size=(3, 3)), rng.normal(size=(6, 6))]
    A, B, W = inputs = pt.dmatrices("A", "B", "W")
    gradient = pt.grad(loss_of(pt.linalg.kron(A, B), W), inputs)
    function = compile_py(inputs, gradient)
    expected = pt.grad(loss_of(symbolic_dense_kron(A, B), W), inputs)
    for result, other in zip(
        function(*arrays), compile_py(inputs, expected, mode=AS_WRITTEN)(*arrays), strict=True
    ):
        assert_allclose(result, other, rtol=1e-10, atol=1e-11 * np.abs(other).max())


def test_a_dense_weight_is_named_as_the_reason():
    A, B, W = pt.dmatrices("A", "B", "W")
    function = compile_py([A, B, W], pt.grad((W * pt.linalg.kron(A, B)).sum(), [A, B]))
    assert "isn't a sum of outer products" in last_refusal(function)


def test_sizes_that_may_not_agree_are_the_reason():
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    K = pt.linalg.kron(A, B)
    function = compile_py([A, B, x], pt.grad(((K * K.T) @ x).sum(), [A, B]))
    assert "aren't known to agree" in last_refusal(function)


def test_a_gradient_without_kron_is_untouched():
    A, x = pt.dmatrix("A"), pt.dvector("x")
    value = x @ solve_pos(A, x) + slogdet(A)[1] + pt.trace(A @ A) + (A * pt.outer(x, x)).sum()
    value += (pt.diag(x) @ A).sum() + pt.linalg.inv(A)[0, 1]
    gradient = pt.grad(value, [A, x])
    fgraphs = [compile_py([A, x], gradient, mode).maker.fgraph for mode in (PY, WITHOUT_KRON)]
    assert journal_of(fgraphs[0]) is None
    outputs, inputs = zip(*((fgraph.outputs, fgraph.inputs) for fgraph in fgraphs), strict=True)
    assert equal_computations(*outputs, in_xs=inputs[0], in_ys=inputs[1])


# The log density of issue-like size, N = 10,000


def log_density_and_gradient():
    A, B, x = pt.matrix("A"), pt.matrix("B"), pt.vector("x")
    K = pt.linalg.kron(A, B)
    value = -x @ solve(K, x, assume_a="pos") / 2 - slogdet(K)[1] / 2
    return [A, B, x], value, pt.grad(value, [A, B, x])


def covariances(scales, n=100):
    """Return factors with determinant one, times the scales."""
    rng = np.random.default_rng(5)
    factors = []
    for scale in scales:
        matrix = random_spd(rng, n)
        factors.append(scale * matrix / np.exp(np.linalg.slogdet(matrix)[1] / n))
    return factors


def closed_form(A, B, x):
    """Return the log density and its gradient as the triangular roots of the factors give them.

    dlogp/dK_i = L_i^-T [W_(i) W_(i)^T - (N / n_i) I] L_i^-1 / 2
    """
    roots = [np.linalg.cholesky(factor) for factor in (A, B)]
    inverses = [scipy.linalg.solve_triangular(L, np.eye(len(L)), lower=True) for L in roots]
    W = inverses[0] @ x.reshape(len(A), len(B)) @ inverses[1].T
    copies = len(B), len(A)
    logdet = sum(n * 2 * np.log(np.diag(L)).sum() for n, L in zip(copies, roots, strict=True))
    gradients = [
        inverse.T @ (unfolded @ unfolded.T - n * np.eye(len(inverse))) @ inverse / 2
        for inverse, unfolded, n in zip(inverses, (W, W.T), copies, strict=True)
    ]
    dx = -(inverses[0].T @ W @ inverses[1]).ravel()
    return -(W**2).sum() / 2 - logdet / 2, *gradients, dx


# det K = (a b)^10000, det A = a^100, det B = b^100
SCALES = [
    (1, 1),
    (10**0.04, 1),
    (10**-0.04, 1),
    (1e-4, 1e4),
    (1e5, 1e-5),
    (1e-30, 1e30),
    (1e-30, 1e-30),
    (1e30, 1e30),
]


compiled_once = pytest.mark.xdist_group("log density of ten thousand cells")


@pytest.fixture(scope="module")
def log_density(request):
    inputs, value, gradient = log_density_and_gradient()
    mode = PY if request.param == "PY" else "NUMBA"
    return pytensor.function(inputs, [value, *gradient], mode=mode)


@compiled_once
@pytest.mark.parametrize(
    ("log_density", "scales"),
    [*(("NUMBA", scales) for scales in SCALES), ("PY", (1, 1)), ("PY", (1e-30, 1e-30))],
    ids=str,
    indirect=["log_density"],
)
def test_log_density_of_ten_thousand_cells(log_density, scales):
    arrays = covariances(scales)
    x = np.random.default_rng(5).normal(size=10_000) * np.prod(scales) ** 0.5
    for result, expected in zip(log_density(*arrays, x), closed_form(*arrays, x), strict=True):
        assert np.isfinite(result).all()
        assert_allclose(result, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


@compiled_once
@pytest.mark.parametrize("log_density", ["NUMBA", "PY"], indirect=True)
def test_log_density_decomposes_each_factor_once(log_density):
    fgraph = log_density.maker.fgraph
    assert not has_kron(fgraph)
    assert count_ops(fgraph, Cholesky) == 2


@compiled_once
@pytest.mark.parametrize("log_density", ["PY"], indirect=True)
def test_log_density_computes_nothing_large(log_density):
    assert largest_size_in(log_density, *covariances((1, 1)), np.ones(10_000)) == 10_000
