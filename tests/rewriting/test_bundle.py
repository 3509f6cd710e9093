"""The bundle as a whole: what it is registered as, and what it leaves alone."""

import subprocess
import sys

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.compile.mode import optdb
from pytensor.graph.basic import equal_computations
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.utils import rewrite_graph

import pymc_kron.rewriting as bundle
from tests.helpers import PY, WITHOUT_KRON, compile_py, dense_kron, has_kron, random_spd

A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
K = pt.linalg.kron(A, B)

# What each rewrite is for, and whether a Kronecker product is left without it
EXPRESSIONS = {
    "whitened_norm_of_kron_solve": x @ pt.linalg.solve(K, x, assume_a="pos"),
    "det_of_kron": pt.linalg.slogdet(K)[1],
    "cholesky_of_kron": pt.linalg.solve_triangular(pt.linalg.cholesky(K), x, lower=True),
    "solve_of_kron": pt.linalg.solve(K, x),
    "matmul_of_kron": K @ x,
}


def test_every_rewrite_has_an_expression():
    names = {name for name in bundle.__all__ if name.endswith(("_kron", "_solve"))}
    assert names == set(EXPRESSIONS)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_turned_off_by_name_and_by_tag(name):
    rng = np.random.default_rng(13)
    values = [random_spd(rng, 3), random_spd(rng, 2), rng.normal(size=6)]
    functions = {
        mode_name: compile_py([A, B, x], EXPRESSIONS[name], mode=mode)
        for mode_name, mode in {
            "on": PY,
            "without it": PY.excluding(name),
            "without the tag": WITHOUT_KRON,
        }.items()
    }
    assert not has_kron(functions["on"].maker.fgraph)
    graphs = [
        function.maker.fgraph.outputs for function in (functions["on"], functions["without it"])
    ]
    in_terms_of = [function.maker.fgraph.inputs for function in functions.values()]
    assert not equal_computations(*graphs, in_terms_of[0], in_terms_of[1])
    if name != "det_of_kron":
        # PyTensor's own rewrite of a determinant removes the product too
        assert has_kron(functions["without the tag"].maker.fgraph)
    results = [function(*values) for function in functions.values()]
    assert_allclose(results, [results[0]] * 3, rtol=1e-10)


@pytest.mark.parametrize("phase", ["canonicalize", "stabilize"])
def test_registered_in_both_phases_before_the_gradient(phase):
    for name, expression in EXPRESSIONS.items():
        rewritten = rewrite_graph(expression, include=(phase,))
        assert not has_kron(FunctionGraph([A, B, x], [rewritten], clone=True)), name
    assert "kron" in optdb[phase].__db__


def test_gradient_after_the_pregrad_rewrites_is_factorwise():
    rng = np.random.default_rng(13)
    values = [random_spd(rng, 3), random_spd(rng, 2), rng.normal(size=6)]
    logp = -0.5 * EXPRESSIONS["whitened_norm_of_kron_solve"] - 0.5 * EXPRESSIONS["det_of_kron"]
    gradient = pt.grad(rewrite_pregrad(logp), [A, B, x])
    function = compile_py([A, B, x], gradient)
    assert not has_kron(function.maker.fgraph)
    dA, dB, dx = function(*values)
    a, b, value = values
    alpha = np.linalg.solve(dense_kron(a, b), value)
    # dlogp/dK_i of design, with K^-1 (x - mu) unfolded along axis i
    grid = alpha.reshape(3, 2)
    assert_allclose(dx, -alpha, rtol=1e-10)
    # The gradient of a Cholesky factor is that of a symmetric argument, folded to one triangle
    assert_allclose(
        (dA + dA.T) / 2, (grid @ b @ grid.T - 2 * np.linalg.inv(a)) / 2, rtol=1e-9, atol=1e-12
    )
    assert_allclose(
        (dB + dB.T) / 2, (grid.T @ a @ grid - 3 * np.linalg.inv(b)) / 2, rtol=1e-9, atol=1e-12
    )


_PRINT_GRAPHS = """
import sys
if sys.argv[1] == "with":
    import pymc_kron
import pytensor, pytensor.tensor as pt
from pytensor.compile.mode import Mode
A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
outputs = [
    pt.linalg.solve(A, x),
    x @ pt.linalg.solve(A @ A.T, x, assume_a="pos"),
    pt.linalg.slogdet(A)[1],
    pt.linalg.cholesky(A) @ B,
    pt.exp(A) + B.T,
    pt.grad(pt.linalg.slogdet(A)[1], A),
]
f = pytensor.function([A, B, x], outputs, mode=Mode(linker="py", optimizer="fast_run"))
f.dprint()
"""


def test_graphs_without_kron_compile_to_equal_graphs_with_and_without_the_import():
    graphs = [
        subprocess.run(
            [sys.executable, "-c", _PRINT_GRAPHS, which],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for which in ("with", "without")
    ]
    assert graphs[0] == graphs[1]
    assert "Solve" in graphs[0]
