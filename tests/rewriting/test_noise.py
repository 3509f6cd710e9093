import pickle
from functools import partial

import numpy as np
import pymc as pm
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.assumptions.specify import assume
from pytensor.graph.traversal import explicit_graph_inputs
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.decomposition.eigen import Eigh
from pytensor.tensor.linalg.solvers.general import Solve

from pymc_kron.rewriting.journal import listening
from tests.helpers import (
    AS_WRITTEN,
    RTOL,
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

batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
SIZES = (3, 5, 2)
N = 15


def random_symmetric(rng, n, batch=()):
    """Return a symmetric matrix with eigenvalues of both signs."""
    matrix = 0.5 * rng.normal(size=(*batch, n, n))
    return matrix + np.swapaxes(matrix, -1, -2)


def arrays_of(definite):
    """Return A and B, C and D of their sizes, a third factor E, a scalar and two vectors."""
    rng = np.random.default_rng(13)
    make = random_spd if definite else random_symmetric
    A, B, E = (make(rng, n) for n in SIZES)
    C, D = random_spd(rng, 3), random_spd(rng, 5)
    # More than any eigenvalue of K in size, so that the sum is positive definite
    noise = np.array(1.0 if definite else 20.0)
    return [A, B, C, D, E, noise]


def symbols(static=False):
    matrices = [
        pt.tensor(name, shape=(n, n) if static else (None, None))
        for name, n in zip("ABCDE", (3, 5, 3, 5, 2), strict=True)
    ]
    return [*matrices, pt.dscalar("s")]


def positive_definite(matrix):
    return assume(matrix, positive_definite=True)


# Each builds a covariance of `kron`, A, B, C, D, E and s, of N x N entries but for the last ones.
# A and B may be indefinite where only noise is added to them.
WITH_NOISE = {
    "eye(int)": lambda kron, A, B, C, D, E, s: kron(A, B) + s * pt.eye(N),
    "eye(K.shape[0])": lambda kron, A, B, C, D, E, s: kron(A, B) + s * pt.eye(kron(A, B).shape[0]),
    "eye of both sizes": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + s * pt.eye(A.shape[0] * B.shape[0])
    ),
    "on the left": lambda kron, A, B, C, D, E, s: s * pt.eye(N) + kron(A, B),
    "s**2": lambda kron, A, B, C, D, E, s: kron(A, B) + s**2 * pt.eye(N),
    "quotient": lambda kron, A, B, C, D, E, s: kron(A, B) + pt.eye(N) / (1 / s),
    "identity_like": lambda kron, A, B, C, D, E, s: kron(A, B) + s * pt.identity_like(kron(A, B)),
    "diag(full)": lambda kron, A, B, C, D, E, s: kron(A, B) + pt.diag(pt.full(N, s)),
    "diag(s * ones)": lambda kron, A, B, C, D, E, s: kron(A, B) + pt.diag(s * pt.ones(N)),
    "diag(c / ones)": lambda kron, A, B, C, D, E, s: kron(A, B) + pt.diag(400 / (s * pt.ones(N))),
    "diag of a function": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + pt.diag(pt.exp(-1 / pt.sqr(s * pt.ones(N))) * pt.sqrt(pt.full(N, 500 * s)))
    ),
    "diag(repeat)": lambda kron, A, B, C, D, E, s: kron(A, B) + pt.diag(pt.repeat(s, N)),
    "diag of a constant": lambda kron, A, B, C, D, E, s: kron(A, B) + pt.diag(np.full(N, 7.5)),
    "np.eye": lambda kron, A, B, C, D, E, s: kron(A, B) + s * np.eye(N),
    "constant multiple": lambda kron, A, B, C, D, E, s: kron(A, B) + 7.5 * np.eye(N),
    "stabilize": lambda kron, A, B, C, D, E, s: pm.gp.util.stabilize(kron(A, B), 7.5),
    "jitter and noise": lambda kron, A, B, C, D, E, s: pm.gp.util.stabilize(
        kron(A, B) + s * pt.eye(N), 1e-3
    ),
    "noise and jitter": lambda kron, A, B, C, D, E, s: (
        pm.gp.util.stabilize(kron(A, B), 1e-3) + s**2 * pt.eye(N)
    ),
    "c * kron": lambda kron, A, B, C, D, E, s: pt.log(s) * kron(A, B) / 2 + s * pt.eye(N),
    "-kron": lambda kron, A, B, C, D, E, s: s * pt.eye(N) - kron(A, B),
    "multiple of the sum": lambda kron, A, B, C, D, E, s: s * (0.1 * kron(A, B) + pt.eye(N)),
    "transposed": lambda kron, A, B, C, D, E, s: (kron(A, B.T).T + s * pt.eye(N)).T,
    "nested to the right": lambda kron, A, B, C, D, E, s: kron(A, kron(B, E)) + s * pt.eye(2 * N),
    "nested to the left": lambda kron, A, B, C, D, E, s: (
        kron(kron(A, B), E) + s * pt.eye(kron(kron(A, B), E).shape[0])
    ),
    "kron of identities": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + s * kron(np.eye(3), pt.eye(5))
    ),
    "kron of symbolic identities": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + s * kron(pt.eye(A.shape[0]), pt.eye(B.shape[0]))
    ),
}
# These need A and B positive definite, and static sizes that show that A and C agree
OF_PRODUCTS = {
    "increment": lambda kron, A, B, C, D, E, s: kron(A, B)[pt.arange(N), pt.arange(N)].inc(
        s / pt.sqr(pt.ones(N))
    ),
    "noise for each level": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + kron(positive_definite(pt.diag(s * np.arange(1.0, 4.0))), pt.eye(5))
    ),
    "kron + kron": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + kron(positive_definite(C), positive_definite(D))
    ),
    "scaled kron + kron": lambda kron, A, B, C, D, E, s: (
        s * kron(A, B) / 3 + 0.5 * kron(2 * positive_definite(C), s**2 * positive_definite(D))
    ),
    "kron + metric of one axis": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + s * kron(positive_definite(C), np.eye(5))
    ),
    "one factor": lambda kron, A, B, C, D, E, s: kron(A, pt.eye(5)) + s * pt.eye(N),
    "one axis shared": lambda kron, A, B, C, D, E, s: kron(A, B) + s * kron(A, np.eye(5)),
    "one axis shared, other metric": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + s * kron(A, positive_definite(D))
    ),
    "Kronecker sum": lambda kron, A, B, C, D, E, s: kron(A, np.eye(5)) + kron(np.eye(3), B),
    "symbolic identities": lambda kron, A, B, C, D, E, s: (
        kron(A, pt.eye(B.shape[0])) + kron(pt.eye(A.shape[0]), B)
    ),
    "Kronecker sum with noise": lambda kron, A, B, C, D, E, s: (
        s * kron(A, np.eye(5)) + kron(np.eye(3), B) + 0.3 * pt.eye(N)
    ),
    "three terms": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + 0.7 * kron(A, np.eye(5)) + s * np.eye(N)
    ),
    "four terms": lambda kron, A, B, C, D, E, s: (
        kron(A, B) + s * kron(A, np.eye(5)) + 0.5 * kron(np.eye(3), B) + s * pt.eye(N)
    ),
    "three factors": lambda kron, A, B, C, D, E, s: (
        kron(A, kron(B, E)) + kron(positive_definite(C), kron(s * np.eye(5), E))
    ),
}
SUMS = WITH_NOISE | OF_PRODUCTS

solve_pos = partial(pt.linalg.solve, assume_a="pos")


def whitened(M, x):
    return pt.linalg.solve_triangular(pt.linalg.cholesky(M), x, lower=True)


def solved_twice(M, x, **kwargs):
    L = pt.linalg.cholesky(M)
    w = pt.linalg.solve_triangular(L, x, lower=True, **kwargs)
    return pt.linalg.solve_triangular(L.mT, w, lower=False, **kwargs)


def solved_twice_with_trans(M, x):
    L = pt.linalg.cholesky(M)
    w = pt.linalg.solve_triangular(L, x, lower=True)
    return pt.linalg.solve_triangular(L, w, lower=True, trans=1)


def solved_twice_upper(M, x):
    R = pt.linalg.cholesky(M, lower=False)
    w = pt.linalg.solve_triangular(R.mT, x, lower=True)
    return pt.linalg.solve_triangular(R, w, lower=False)


def np_solve_vectors(M, x):
    return np.linalg.solve(M, x[..., None])[..., 0]


def np_form(M, x):
    return (x * np_solve_vectors(M, x)).sum(-1)


def np_logdet(M, x):
    return np.linalg.slogdet(M)[1]


# name -> (symbolic, NumPy), of M and a vector x
VECTOR_USES = {
    "solve pos": (solve_pos, np_solve_vectors),
    "solve sym": (lambda M, x: pt.linalg.solve(M, x, assume_a="sym"), np_solve_vectors),
    "solve her": (lambda M, x: pt.linalg.solve(M, x, assume_a="her"), np_solve_vectors),
    "cho_solve": (
        lambda M, x: pt.linalg.cho_solve((pt.linalg.cholesky(M), True), x),
        np_solve_vectors,
    ),
    "cho_solve upper": (
        lambda M, x: pt.linalg.cho_solve((pt.linalg.cholesky(M, lower=False), False), x),
        np_solve_vectors,
    ),
    "solve_triangular twice": (solved_twice, np_solve_vectors),
    "solve_triangular with trans": (solved_twice_with_trans, np_solve_vectors),
    "solve_triangular twice, upper": (solved_twice_upper, np_solve_vectors),
    "x @ solve pos": (lambda M, x: x @ solve_pos(M, x), np_form),
    "sum(x * solve sym)": (
        lambda M, x: (x * pt.linalg.solve(M, x, assume_a="sym")).sum(),
        np_form,
    ),
    "x.T @ cho_solve": (
        lambda M, x: x @ pt.linalg.cho_solve((pt.linalg.cholesky(M), True), x),
        np_form,
    ),
    "whitened norm": (lambda M, x: (whitened(M, x) ** 2).sum(), np_form),
    "whitened norm, sqr": (lambda M, x: pt.sqr(whitened(M, x)).sum(-1), np_form),
    "whitened norm, dot": (lambda M, x: whitened(M, x) @ whitened(M, x), np_form),
    "whitened norm, log-density": (
        lambda M, x: -0.5 * (whitened(M, x) ** 2).sum(),
        lambda M, x: -0.5 * np_form(M, x),
    ),
    "log(diag(chol))": (
        lambda M, x: pt.log(pt.diagonal(pt.linalg.cholesky(M))).sum() * 2,
        np_logdet,
    ),
    "log(diag(upper chol))": (
        lambda M, x: 2 * pt.sum(pt.log(pt.diag(pt.linalg.cholesky(M, lower=False)))),
        np_logdet,
    ),
}
# These promise nothing: the factors must be known to be symmetric
FACT_USES = {
    "solve gen": (pt.linalg.solve, np_solve_vectors),
    "inv @ x": (lambda M, x: pt.linalg.inv(M) @ x, np_solve_vectors),
    "x @ inv": (lambda M, x: x @ pt.linalg.inv(M), np_solve_vectors),
    "x @ inv @ x": (lambda M, x: x @ pt.linalg.inv(M) @ x, np_form),
    "slogdet": (lambda M, x: pt.linalg.slogdet(M)[1], np_logdet),
    "log(abs(det))": (lambda M, x: pt.log(pt.abs(pt.linalg.det(M))), np_logdet),
    "log(det)": (lambda M, x: pt.log(pt.linalg.det(M)), np_logdet),
    "sign": (lambda M, x: pt.linalg.slogdet(M)[0], lambda M, x: np.linalg.slogdet(M)[0]),
    "det": (lambda M, x: pt.linalg.det(M), lambda M, x: np.linalg.det(M)),
}
USES = VECTOR_USES | FACT_USES


def assumed_symmetric(variables):
    return [
        assume(variable, symmetric=True) if variable.type.ndim == 2 else variable
        for variable in variables
    ]


def dense_value(build, variables, arrays):
    M = build(symbolic_dense_kron, *variables)
    return compile_py(variables, M, mode=AS_WRITTEN)(*arrays)


@pytest.mark.parametrize("use", USES)
def test_uses_of_a_product_with_noise(use):
    symbolic, numeric = USES[use]
    variables, arrays = symbols(), arrays_of(definite=False)
    x = np.random.default_rng(2).normal(size=N)
    x_var = pt.dvector("x")
    known = assumed_symmetric(variables) if use in FACT_USES else variables
    out = symbolic(WITH_NOISE["eye(K.shape[0])"](pt.linalg.kron, *known), x_var)
    inputs, values = [*variables, x_var], [*arrays, x]
    function = compile_py(inputs, out)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, Solve) == 0
    assert count_ops(function.maker.fgraph, Cholesky) == 0
    M = dense_value(WITH_NOISE["eye(int)"], variables, arrays)
    assert np.linalg.eigvalsh(dense_kron(*arrays[:2])).min() < 0 < np.linalg.eigvalsh(M).min()
    assert_allclose(function(*values), numeric(M, x), rtol=1e-10, atol=1e-12)
    assert largest_size_in(function, *values) < N * N


FORMS = {
    "solve": lambda M, x: x @ solve_pos(M, x),
    "in a log-density": lambda M, x: -((x * solve_pos(M, x)).sum() + pt.linalg.slogdet(M)[1]) / 2,
    "whitened": lambda M, x: (
        pt.linalg.solve_triangular(pt.linalg.cholesky(M), x, lower=True) ** 2
    ).sum(),
}


@pytest.mark.parametrize("form", FORMS)
def test_quadratic_forms_are_rotated_once(form):
    variables, x = symbols(), pt.dvector("x")
    M = WITH_NOISE["eye(int)"](pt.linalg.kron, *variables)
    with listening() as entries:
        compile_py([*variables, x], FORMS[form](M, x))
    # And not back, as a solution is
    fired = {entry.rewrite for entry in entries if entry.refusal is None}
    assert "whitened_norm_of_kron_sum" in fired
    assert "solve_of_kron_sum" not in fired


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    build = SUMS[name]
    variables = symbols(static=name in OF_PRODUCTS)
    arrays = arrays_of(definite=name in OF_PRODUCTS)
    M = dense_value(build, variables, arrays)
    rng = np.random.default_rng(2)
    values = {
        pt.dvector("x"): rng.normal(size=len(M)),
        pt.dmatrix("X"): rng.normal(size=(len(M), 4)),
    }
    x, X = values
    M_var = build(pt.linalg.kron, *variables)
    outputs = {
        "form": x @ solve_pos(M_var, x),
        "matrix": solved_twice(M_var, X),
        "logdet": pt.linalg.slogdet(M_var)[1],
        "log diagonal": pt.log(pt.diag(pt.linalg.cholesky(M_var))).sum(),
    }
    inputs = [*variables, *values]
    function = compile_py(inputs, list(outputs.values()))
    assert not has_kron(function.maker.fgraph)
    x, X = values.values()
    logdet = np_logdet(M, None)
    expected = {
        "form": np_form(M, x),
        "matrix": np.linalg.solve(M, X),
        "logdet": logdet,
        "log diagonal": logdet / 2,
    }
    arguments = [*arrays, *values.values()]
    for key, result in zip(outputs, function(*arguments), strict=True):
        assert_allclose(result, expected[key], rtol=1e-9, atol=1e-11, err_msg=key)
    assert largest_size_in(function, *arguments) < len(M) ** 2


RIGHT_HAND_SIDES = {
    "vector": ((N,), 1),
    "stack of vectors": ((7, N), 1),
    "stack of stacks": ((2, 7, N), 1),
    "matrix": ((N, 4), 2),
    "column": ((N, 1), 2),
    "batch of matrices": ((2, N, 3), 2),
}
SOLVES = {
    "pos": lambda M, b, b_ndim: pt.linalg.solve(M, b, assume_a="pos", b_ndim=b_ndim),
    "cho_solve": lambda M, b, b_ndim: pt.linalg.cho_solve(
        (pt.linalg.cholesky(M), True), b, b_ndim=b_ndim
    ),
    "triangular": lambda M, b, b_ndim: solved_twice(M, b, b_ndim=b_ndim),
}


@pytest.mark.parametrize("rhs", RIGHT_HAND_SIDES)
@pytest.mark.parametrize("solve", SOLVES)
def test_right_hand_sides(solve, rhs):
    shape, b_ndim = RIGHT_HAND_SIDES[rhs]
    variables, arrays = symbols(), arrays_of(definite=False)
    b, b_var = np.random.default_rng(2).normal(size=shape), pt.tensor("b", shape=shape)
    M = dense_value(WITH_NOISE["eye(int)"], variables, arrays)
    solution = SOLVES[solve](WITH_NOISE["eye(int)"](pt.linalg.kron, *variables), b_var, b_ndim)
    function = compile_py([*variables, b_var], solution)
    assert not has_kron(function.maker.fgraph)
    result = function(*arrays, b)
    expected = np_solve_vectors(M, b) if b_ndim == 1 else np.linalg.solve(M, b)
    assert_allclose(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axis", [-1, (0, 1), None])
@pytest.mark.parametrize("form", ["solve", "whitened"])
def test_forms_of_a_stack_of_vectors(form, axis):
    variables, arrays = symbols(), arrays_of(definite=False)
    x, x_var = np.random.default_rng(2).normal(size=(4, N)), pt.tensor("x", shape=(4, N))
    M_var = WITH_NOISE["eye(int)"](pt.linalg.kron, *variables)
    if form == "solve":
        out = (x_var * pt.linalg.solve(M_var, x_var, assume_a="pos", b_ndim=1)).sum(axis=axis)
    else:
        L = pt.linalg.cholesky(M_var)
        out = (pt.linalg.solve_triangular(L, x_var, lower=True, b_ndim=1) ** 2).sum(axis=axis)
    function = compile_py([*variables, x_var], out)
    assert not has_kron(function.maker.fgraph)
    M = dense_value(WITH_NOISE["eye(int)"], variables, arrays)
    expected = np_form(M, x)
    assert_allclose(function(*arrays, x), expected if axis == -1 else expected.sum(), rtol=1e-10)


@pytest.mark.parametrize("batches", [((2,), (2,)), ((2,), ()), ((), (2,)), ((3, 1), (2,))], ids=str)
def test_batched_factors_and_noise(batches):
    rng = np.random.default_rng(3)
    arrays = [random_symmetric(rng, n, b) for n, b in zip((3, 5), batches, strict=True)]
    A, B = (pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays))
    s, x = np.array([20.0, 22.0]), rng.normal(size=(2, N))
    s_var, x_var = pt.tensor("s", shape=(2,)), pt.tensor("x", shape=(2, N))
    M_var = batched_kron(A, B) + s_var[:, None, None] * pt.eye(N)
    M = dense_kron(*arrays) + s[:, None, None] * np.eye(N)
    solution = pt.linalg.solve(M_var, x_var, assume_a="pos", b_ndim=1)
    outputs = [
        solution,
        (x_var * pt.linalg.solve(M_var, x_var, assume_a="pos", b_ndim=1)).sum(-1),
        pt.linalg.slogdet(M_var)[1],
    ]
    function = compile_py([A, B, s_var, x_var], outputs)
    assert not has_kron(function.maker.fgraph)
    results = function(*arrays, s, x)
    expected = [np_solve_vectors(M, np.broadcast_to(x, M.shape[:-1])), np_form(M, x)]
    for result, value in zip(results, [*expected, np_logdet(M, x)], strict=True):
        assert_allclose(result, value, rtol=1e-10)


def test_the_inverse_itself():
    variables, arrays = symbols(), arrays_of(definite=False)
    known = assumed_symmetric(variables)
    inverse = pt.linalg.inv(WITH_NOISE["eye(int)"](pt.linalg.kron, *known))
    M = dense_value(WITH_NOISE["eye(int)"], variables, arrays)
    function = compile_py(variables, inverse)
    assert count_ops(function.maker.fgraph, Eigh) == 2
    assert_allclose(function(*arrays), np.linalg.inv(M), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_is_kept(dtype):
    arrays = [array.astype(dtype) for array in arrays_of(definite=True)[:2]]
    A, B = (pt.tensor(name, dtype=dtype, shape=(None, None)) for name in "AB")
    s, x = pt.scalar("s", dtype=dtype), pt.vector("x", dtype=dtype)
    M = pt.linalg.kron(A, B) + s * pt.eye(N, dtype=dtype)
    outputs = [solve_pos(M, x), x @ solve_pos(M, x), pt.linalg.slogdet(M)[1]]
    outputs.append((whitened(M, x) ** 2).sum())
    function = compile_py([A, B, s, x], outputs)
    assert not has_kron(function.maker.fgraph)
    value = np.linspace(-1, 1, N).astype(dtype)
    results = function(*arrays, np.array(0.5, dtype), value)
    assert [result.dtype for result in results] == [out.type.dtype for out in outputs]
    assert {result.dtype for result in results} == {np.dtype(dtype)}
    dense = dense_kron(*arrays).astype("float64") + 0.5 * np.eye(N)
    expected = [np.linalg.solve(dense, value), np_form(dense, value), np_logdet(dense, None)]
    for result, number in zip(results, [*expected, expected[1]], strict=True):
        assert_allclose(result, number, rtol=RTOL[dtype], atol=RTOL[dtype])


def test_integer_factors():
    A, B = (pt.tensor(name, dtype="int64", shape=(None, None)) for name in "AB")
    x = pt.dvector("x")
    M = pt.linalg.kron(A, B) + 0.5 * pt.eye(6)
    function = compile_py([A, B, x], solve_pos(M, x))
    assert not has_kron(function.maker.fgraph)
    a, b = np.array([[2, 1], [1, 3]]), np.array([[2, -1, 0], [-1, 2, -1], [0, -1, 2]])
    dense = np.kron(a, b) + 0.5 * np.eye(6)
    assert_allclose(function(a, b, np.arange(6.0)), np.linalg.solve(dense, np.arange(6.0)))


# Gradients


def log_density(kron, build, variables, x):
    M = build(kron, *variables)
    logdet = pt.linalg.slogdet(M)[1]
    # A solution besides the form, so that the gradient of each of the operations is in it
    return -0.5 * x @ solve_pos(M, x) - 0.5 * logdet + (pt.cos(x) * solve_pos(M, pt.sin(x))).sum()


def symmetrised(gradient):
    return gradient + gradient.T if gradient.ndim == 2 else gradient


def assert_gradients_agree(gradients, expected, rtol):
    for gradient, value in zip(gradients, expected, strict=True):
        scale = max(np.abs(symmetrised(value)).max(), 1e-12)
        assert_allclose(symmetrised(gradient), symmetrised(value), rtol=0, atol=rtol * scale)


def gradient_functions(build, variables, x, when):
    """Return the compiled gradient, and that of the dense graph."""
    wrt = [*variables, x]
    dense = log_density(symbolic_dense_kron, build, variables, x)
    value = log_density(pt.linalg.kron, build, variables, x)
    if when == "after":
        value = rewrite_pregrad(value)
    outputs = pt.grad(value, wrt, disconnected_inputs="ignore")
    expected = pt.grad(dense, wrt, disconnected_inputs="ignore")
    return compile_py(wrt, outputs), compile_py(wrt, expected, mode=AS_WRITTEN)


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "name",
    [
        "diag(full)",
        "diag of a function",
        "increment",
        "noise for each level",
        "jitter and noise",
        "multiple of the sum",
        "nested to the left",
        "scaled kron + kron",
        "one factor",
        "one axis shared, other metric",
        "Kronecker sum with noise",
        "four terms",
        "three factors",
    ],
)
def test_gradients(name, when):
    variables = symbols(static=name in OF_PRODUCTS)
    arrays = arrays_of(definite=name in OF_PRODUCTS)
    n = len(dense_value(SUMS[name], variables, arrays))
    x_var, x = pt.tensor("x", shape=(n,)), np.random.default_rng(2).normal(size=n)
    function, dense = gradient_functions(SUMS[name], variables, x_var, when)
    assert not has_kron(function.maker.fgraph)
    values = [*arrays, x]
    assert_gradients_agree(function(*values), dense(*values), 1e-9)
    if when == "before":
        assert largest_size_in(function, *values) < n * n


DEGENERATE = {
    "identity": lambda n: np.eye(n),
    "compound symmetry": lambda n: 0.6 * np.eye(n) + 0.4,
    "repeated eigenvalues": lambda n: np.diag([2.0] * (n - 1) + [0.5]),
    "rank deficient": lambda n: np.outer(np.arange(1.0, n + 1), np.arange(1.0, n + 1)) / n,
    "zero": lambda n: np.zeros((n, n)),
}


@pytest.fixture(scope="module", params=["before", "after"])
def compiled_gradient(request):
    variables, x = symbols(), pt.tensor("x", shape=(N,))
    return gradient_functions(WITH_NOISE["eye(int)"], variables, x, request.param)


@pytest.mark.parametrize("second", ["identity", "rank deficient", "general"])
@pytest.mark.parametrize("first", DEGENERATE)
def test_gradients_hold_no_derivatives_of_eigenvectors(first, second, compiled_gradient):
    function, dense = compiled_gradient
    arrays = arrays_of(definite=True)
    arrays[0] = DEGENERATE[first](3)
    if second != "general":
        arrays[1] = DEGENERATE[second](5)
    x = np.random.default_rng(2).normal(size=N)
    gradients = function(*arrays, x)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert_gradients_agree(gradients, dense(*arrays, x), 1e-10)

    def value_of(i, array):
        A, B, *_, s = (array if j == i else other for j, other in enumerate(arrays))
        M = np.kron(A, B) + s * np.eye(N)
        solution = np.linalg.solve(M, np.stack([x, np.sin(x)], axis=1))
        form = -0.5 * x @ solution[:, 0] + np.cos(x) @ solution[:, 1]
        return form - 0.5 * np.linalg.slogdet(M)[1]

    for i in (0, 1, 5):
        expected = finite_differences(partial(value_of, i), arrays[i])
        assert_gradients_agree([gradients[i]], [expected], 1e-6)


@pytest.mark.parametrize("first", ["identity", "compound symmetry", "rank deficient"])
def test_gradients_of_a_sum_of_products_at_degenerate_factors(first):
    variables = symbols(static=True)
    arrays = arrays_of(definite=True)
    arrays[0] = DEGENERATE[first](3)
    # The pair (A, C) has repeated generalised eigenvalues too
    arrays[2] = 2 * np.eye(3) if first == "identity" else arrays[2]
    x_var, x = pt.tensor("x", shape=(N,)), np.random.default_rng(2).normal(size=N)
    build = OF_PRODUCTS["scaled kron + kron"]
    function, dense = gradient_functions(build, variables, x_var, "before")
    assert_gradients_agree(function(*arrays, x), dense(*arrays, x), 1e-10)


# What is refused


def refusals_of(inputs, outputs):
    """Compile and return the function with the refusals in the journal."""
    with listening() as entries:
        function = compile_py(inputs, outputs)
    assert has_kron(function.maker.fgraph)
    return function, [entry for entry in entries if entry.refusal is not None]


def reasons_of(entries):
    return {entry.refusal.reason for entry in entries}


def refused_sums():
    A, B, C, D, _, s = symbols(static=True)
    d, W = pt.dvector("d"), pt.dmatrix("W")
    kron = pt.linalg.kron
    K = kron(A, B)
    not_identity = (
        "the diagonal matrix that is added to it isn't known to be a multiple of the identity"
    )
    no_product = "a matrix that is no Kronecker product is added to it"
    definite = [positive_definite(matrix) for matrix in (C, D)]
    return {
        "diagonal noise": (K + pt.diag(d), not_identity),
        "diagonal noise, constant": (K + np.diag(np.arange(1.0, 16.0)), not_identity),
        "scaled diagonal noise": (K + s * pt.diag(pt.exp(d)), not_identity),
        "of constants and others": (K + pt.diag(pt.ones(N) / pt.exp(d)), not_identity),
        "joined": (K + pt.diag(pt.concatenate([pt.full(7, s), pt.full(8, 2 * s)])), not_identity),
        "dense": (K + W, no_product),
        "dense constant": (K + np.full((15, 15), 0.01), no_product),
        "dense and noise": (K + W + s * pt.eye(N), no_product),
        "a number": (K + s, no_product),
        "a vector": (K + d, no_product),
        "low rank": (K + pt.outer(d, d), no_product),
        "off-diagonal": (K + s * pt.eye(N, k=1), no_product),
        "three matrices": (
            K + kron(*definite) + s * pt.eye(N),
            "factor 1 differs between 3 terms, and one basis diagonalises two matrices",
        ),
        "three matrices on the second axis": (
            kron(A, B) + kron(A, positive_definite(D)) + s * kron(A, pt.eye(5)),
            "factor 2 differs between 3 terms, and one basis diagonalises two matrices",
        ),
        "not known to be positive definite": (
            K + kron(C, D),
            "of the two matrices for factor 1, none is known to be positive definite",
        ),
        "one isn't known to be positive definite": (
            K + kron(positive_definite(C), D),
            "of the two matrices for factor 2, none is known to be positive definite",
        ),
        "another number of factors": (
            K + kron(kron(positive_definite(C), pt.eye(1)), positive_definite(D)),
            "one product has 2 factors and the other one 3",
        ),
    }


@pytest.mark.parametrize("name", refused_sums())
def test_refusals(name):
    M, reason = refused_sums()[name]
    x = pt.dvector("x")
    inputs = list(explicit_graph_inputs([M, x]))
    outputs = [
        x @ solve_pos(M, x),
        solve_pos(M, x + 1),
        pt.linalg.slogdet(M)[1],
        pt.log(pt.diagonal(pt.linalg.cholesky(M))).sum(),
    ]
    _, entries = refusals_of(inputs, outputs)
    of_sums = [entry for entry in entries if "kron_sum" in entry.rewrite]
    assert {entry.refusal.reason for entry in of_sums} == {reason}
    assert {entry.rewrite for entry in of_sums} == {
        "whitened_norm_of_kron_sum",
        "solve_of_kron_sum",
        "det_of_kron_sum",
        "logdet_of_kron_sum_cholesky",
    }


def test_what_to_write_instead_of_a_diagonal_matrix():
    M, reason = refused_sums()["diagonal noise"]
    x = pt.dvector("x")
    _, entries = refusals_of([*explicit_graph_inputs([M, x])], solve_pos(M, x))
    [advice] = {entry.refusal.advice for entry in entries if entry.refusal.reason == reason}
    assert "sigma**2 * pt.eye(N)" in advice
    assert "Kronecker product of diagonal matrices" in advice


def test_a_long_chain_of_shared_operations():
    """Each operation is looked at once, and not once for each way that leads to it."""
    A, B, *_, s = variables = symbols()
    v = s * pt.ones(N)
    for _ in range(40):
        v = v * (2 - v)
    x = pt.dvector("x")
    function = compile_py([*variables, x], solve_pos(pt.linalg.kron(A, B) + pt.diag(v), x))
    assert not has_kron(function.maker.fgraph)


def test_a_batch_of_constant_vectors_is_no_scalar():
    arrays = arrays_of(definite=True)
    A, B, s, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("s"), pt.dvector("x")
    noise = pt.vectorize(pt.diag, "(n)->(n,n)")(pt.full((4, N), s))
    solutions = pt.linalg.solve(pt.linalg.kron(A, B) + noise, x, assume_a="pos", b_ndim=1)
    function = compile_py([A, B, s, x], solutions)
    M = dense_kron(*arrays[:2]) + 0.7 * np.eye(N)
    expected = np.linalg.solve(M, np.arange(15.0))
    result = function(*arrays[:2], 0.7, np.arange(15.0))
    assert_allclose(result, np.tile(expected, (4, 1)), rtol=1e-10)


def test_refuses_sizes_that_are_not_known_to_agree():
    rng = np.random.default_rng(3)
    # A product of 2 x 2 and 6 x 6, and one of 3 x 3 and 4 x 4
    arrays = [random_spd(rng, n) for n in (2, 6, 3, 4)]
    A, B, C, D = inputs = [pt.dmatrix(name) for name in "ABCD"]
    x_var, x = pt.dvector("x"), rng.normal(size=12)
    M = pt.linalg.kron(A, B) + pt.linalg.kron(positive_definite(C), positive_definite(D))
    function, refusals = refusals_of([*inputs, x_var], solve_pos(M, x_var))
    assert any("aren't known to agree" in reason for reason in reasons_of(refusals))
    dense = np.kron(*arrays[:2]) + np.kron(*arrays[2:])
    assert_allclose(function(*arrays, x), np.linalg.solve(dense, x), rtol=1e-10)


@pytest.mark.parametrize("use", FACT_USES)
def test_factors_that_may_not_be_symmetric_stay_dense(use):
    rng = np.random.default_rng(3)
    arrays = [random_matrix(rng, 3, 3), random_matrix(rng, 4, 4), np.array(1.3)]
    A, B, s, x_var = inputs = [pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("s"), pt.dvector("x")]
    symbolic, numeric = FACT_USES[use]
    out = symbolic(pt.linalg.kron(A, B) + s * pt.eye(12), x_var)
    function, refusals = refusals_of(inputs, out)
    assert "factor 1 isn't known to be symmetric" in reasons_of(refusals)
    dense, x = np.kron(*arrays[:2]) + 1.3 * np.eye(12), rng.normal(size=12)
    if use == "x @ inv":
        dense = dense.T
    assert_allclose(function(*arrays, x), numeric(dense, x), rtol=1e-10)


def test_one_symmetric_factor_is_not_enough():
    A, B, s, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("s"), pt.dvector("x")
    M = pt.linalg.kron(assume(A, symmetric=True), B) + s * pt.eye(12)
    _, refusals = refusals_of([A, B, s, x], pt.linalg.solve(M, x))
    assert "factor 2 isn't known to be symmetric" in reasons_of(refusals)


# What NumPy says of NaN in a matrix product depends on the machine
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("promise", ["pos", "sym", "cholesky"])
def test_a_sum_that_is_not_symmetric_as_promised(promise):
    # Skew-symmetric factors: their product is symmetric, and eigh of one of them isn't right
    rng = np.random.default_rng(3)
    arrays = [matrix - matrix.T for matrix in (rng.normal(size=(4, 4)), rng.normal(size=(6, 6)))]
    A, B, s, x_var = inputs = [pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("s"), pt.dvector("x")]
    M = pt.linalg.kron(A, B) + s * pt.eye(24)
    if promise == "cholesky":
        outputs = [pt.linalg.cho_solve((pt.linalg.cholesky(M), True), x_var)]
    else:
        solution = pt.linalg.solve(M, x_var, assume_a=promise)
        outputs = [solution, x_var @ solution, pt.linalg.slogdet(M)[1]]
    function = compile_py(inputs, outputs)
    assert not has_kron(function.maker.fgraph)
    results = function(*arrays, np.array(50.0), rng.normal(size=24))
    assert all(np.isnan(result).all() for result in results)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factors_that_are_not_finite(bad):
    """A sampler that has strayed off is told NaN. LAPACK alone may never return."""
    A, B, s, x_var = inputs = [pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("s"), pt.dvector("x")]
    M = pt.linalg.kron(A, B) + s * pt.eye(N)
    function = compile_py(inputs, [solve_pos(M, x_var), pt.linalg.slogdet(M)[1]])
    assert not has_kron(function.maker.fgraph)
    a = random_spd(np.random.default_rng(3), 3)
    a[1, 1] = bad
    for result in function(a, np.eye(5), np.array(1.0), np.ones(N)):
        assert np.isnan(result).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_not_positive_definite_fails_like_a_cholesky_solve():
    """`assume_a="pos"` of what isn't: NaN, and not the solution."""
    variables, arrays = symbols(), arrays_of(definite=False)
    arrays[-1] = np.array(-0.1)
    x = pt.dvector("x")
    M = WITH_NOISE["eye(int)"](pt.linalg.kron, *variables)
    outputs = [
        pt.log(pt.diagonal(pt.linalg.cholesky(M))).sum(),
        (whitened(M, x) ** 2).sum(),
        solve_pos(M, x),
        x @ solve_pos(M, x),
        solved_twice(M, x),
    ]
    inputs, values = [*variables, x], [*arrays, np.ones(N)]
    function, dense = compile_py(inputs, outputs), compile_py(inputs, outputs, mode=WITHOUT_KRON)
    for compiled in (dense, function):
        assert [np.isnan(result).all() for result in compiled(*values)] == [True] * 5


def test_an_upper_factor_does_not_whiten():
    """With R' R = M, |inv(R) x|^2 is not x' inv(M) x, and inv(R') inv(R) isn't inv(M)."""
    variables, arrays = symbols(), arrays_of(definite=True)
    x = pt.dvector("x")
    R = pt.linalg.cholesky(WITH_NOISE["eye(int)"](pt.linalg.kron, *variables), lower=False)
    w = pt.linalg.solve_triangular(R, x, lower=False)
    outputs = [(w**2).sum(), pt.linalg.solve_triangular(R.mT, w, lower=True)]
    function = compile_py([*variables, x], outputs)
    assert has_kron(function.maker.fgraph)
    M = np.kron(*arrays[:2]) + arrays[-1] * np.eye(N)
    L = np.linalg.cholesky(M)
    norm, solution = function(*arrays, np.ones(N))
    assert_allclose(solution, np.linalg.solve(L.T @ L, np.ones(N)), rtol=1e-10)
    assert_allclose(norm, solution.sum(), rtol=1e-10)


def test_refuses_complex_factors():
    A, B, x = pt.zmatrix("A"), pt.zmatrix("B"), pt.zvector("x")
    M = pt.linalg.kron(A, B) + pt.eye(12)
    _, refusals = refusals_of([A, B, x], pt.linalg.solve(M, x, assume_a="her"))
    assert "the product is of dtype complex128" in reasons_of(refusals)


def test_refuses_factors_that_are_not_square():
    A, B, x = pt.tensor("A", shape=(3, 2)), pt.tensor("B", shape=(2, 3)), pt.dvector("x")
    M = pt.linalg.kron(A, B) + pt.eye(6)
    _, refusals = refusals_of([A, B, x], solve_pos(M, x))
    assert "factor 1 is 3 x 2" in reasons_of(refusals)


def test_an_empty_right_hand_side_is_left_alone():
    A, B = pt.tensor("A", shape=(0, 0)), pt.tensor("B", shape=(3, 3))
    x = pt.tensor("x", shape=(0,))
    M = pt.linalg.kron(A, B) + pt.eye(0)
    function = compile_py([A, B, x], solve_pos(M, x))
    assert function(np.empty((0, 0)), np.eye(3), np.empty(0)).shape == (0,)


# Promises


def test_the_promise_of_one_use_holds_for_the_others():
    variables, arrays = symbols(), arrays_of(definite=False)
    A, B, *_, s = variables
    x = pt.dvector("x")
    # Written twice: the two are merged before anything is asked of them
    first, second = (pt.linalg.kron(A, B) + s * pt.eye(N) for _ in range(2))
    values = [*arrays, np.ones(N)]
    M = np.kron(*arrays[:2]) + arrays[-1] * np.eye(N)
    outputs = [x @ solve_pos(first, x), pt.linalg.slogdet(second)[1]]
    function = compile_py([*variables, x], outputs)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, Eigh) == 2
    assert_allclose(function(*values)[1], np_logdet(M, None), rtol=1e-10)

    alone = compile_py([*variables, x], outputs[1])
    assert has_kron(alone.maker.fgraph)
    assert_allclose(alone(*values), np_logdet(M, None), rtol=1e-10)

    A, B = assumed_symmetric([A, B])
    known = pt.linalg.slogdet(pt.linalg.kron(A, B) + s * pt.eye(N))[1]
    function = compile_py(variables, known)
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays), np_logdet(M, None), rtol=1e-10)


@pytest.mark.parametrize("use", ["right-hand side", "matrix to factorise", "mean"])
def test_a_call_promises_nothing_of_its_other_arguments(use):
    # A transition matrix, which is not symmetric, and the covariance of what is added
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=(3, 3)) / 9, rng.normal(size=(5, 5)), random_spd(rng, N)]
    A, B, C = inputs = [
        pt.matrix(letter, shape=(n, n)) for letter, n in zip("ABC", (3, 5, N), strict=True)
    ]
    F = pt.linalg.kron(A, B) + pt.eye(N)
    match use:
        case "right-hand side":
            other = F.T @ pt.linalg.solve(C, F, assume_a="pos")
        case "matrix to factorise":
            other = pt.linalg.cho_solve((pt.linalg.cholesky(C), True), F)
        case "mean":
            rng_var = pt.random.shared_rng(rng)
            _, other = pt.random.multivariate_normal(F, C, rng=rng_var, return_next_rng=True)
    function = compile_py(inputs, [pt.linalg.slogdet(F)[1], other])
    f, c = np.kron(*arrays[:2]) + np.eye(N), arrays[2]
    logdet, result = function(*arrays)
    assert_allclose(logdet, np.linalg.slogdet(f)[1], rtol=1e-10)
    if use != "mean":
        expected = np.linalg.solve(c, f)
        assert_allclose(result, f.T @ expected if use == "right-hand side" else expected)


def test_a_promise_holds_for_its_own_graph_only():
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=(3, 3)) / 9, rng.normal(size=(5, 5))]
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    M = pt.linalg.kron(A, B) + pt.eye(N)
    # PyMC does this to the variables themselves
    rewrite_pregrad([solve_pos(M, x)])
    function = compile_py([A, B], pt.linalg.slogdet(M)[1])
    assert_allclose(function(*arrays), np.linalg.slogdet(np.kron(*arrays) + np.eye(N))[1])


def test_the_user_promises_with_a_tag():
    rng = np.random.default_rng(4)
    arrays = [random_spd(rng, 3), random_spd(rng, 5)]
    A, B = pt.dmatrix("A"), pt.dmatrix("B")
    M = pt.linalg.kron(A, B) + pt.eye(N)
    M.tag.symmetric = True
    function = compile_py([A, B], pt.linalg.slogdet(M)[1])
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*arrays), np.linalg.slogdet(np.kron(*arrays) + np.eye(N))[1])


def test_promises_are_pickled_with_a_graph():
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    M = pt.linalg.kron(A, B) + pt.eye(N)
    fgraph = compile_py([A, B, x], [solve_pos(M, x), pt.linalg.slogdet(M)[1]]).maker.fgraph
    assert not has_kron(pickle.loads(pickle.dumps(fgraph)))


def test_value_and_gradient_share_their_decompositions():
    variables, x = symbols(), pt.tensor("x", shape=(N,))
    M = WITH_NOISE["eye(int)"](pt.linalg.kron, *variables)
    value = -0.5 * x @ solve_pos(M, x) - 0.5 * pt.linalg.slogdet(M)[1]
    wrt = [variables[i] for i in (0, 1, 5)]
    function = compile_py([*variables, x], [value, *pt.grad(value, wrt)])
    assert count_ops(function.maker.fgraph, Eigh) == 2


def test_logdet_of_a_product_that_over_and_underflows():
    # det M is 1e-600 or so
    n = 30
    A = 1e-1 * np.eye(n)
    variables = A_var, B_var, s = pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("s")
    known = [assume(A_var, symmetric=True), assume(B_var, symmetric=True)]
    M = pt.linalg.kron(*known) + s * pt.eye(20 * n)
    function = compile_py(variables, [*pt.linalg.slogdet(M), pt.grad(pt.linalg.slogdet(M)[1], s)])
    sign, logdet = function(A, 1e-1 * np.eye(20), np.array(0.01))[:2]
    assert sign == 1
    assert_allclose(logdet, 20 * n * np.log(0.02))
