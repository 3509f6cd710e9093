import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph
from pytensor.tensor.linalg.inverse import MatrixInverse
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from pytensor.tensor.math import Sum

from pymc_kron.rewriting import bundle_rewriter
from tests.helpers import (
    PY,
    compile_py,
    count_ops,
    dense_kron,
    has_kron,
    random_spd,
    symbolic_matrices,
)

FORMS = {
    "x @ solve": lambda x, solution: x @ solution,
    "solve @ x": lambda x, solution: solution @ x,
    "sum": lambda x, solution: (x * solution).sum(),
    "sum over the last axis": lambda x, solution: (solution * x).sum(axis=-1),
    "vecdot": lambda x, solution: pt.vecdot(x, solution),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(3, 2), (2, 4, 3), (4, 1)], ids=str)
def test_one_sweep(sizes, form):
    rng = np.random.default_rng(5)
    arrays = [random_spd(rng, n) for n in sizes]
    factors = symbolic_matrices(arrays)
    K = factors[0]
    for factor in factors[1:]:
        K = pt.linalg.kron(K, factor)
    x_var, x = pt.dvector("x"), rng.normal(size=np.prod(sizes))
    quadratic_form = FORMS[form](x_var, pt.linalg.solve(K, x_var, assume_a="pos"))
    function = compile_py([*factors, x_var], quadratic_form)
    assert not has_kron(function.maker.fgraph)
    assert count_ops(function.maker.fgraph, SolveTriangular) == len(sizes)
    assert_allclose(function(*arrays, x), x @ np.linalg.solve(dense_kron(*arrays), x), rtol=1e-10)


@pytest.mark.parametrize("axis", [-1, (0, 1), None])
@pytest.mark.parametrize("batch", [(), (5,)])
def test_stack_of_vectors(batch, axis):
    rng = np.random.default_rng(5)
    arrays = [random_spd(rng, 3, batch=batch), random_spd(rng, 4)]
    factors = [pt.tensor(f"A{i}", shape=array.shape) for i, array in enumerate(arrays)]
    x_var, x = pt.tensor("x", shape=(5, 12)), rng.normal(size=(5, 12))
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    solution = pt.linalg.solve(K, x_var, assume_a="pos", b_ndim=1)
    function = compile_py([*factors, x_var], (x_var * solution).sum(axis=axis))
    assert count_ops(function.maker.fgraph, SolveTriangular) == 2
    dense = np.linalg.solve(dense_kron(*arrays), x[..., None])[..., 0]
    assert_allclose(function(*arrays, x), (x * dense).sum(axis=axis), rtol=1e-10)


def test_precision_is_not_inverted_and_cholesky_factor_not_multiplied():
    rng = np.random.default_rng(5)
    Q, L = random_spd(rng, 3), np.linalg.cholesky(random_spd(rng, 4))
    Q_var, L_var, x_var = pt.dmatrix("Q"), pt.dmatrix("L"), pt.dvector("x")
    lower = assume(L_var, lower_triangular=True)
    K = pt.linalg.kron(pt.linalg.inv(Q_var), lower @ lower.T)
    x = rng.normal(size=12)
    function = compile_py([Q_var, L_var, x_var], x_var @ pt.linalg.solve(K, x_var, assume_a="pos"))
    assert count_ops(function.maker.fgraph, MatrixInverse) == 0
    assert count_ops(function.maker.fgraph, SolveTriangular) == 1
    dense = dense_kron(np.linalg.inv(Q), L @ L.T)
    assert_allclose(function(Q, L, x), x @ np.linalg.solve(dense, x), rtol=1e-10)


def test_a_solution_that_is_used_elsewhere_is_solved_for():
    A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    solution = pt.linalg.solve(pt.linalg.kron(A, B), x, assume_a="pos")
    rng = np.random.default_rng(5)
    arrays, value = [random_spd(rng, 3), random_spd(rng, 2)], rng.normal(size=6)
    function = compile_py([A, B, x], [x @ solution, solution])
    assert not has_kron(function.maker.fgraph)
    expected = np.linalg.solve(dense_kron(*arrays), value)
    quadratic_form, result = function(*arrays, value)
    assert_allclose(result, expected, rtol=1e-10)
    assert_allclose(quadratic_form, value @ expected, rtol=1e-10)


@pytest.mark.parametrize(
    "bilinear",
    [
        lambda x, y, solution: y @ solution,
        lambda x, y, solution: (y * solution).sum(),
        lambda x, y, solution: (solution * solution).sum(),
        lambda x, y, solution: (x * solution)[:3].sum(),
        lambda x, y, solution: pt.outer(x, solution),
        # A sum over no axis at all
        lambda x, y, solution: Sum(axis=())(x * solution),
    ],
)
def test_what_only_looks_like_a_quadratic_form(bilinear):
    A, B, x, y = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x"), pt.dvector("y")
    solution = pt.linalg.solve(pt.linalg.kron(A, B), x, assume_a="pos")
    rng = np.random.default_rng(5)
    values = [random_spd(rng, 3), random_spd(rng, 2), rng.normal(size=6), rng.normal(size=6)]
    function = compile_py([A, B, x, y], bilinear(x, y, solution))
    dense = compile_py([A, B, x, y], bilinear(x, y, solution), mode=PY.excluding("kron"))
    assert not has_kron(function.maker.fgraph)
    assert_allclose(function(*values), dense(*values), rtol=1e-10)


def test_a_sum_over_no_axis_is_left_to_the_solve():
    # PyTensor drops such a sum before the bundle runs in a compiled function
    inputs = A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
    solution = pt.linalg.solve(pt.linalg.kron(A, B), x, assume_a="pos")
    fgraph = FunctionGraph(inputs, [Sum(axis=())(x * solution)], clone=False)
    bundle_rewriter().rewrite(fgraph)
    assert not has_kron(fgraph)
    rng = np.random.default_rng(5)
    arrays, value = [random_spd(rng, 3), random_spd(rng, 2)], rng.normal(size=6)
    result = fgraph.outputs[0].eval(dict(zip(inputs, [*arrays, value], strict=True)), mode=PY)
    assert_allclose(result, value * np.linalg.solve(dense_kron(*arrays), value), rtol=1e-10)
