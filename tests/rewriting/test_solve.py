from functools import partial

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest
import scipy.linalg
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.linalg.solvers.psd import CholeskySolve
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular

from pymc_kron.rewriting import bundle_rewriter
from tests.helpers import (
    PY,
    RTOL,
    compile_py,
    count_ops,
    dense_kron,
    has_kron,
    random_matrix,
    random_spd,
    symbolic_matrices,
)

SIZES = [(3, 2), (2, 4, 3), (1, 3)]


def kron(*factors):
    """Nest to the right, and let the callers nest to the left."""
    *others, product = factors
    for factor in reversed(others):
        product = pt.linalg.kron(factor, product)
    return product


def right_hand_sides(rng, N, dtype="float64"):
    return {
        "vector": (rng.normal(size=N).astype(dtype), 1),
        "stack of vectors": (rng.normal(size=(3, N)).astype(dtype), 1),
        "matrix": (rng.normal(size=(N, 4)).astype(dtype), 2),
        "column": (rng.normal(size=(N, 1)).astype(dtype), 2),
        "batch of matrices": (rng.normal(size=(2, N, 3)).astype(dtype), 2),
    }


def dense_solve(K, b, b_ndim):
    return np.linalg.solve(K, b if b_ndim == 2 else b[..., None]).squeeze(-1 if b_ndim == 1 else ())


def check(solution, factors, arrays, b_var, b, expected, dtype="float64"):
    function = compile_py([*factors, b_var], solution)
    assert not has_kron(function.maker.fgraph)
    result = function(*arrays, b)
    assert result.dtype == solution.type.dtype
    assert_allclose(result, expected, rtol=RTOL[dtype], atol=RTOL[dtype])


@pytest.mark.parametrize("rhs", right_hand_sides(np.random.default_rng(), 1))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("assume_a", ["gen", "sym", "her", "pos"])
def test_solve(assume_a, sizes, rhs):
    rng = np.random.default_rng(3)
    make = random_matrix if assume_a == "gen" else lambda rng, n, _: random_spd(rng, n)
    arrays = [make(rng, n, n) for n in sizes]
    factors = symbolic_matrices(arrays)
    K = dense_kron(*arrays)
    b, b_ndim = right_hand_sides(rng, len(K))[rhs]
    b_var = pt.tensor("b", shape=(None,) * b.ndim)
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a=assume_a, b_ndim=b_ndim)
    check(solution, factors, arrays, b_var, b, dense_solve(K, b, b_ndim))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("assume_a", ["gen", "pos"])
def test_solve_keeps_the_dtype(assume_a, dtype):
    rng = np.random.default_rng(3)
    arrays = [random_spd(rng, n, dtype=dtype) for n in (3, 4)]
    factors = symbolic_matrices(arrays)
    b = rng.normal(size=12).astype(dtype)
    b_var = pt.vector("b", dtype=dtype)
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a=assume_a)
    assert solution.type.dtype == dtype
    check(solution, factors, arrays, b_var, b, np.linalg.solve(dense_kron(*arrays), b), dtype)


def test_diagonal_solve():
    arrays = [np.diag([2.0, 3.0]), np.diag([1.0, 4.0, 5.0])]
    factors = symbolic_matrices(arrays)
    b, b_var = np.arange(6.0), pt.dvector("b")
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a="diagonal")
    check(solution, factors, arrays, b_var, b, b / dense_kron(*arrays).diagonal())


@pytest.mark.parametrize("multiple", [lambda c, K: c * K, lambda c, K: -K / c], ids=["c K", "-K/c"])
@pytest.mark.parametrize("assume_a", ["gen", "pos"])
def test_scalar_multiples(assume_a, multiple):
    rng = np.random.default_rng(3)
    value = multiple(1, 1) * 2.5
    arrays = [np.sign(value) * random_spd(rng, 3), random_spd(rng, 4)]
    A, B = symbolic_matrices(arrays)
    c, b_var, b = pt.dscalar("c"), pt.dvector("b"), rng.normal(size=12)
    solution = pt.linalg.solve(multiple(c, pt.linalg.kron(A, B)), b_var, assume_a=assume_a)
    expected = np.linalg.solve(multiple(2.5, dense_kron(*arrays)), b)
    check(solution, [A, B, c], [*arrays, 2.5], b_var, b, expected)


@pytest.mark.parametrize("assume_a", ["tridiagonal", "banded"])
def test_solve_of_other_structures_is_general(assume_a):
    rng = np.random.default_rng(3)
    tridiagonal = np.diag([3.0, 4.0, 5.0]) + np.diag([1.0, 0.5], 1) + np.diag([0.3, 0.7], -1)
    arrays = [np.diag([2.0, 3.0]), tridiagonal]
    factors = symbolic_matrices(arrays)
    b, b_var = rng.normal(size=6), pt.dvector("b")
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a=assume_a)
    check(solution, factors, arrays, b_var, b, np.linalg.solve(dense_kron(*arrays), b))


def test_a_symmetric_product_of_skew_symmetric_factors():
    # The trap of "sym": neither factor is symmetric
    skew = np.array([[0.0, 2.0], [-2.0, 0.0]])
    other = np.array(
        [[0.0, 1.0, 0.0, 3.0], [-1.0, 0.0, 2.0, 0.0], [0.0, -2.0, 0.0, 1.0], [-3.0, 0.0, -1.0, 0.0]]
    )
    arrays = [skew, other]
    K = dense_kron(*arrays)
    assert_allclose(K, K.T)
    factors = symbolic_matrices(arrays)
    b, b_var = np.arange(8.0), pt.dvector("b")
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a="sym")
    check(solution, factors, arrays, b_var, b, np.linalg.solve(K, b))


@pytest.mark.parametrize("signs", [(-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
def test_positive_definite_product_of_negative_definite_factors(signs):
    rng = np.random.default_rng(3)
    arrays = [sign * random_spd(rng, n) for sign, n in zip(signs, (2, 4, 3), strict=True)]
    factors = symbolic_matrices(arrays)
    b, b_var = rng.normal(size=24), pt.dvector("b")
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a="pos")
    check(solution, factors, arrays, b_var, b, np.linalg.solve(dense_kron(*arrays), b))


def test_pos_stays_a_cholesky_solve_and_fails_like_one():
    rng = np.random.default_rng(3)
    arrays = [-random_spd(rng, 2), random_spd(rng, 3)]
    factors = symbolic_matrices(arrays)
    b_var = pt.dvector("b")
    solution = pt.linalg.solve(kron(*factors), b_var, assume_a="pos")
    function = compile_py([*factors, b_var], solution)
    assert count_ops(function.maker.fgraph, Solve) == 0
    # Not positive definite: NaN, as without the rewrite, rather than the solution
    dense = compile_py([*factors, b_var], solution, mode=PY.excluding("kron"))
    for compiled in (function, dense):
        assert np.isnan(compiled(*arrays, np.ones(6))).all()


def test_a_known_positive_definite_factor_gets_no_sign():
    A, B, b = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("b")
    known = assume(A, positive_definite=True)
    solution = pt.linalg.solve(pt.linalg.kron(known, B), b, assume_a="pos")
    function = compile_py([A, B, b], solution)
    assert not any("Sign" in str(node.op) for node in function.maker.fgraph.apply_nodes)


@pytest.mark.parametrize("rhs", right_hand_sides(np.random.default_rng(), 1))
@pytest.mark.parametrize("unit_diagonal", [False, True])
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("lower", [False, True])
def test_solve_triangular(lower, trans, unit_diagonal, rhs):
    rng = np.random.default_rng(3)
    triangle = np.tril if lower else np.triu
    arrays = [triangle(random_matrix(rng, n, n)) for n in (3, 2, 4)]
    if unit_diagonal:
        # All that a unit diagonal of the product says: diagonals c, 1 / c and 1
        for array, value in zip(arrays, (0.5, 2.0, 1.0), strict=True):
            np.fill_diagonal(array, value)
    factors = symbolic_matrices(arrays)
    K = dense_kron(*arrays)
    b, b_ndim = right_hand_sides(rng, len(K))[rhs]
    b_var = pt.tensor("b", shape=(None,) * b.ndim)
    solution = pt.linalg.solve_triangular(
        kron(*factors), b_var, lower=lower, trans=trans, unit_diagonal=unit_diagonal, b_ndim=b_ndim
    )
    expected = dense_solve(K.T if trans else K, b, b_ndim)
    check(solution, factors, arrays, b_var, b, expected)
    if b.ndim == 1:
        scipy_solution = scipy.linalg.solve_triangular(
            K, b, lower=lower, trans=trans, unit_diagonal=unit_diagonal
        )
        assert_allclose(expected, scipy_solution, rtol=1e-10)


@pytest.mark.parametrize("rhs", right_hand_sides(np.random.default_rng(), 1))
@pytest.mark.parametrize("lower", [False, True])
def test_cho_solve(lower, rhs):
    rng = np.random.default_rng(3)
    triangle = np.tril if lower else np.triu
    arrays = [triangle(random_matrix(rng, n, n)) for n in (3, 4)]
    factors = symbolic_matrices(arrays)
    C = dense_kron(*arrays)
    K = C @ C.T if lower else C.T @ C
    b, b_ndim = right_hand_sides(rng, len(K))[rhs]
    b_var = pt.tensor("b", shape=(None,) * b.ndim)
    solution = pt.linalg.cho_solve((kron(*factors), lower), b_var, b_ndim=b_ndim)
    check(solution, factors, arrays, b_var, b, dense_solve(K, b, b_ndim))


@pytest.mark.parametrize(
    ("factor_batches", "b_shape", "b_ndim"),
    [
        (((5,), (5,)), (12,), 1),
        (((5,), ()), (5, 12), 1),
        (((), (5,)), (7, 5, 12), 1),
        (((2, 1), (5,)), (5, 12), 1),
        (((2, 1), (5,)), (12,), 1),
        (((5,), (1,)), (12, 2), 2),
        (((5,), ()), (2, 5, 12, 3), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("assume_a", ["gen", "pos"])
def test_batches_broadcast(assume_a, factor_batches, b_shape, b_ndim):
    rng = np.random.default_rng(3)
    arrays = [
        random_spd(rng, n, batch=batch) for n, batch in zip((3, 4), factor_batches, strict=True)
    ]
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    b, b_var = rng.normal(size=b_shape), pt.tensor("b", shape=b_shape)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    solution = pt.linalg.solve(K, b_var, assume_a=assume_a, b_ndim=b_ndim)
    expected = dense_solve(dense_kron(*arrays), b, b_ndim)
    check(solution, factors, arrays, b_var, b, expected)


def test_a_stack_of_vectors_takes_one_solve():
    factors = [pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(4, 4))]
    b = pt.tensor("b", shape=(50, 12))
    solution = pt.linalg.solve(kron(*factors), b, assume_a="pos", b_ndim=1)
    function = compile_py([*factors, b], solution)
    solves = [node for node in function.maker.fgraph.apply_nodes if "Solve" in str(node.op)]
    assert [node.out.type.ndim for node in solves] == [2, 2]


def test_deep_nesting_and_transposes():
    rng = np.random.default_rng(3)
    arrays = [random_matrix(rng, n, n) for n in (2, 3, 1, 4)]
    A, B, C, D = factors = symbolic_matrices(arrays)
    K = pt.linalg.kron(pt.linalg.kron(A, B.T), pt.linalg.kron(C, D).T).T
    A_, B_, C_, D_ = arrays
    expected_K = dense_kron(A_.T, B_, C_, D_)
    b, b_var = rng.normal(size=24), pt.dvector("b")
    check(pt.linalg.solve(K, b_var), factors, arrays, b_var, b, np.linalg.solve(expected_K, b))


@pytest.mark.parametrize("linker", ["py", "numba", "jax"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batched_pos_solve_with_either_memory_order(order, linker):
    """The second entry of such a batch was reported wrong in PyTensor's pull request 1559."""
    rng = np.random.default_rng(3)
    arrays = [random_spd(rng, n, batch=(3,)) for n in (3, 4)]
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    b, b_var = rng.normal(size=(3, 12)), pt.tensor("b", shape=(3, 12))
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    solution = pt.linalg.solve(K, b_var, assume_a="pos", b_ndim=1)
    mode = PY if linker == "py" else linker.upper()
    function = pytensor.function([*factors, b_var], solution, mode=mode)
    in_order = partial(np.asarray, order=order)
    expected = dense_solve(dense_kron(*arrays), b, 1)
    assert_allclose(function(*map(in_order, arrays), in_order(b)), expected, rtol=1e-10)


@pytest.mark.parametrize("flag", ["overwrite_a", "overwrite_b"])
def test_overwrite_flags_do_not_reach_the_new_solves(flag):
    core_op = Solve(assume_a="gen", b_ndim=1, **{flag: True})
    inputs = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("b")
    solve = Blockwise(core_op, destroy_map=core_op.destroy_map)
    fgraph = FunctionGraph(inputs, [solve(kron(*inputs[:2]), inputs[2])], clone=False)
    bundle_rewriter().rewrite(fgraph)
    assert not has_kron(fgraph)
    assert not any(node.op.destroy_map for node in fgraph.apply_nodes)


def test_stack_traces_are_kept():
    A, B, b = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("b")
    with pytensor.config.change_flags(traceback__limit=8):
        solution = pt.linalg.solve(pt.linalg.kron(A, B), b)
    function = compile_py([A, B, b], solution)
    [output] = function.maker.fgraph.outputs
    trace = getattr(output.tag, "trace", [])
    assert any("test_stack_traces_are_kept" in str(frame) for frame in trace)


def refused(solution, inputs):
    assert has_kron(compile_py(inputs, solution).maker.fgraph)


def test_refuses_factors_that_are_not_square():
    # A square product of rectangular factors is singular, but not (A^-1 (x) B^-1)^-1
    A, B, b = pt.tensor("A", shape=(3, 2)), pt.tensor("B", shape=(2, 3)), pt.dvector("b")
    K = pt.linalg.kron(A, B)
    refused(pt.linalg.solve(K, b), [A, B, b])
    refused(pt.linalg.solve(K, b, assume_a="pos"), [A, B, b])
    refused(b @ pt.linalg.solve(K, b, assume_a="pos"), [A, B, b])


@pytest.mark.parametrize("dtype", ["bool", "float64"])
def test_refuses_booleans_and_what_is_known_to_be_empty(dtype):
    shape = (2, 2) if dtype == "bool" else (0, 0)
    A, B = pt.tensor("A", dtype=dtype, shape=shape), pt.tensor("B", dtype=dtype, shape=(3, 3))
    K, b = pt.linalg.kron(A, B), pt.dvector("b")
    refused(pt.linalg.solve(K, b), [A, B, b])
    refused(b @ pt.linalg.solve(K, b, assume_a="pos"), [A, B, b])
    refused(pt.linalg.cholesky(K), [A, B])


@pytest.mark.parametrize("assume_a", ["gen", "pos"])
@pytest.mark.parametrize("empty", [0, 1])
def test_empty_factors(empty, assume_a):
    arrays = [np.eye(2), np.eye(3)]
    arrays[empty] = np.empty((0, 0))
    A, B, b = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("b")
    solution = pt.linalg.solve(pt.linalg.kron(A, B), b, assume_a=assume_a)
    function = compile_py([A, B, b], [solution, b @ solution])
    result, quadratic_form = function(*arrays, np.empty(0))
    assert result.shape == (0,)
    assert quadratic_form == 0


def test_refuses_three_dimensional_kron():
    # Multiplies the leading dimensions instead of batching over them
    A, B, b = pt.dtensor3("A"), pt.dtensor3("B"), pt.dvector("b")
    refused(pt.linalg.solve(pt.linalg.kron(A, B), b, b_ndim=1), [A, B, b])


def test_refuses_complex_positive_definite_products():
    A, B, b = pt.zmatrix("A"), pt.zmatrix("B"), pt.zvector("b")
    refused(pt.linalg.solve(pt.linalg.kron(A, B), b, assume_a="pos"), [A, B, b])


def test_complex_general_and_triangular_solves():
    rng = np.random.default_rng(3)
    arrays = [random_matrix(rng, n, n) + 1j * rng.normal(size=(n, n)) for n in (2, 3)]
    factors = symbolic_matrices(arrays)
    b, b_var = rng.normal(size=6) + 0j, pt.zvector("b")
    K = dense_kron(*arrays)
    check(pt.linalg.solve(kron(*factors), b_var), factors, arrays, b_var, b, np.linalg.solve(K, b))
    lower = [np.tril(array) for array in arrays]
    check(
        pt.linalg.solve_triangular(kron(*factors), b_var, lower=True),
        factors,
        lower,
        b_var,
        b,
        np.linalg.solve(dense_kron(*lower), b),
    )


def test_cholesky_is_shared_between_triangular_solves():
    A, B, b = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("b")
    L = pt.linalg.cholesky(pt.linalg.kron(A, B))
    solution = pt.linalg.solve_triangular(L, b, lower=True)
    function = compile_py([A, B, b], solution)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, SolveTriangular) == 2


SOLVES = {
    "gen": lambda K, b: pt.linalg.solve(K, b),
    "sym": lambda K, b: pt.linalg.solve(K, b, assume_a="sym"),
    "pos": lambda K, b: pt.linalg.solve(K, b, assume_a="pos"),
    "lower": lambda K, b: pt.linalg.solve_triangular(K, b, lower=True),
    "upper": lambda K, b: pt.linalg.solve_triangular(K.T, b, lower=False),
    "cholesky": lambda K, b: pt.linalg.cho_solve((K, True), b),
}


@pytest.mark.parametrize("b_sizes", [((3, 2), (2, 5)), ((3, 1), (1, 4), (2, 2))], ids=str)
@pytest.mark.parametrize("kind", SOLVES)
def test_another_product_on_the_right(kind, b_sizes):
    rng = np.random.default_rng(3)
    arrays = [random_spd(rng, n) for n in (3, 2)]
    if kind in ("lower", "upper", "cholesky"):
        arrays = [np.linalg.cholesky(array) for array in arrays]
    b_arrays = [rng.normal(size=size) for size in b_sizes]
    factors, b_factors = (
        [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(group)]
        for group in (arrays, b_arrays)
    )
    solution = SOLVES[kind](kron(*factors), 2 * kron(*b_factors))
    rewritten = rewrite_graph(solution, include=("canonicalize",))
    assert isinstance(rewritten.owner.op, KroneckerProduct)
    K, b = dense_kron(*arrays), 2 * dense_kron(*b_arrays)
    K = {"upper": K.T, "cholesky": K @ K.T}.get(kind, K)
    result = compile_py([*factors, *b_factors], solution)(*arrays, *b_arrays)
    assert_allclose(result, np.linalg.solve(K, b), rtol=1e-9, atol=1e-12)


def test_another_product_on_the_right_of_sizes_that_may_not_agree():
    rng = np.random.default_rng(3)
    arrays = [random_spd(rng, 3), random_spd(rng, 2), rng.normal(size=(2, 2))]
    arrays.append(rng.normal(size=(3, 4)))
    A, B, C, D = factors = symbolic_matrices(arrays)
    solution = pt.linalg.solve(kron(A, B), kron(C, D))
    function = compile_py(factors, solution)
    # The right-hand side is computed, and solved for factor by factor
    assert count_ops(function.maker.fgraph, KroneckerProduct) == 1
    a, b, c, d = arrays
    expected = np.linalg.solve(dense_kron(a, b), dense_kron(c, d))
    assert_allclose(function(*arrays), expected, rtol=1e-10)


def test_batched_product_on_the_right():
    rng = np.random.default_rng(3)
    arrays = [random_spd(rng, 3, batch=(5,)), random_spd(rng, 2)]
    b_arrays = [rng.normal(size=(3, 2)), rng.normal(size=(7, 5, 2, 4))]
    factors = [pt.tensor(f"A{i}", shape=a.shape) for i, a in enumerate((*arrays, *b_arrays))]
    A, B, C, D = factors
    batched_kron = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")
    solution = pt.linalg.solve(batched_kron(A, B), batched_kron(C, D), assume_a="pos", b_ndim=2)
    expected = np.linalg.solve(dense_kron(*arrays), dense_kron(*b_arrays))
    result = compile_py(factors, solution)(*arrays, *b_arrays)
    assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_value", [False, True])
@pytest.mark.parametrize(
    "product",
    [
        lambda A, B: pt.linalg.kron(A, B),
        lambda A, B: 2.5 * pt.linalg.kron(A, B),
        lambda A, B: pt.linalg.kron(A.T, B).T / 3,
    ],
    ids=["K", "c K", "K.T / c"],
)
def test_value_and_gradient_share_one_cholesky_a_factor(product, with_value):
    rng = np.random.default_rng(3)
    arrays, x = [random_spd(rng, 3), random_spd(rng, 4)], rng.normal(size=12)
    inputs = A, B, x_var = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    value = x_var @ pt.linalg.solve(product(A, B), x_var, assume_a="pos")
    outputs = [value, pt.grad(value, x_var)] if with_value else [pt.grad(value, x_var)]
    function = compile_py(inputs, outputs)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, Cholesky) == 2
    K = product(*map(pt.as_tensor, arrays)).eval(mode=PY.excluding("kron"))
    assert_allclose(function(*arrays, x)[-1], 2 * np.linalg.solve(K, x), rtol=1e-10)


@pytest.mark.parametrize("lower", [True, False])
def test_value_and_gradient_of_cho_solve_share_their_solves(lower):
    rng = np.random.default_rng(3)
    arrays = [np.linalg.cholesky(random_spd(rng, n)) for n in (3, 4)]
    if not lower:
        arrays = [array.T for array in arrays]
    x = rng.normal(size=12)
    inputs = A, B, x_var = (
        pt.tensor("A", shape=(3, 3)),
        pt.tensor("B", shape=(4, 4)),
        pt.dvector("x"),
    )
    value = x_var @ pt.linalg.cho_solve((kron(A, B), lower), x_var)
    function = compile_py(inputs, [pt.grad(value, x_var)])
    assert count_ops(function.maker.fgraph, CholeskySolve) == 2
    C = dense_kron(*arrays)
    K = C @ C.T if lower else C.T @ C
    assert_allclose(function(*arrays, x)[0], 2 * np.linalg.solve(K, x), rtol=1e-10)


@pytest.mark.parametrize("lower", [True, False])
def test_complex_cho_solve_with_a_transposed_factor(lower):
    # K = C C^H: here the transpose of a factor isn't that of another triangle
    rng = np.random.default_rng(3)
    triangle = np.triu if lower else np.tril
    arrays = [triangle(random_matrix(rng, n, n) + 1j * rng.normal(size=(n, n))) for n in (2, 3)]
    factors = symbolic_matrices(arrays)
    b, b_var = rng.normal(size=6) + 0j, pt.zvector("b")
    C = dense_kron(*arrays).T
    K = C @ C.conj().T if lower else C.conj().T @ C
    solution = pt.linalg.cho_solve((kron(*factors).T, lower), b_var)
    check(solution, factors, arrays, b_var, b, np.linalg.solve(K, b))


@pytest.mark.parametrize("multiple", [lambda c, b: -c * b, lambda c, b: b / c, lambda c, b: b + b])
def test_solutions_for_multiples_of_one_vector_are_shared(multiple):
    rng = np.random.default_rng(4)
    values = [random_spd(rng, 3), random_spd(rng, 2), np.array(1.7), rng.normal(size=6)]
    A, B, c, b = inputs = [pt.dmatrix("A"), pt.dmatrix("B"), pt.dscalar("c"), pt.dvector("b")]
    K = pt.linalg.kron(A, B)
    outputs = [pt.linalg.solve(K, v, assume_a="pos") for v in (b, multiple(c, b))]
    function = compile_py(inputs, outputs)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, CholeskySolve) == 2
    solution = np.linalg.solve(dense_kron(*values[:2]), values[3])
    for result, other in zip(
        function(*values), (solution, multiple(values[2], solution)), strict=True
    ):
        assert_allclose(result, other, rtol=1e-10)
