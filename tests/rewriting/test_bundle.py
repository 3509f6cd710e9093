"""The bundle as a whole: what it is registered as, and what it leaves alone."""

import subprocess
import sys

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pymc.pytensorf import rewrite_pregrad
from pytensor.assumptions import assume
from pytensor.compile.mode import optdb
from pytensor.graph.basic import equal_computations
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.rewriting.utils import rewrite_graph

import pymc_kron.rewriting as bundle
from pymc_kron.rewriting import as_written_rewrites_db, kron_rewrites_db
from tests.helpers import PY, WITHOUT_KRON, compile_py, dense_kron, has_kron, random_spd

A, B, x = pt.dmatrix("A"), pt.dmatrix("B"), pt.dvector("x")
K = pt.linalg.kron(A, B)
S = pt.linalg.kron(assume(A, symmetric=True), assume(B, symmetric=True))
M = K + 2 * pt.eye(K.shape[0])
i = pt.arange(K.shape[0])
chol_M = pt.linalg.cholesky(M)
kronecker_sum = pt.linalg.kron(A, pt.eye(B.shape[0])) + pt.linalg.kron(pt.eye(A.shape[0]), B)

# What each rewrite is for
EXPRESSIONS = {
    "cholesky_of_kron": pt.linalg.solve_triangular(pt.linalg.cholesky(K), x, lower=True),
    "det_of_kron": pt.linalg.slogdet(K)[1],
    "det_of_kron_sum": pt.linalg.slogdet(S + 2 * pt.eye(K.shape[0]))[1],
    "diagonal_of_kron": pt.diagonal(3 * K.T, 1),
    "diagonal_of_kron_sum": pt.diagonal(S + pt.outer(x, x)),
    "div_of_kron": (K / pt.linalg.kron(A, pt.exp(B))).sum(axis=0),
    "eigh_of_kron": pt.linalg.eigh(S)[0],
    "eigvalsh_of_kron": pt.linalg.eigvalsh(S),
    "einsum_of_kron": pt.einsum("ij,j->i", K, x),
    "elemwise_of_kron": abs(K) @ x,
    "entries_of_kron_diagonal": None,
    "expm_of_kron_sum": pt.linalg.expm(kronecker_sum / 9) @ x,
    "frobenius_product_of_kron": pt.linalg.norm(K),
    "increment_of_kron_diagonal": pt.linalg.solve(S[i, i].inc(2), x),
    "inner_product_of_kron_decomposition": pt.grad(
        pt.log(pt.diagonal(pt.linalg.cholesky(x[0] ** 2 * K))).sum(), x
    ),
    "inner_product_of_kron": ((S + pt.outer(x, x)) * S).sum(),
    "inv_of_kron": pt.linalg.inv(K)[0],
    "inv_of_kron_sum": pt.diagonal(pt.linalg.inv(S + 2 * pt.eye(K.shape[0]))),
    "logdet_of_kron_sum_cholesky": pt.log(pt.diagonal(chol_M)).sum(),
    "lu_of_kron": pt.linalg.lu(S)[2] @ x,
    "matmul_of_kron": K @ x,
    "matmul_of_kron_sum": M @ x,
    "matmul_of_selected_kron": K[:, ::-1] @ x,
    "mixed_product_of_kron": pt.linalg.cholesky(K @ K.T) @ x,
    "mul_of_kron": (K * pt.linalg.kron(A, pt.exp(B))).sum(axis=0),
    "pinv_of_kron": pt.linalg.pinv(K) @ x,
    "pullback_of_diagonal_matrix": None,
    "pullback_of_kron": pt.grad((K @ x) @ (K @ x), A),
    "pullback_of_kron_decomposition": pt.grad(pt.log(pt.diagonal(pt.linalg.cholesky(K))).sum(), A),
    # Which triangle of a symmetric matrix a gradient is put into differs
    "pullback_of_kron_sum_cholesky": pt.grad(pt.log(pt.diagonal(chol_M)).sum(), A).diagonal(),
    "qr_of_kron": abs(pt.linalg.qr(S, mode="r")).sum(axis=0),
    "solve_of_kron": pt.linalg.solve(K, x),
    "solve_of_kron_sum": pt.linalg.solve(M, x, assume_a="pos"),
    "subtensor_of_kron": K[1],
    "sum_of_kron": K.sum(axis=0) @ x,
    "svd_of_kron": pt.linalg.svd(2 * K, compute_uv=False),
    "trace_of_gram_solve": None,
    "whitened_norm_of_kron_solve": x @ pt.linalg.solve(K, x, assume_a="pos"),
    "whitened_norm_of_kron_sum": (pt.linalg.solve_triangular(chol_M, x, lower=True) ** 2).sum(),
}
# Refusals, and rewrites for which other tests look at the arrays that are formed
ELSEWHERE = {name for name, expression in EXPRESSIONS.items() if expression is None}
for name in ELSEWHERE:
    del EXPRESSIONS[name]
# They compare graphs with what PyTensor's gradients wrote
AS_WRITTEN = {rewrite.fn.__name__ for rewrite in as_written_rewrites_db.query("+kron").rewrites}
# PyTensor's own rewrites remove these products too
ALSO_UPSTREAM = {"det_of_kron"}


def test_every_rewrite_has_an_expression():
    databases = as_written_rewrites_db, kron_rewrites_db
    rewrites = [rewrite for db in databases for rewrite in db.query("+kron").rewrites]
    names = {name for name in bundle.__all__ if "_of_" in name}
    assert names == {rewrite.fn.__name__ for rewrite in rewrites}
    assert names == set(EXPRESSIONS) | ELSEWHERE


def test_a_cutoff_in_the_sequence_of_phases_leaves_the_bundle_whole():
    # LocalGroupDB takes the cutoff for one of its own positions
    query = PY.provided_optimizer.excluding()
    query.position_cutoff = 1.6
    fgraph = FunctionGraph([A, B, x], [K @ pt.linalg.solve(K, x)], clone=True)
    optdb.query(query).rewrite(fgraph)
    assert not has_kron(fgraph)


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
    if name not in ALSO_UPSTREAM:
        assert has_kron(functions["without the tag"].maker.fgraph)
    results = [function(*values) for function in functions.values()]
    assert_allclose(results, [results[0]] * 3, rtol=1e-10)


@pytest.mark.parametrize("phase", ["canonicalize", "stabilize"])
@pytest.mark.parametrize("name", [name for name in EXPRESSIONS if name not in AS_WRITTEN])
def test_registered_in_both_phases_before_the_gradient(name, phase):
    rewritten = rewrite_graph(EXPRESSIONS[name], include=(phase,))
    assert not has_kron(FunctionGraph([A, B, x], [rewritten], clone=True))


@pytest.mark.parametrize(
    "db",
    [optdb, optdb["canonicalize"], optdb["stabilize"]],
    ids=["all", "canonicalize", "stabilize"],
)
def test_each_walk_is_registered_under_the_tag(db):
    assert "kron" in db.__db__


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
