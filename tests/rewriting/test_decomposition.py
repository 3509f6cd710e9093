import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose
from pytensor.graph.rewriting.utils import rewrite_graph
from pytensor.tensor.linalg.products import KroneckerProduct

from tests.helpers import compile_py, dense_kron, random_spd, symbolic_matrices


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)], ids=str)
@pytest.mark.parametrize("lower", [True, False])
def test_cholesky(lower, signs):
    rng = np.random.default_rng(9)
    arrays = [sign * random_spd(rng, n) for sign, n in zip(signs, (2, 4, 3), strict=True)]
    A, B, C = factors = symbolic_matrices(arrays)
    chol = pt.linalg.cholesky(pt.linalg.kron(pt.linalg.kron(A, B), C), lower=lower)
    rewritten = rewrite_graph(chol, include=("canonicalize",))
    assert isinstance(rewritten.owner.op, KroneckerProduct)
    expected = np.linalg.cholesky(dense_kron(*arrays))
    result = compile_py(factors, chol)(*arrays)
    assert_allclose(result, expected if lower else expected.T, rtol=1e-10, atol=1e-12)


def test_batched_cholesky():
    rng = np.random.default_rng(9)
    arrays = [random_spd(rng, 2, batch=(5,)), random_spd(rng, 3)]
    factors = symbolic_matrices(arrays)
    K = pt.vectorize(pt.linalg.kron, "(i,j),(k,l)->(m,n)")(*factors)
    result = compile_py(factors, pt.linalg.cholesky(K))(*arrays)
    assert_allclose(result, np.linalg.cholesky(dense_kron(*arrays)), rtol=1e-10, atol=1e-12)


def test_not_positive_definite():
    A, B = factors = symbolic_matrices([np.eye(2)] * 2)
    function = compile_py(factors, pt.linalg.cholesky(pt.linalg.kron(A, B)))
    assert np.isnan(function(-np.eye(2), np.eye(3))).any()


@pytest.mark.parametrize(
    "factors",
    [
        (pt.tensor("A", shape=(3, 2)), pt.tensor("B", shape=(2, 3))),
        (pt.zmatrix("A"), pt.zmatrix("B")),
    ],
    ids=["rectangular", "complex"],
)
def test_refusals(factors):
    chol = pt.linalg.cholesky(pt.linalg.kron(*factors))
    rewritten = rewrite_graph(chol, include=("canonicalize", "stabilize"))
    assert isinstance(rewritten.owner.inputs[0].owner.op, KroneckerProduct)
