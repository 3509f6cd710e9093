"""The factorwise algebra, where the rewrites don't already test it."""

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_kron import linalg
from pymc_kron.roots import Root
from tests.helpers import PY, dense_kron, random_spd


@pytest.mark.parametrize("batches", [((), ()), ((5,), ()), ((2, 1), (5,))], ids=str)
@pytest.mark.parametrize("x_batch", [(), (5,), (7, 2, 5)], ids=str)
def test_products_with_batches_of_vectors(x_batch, batches):
    rng = np.random.default_rng(23)
    factors = [
        rng.normal(size=(*batch, *shape))
        for batch, shape in zip(batches, [(3, 2), (4, 5)], strict=True)
    ]
    x = rng.normal(size=(*x_batch, 10))
    result = linalg.kron_matmul([pt.as_tensor(factor) for factor in factors], pt.as_tensor(x))
    expected = (dense_kron(*factors) @ x[..., None])[..., 0]
    assert_allclose(result.eval(mode=PY), expected, rtol=1e-10)
    assert result.type.shape == expected.shape


def test_row_major_order():
    # (A (x) B) vec(X) = vec(A X B.T)
    rng = np.random.default_rng(23)
    A, B, X = rng.normal(size=(3, 3)), rng.normal(size=(2, 2)), rng.normal(size=(3, 2))
    result = linalg.kron_matmul([pt.as_tensor(A), pt.as_tensor(B)], pt.as_tensor(X.ravel()))
    assert_allclose(result.eval(mode=PY), (A @ X @ B.T).ravel(), rtol=1e-10)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, 1), (1, 1, -1)])
def test_aligned_signs_keep_the_product(signs):
    rng = np.random.default_rng(23)
    factors = [sign * random_spd(rng, n) for sign, n in zip(signs, (2, 3, 4), strict=True)]
    aligned = [
        factor.eval(mode=PY)
        for factor in linalg.with_aligned_signs(list(map(pt.as_tensor, factors)))
    ]
    assert_allclose(dense_kron(*aligned), dense_kron(*factors))
    definite = [np.linalg.eigvalsh(factor).min() > 0 for factor in aligned]
    assert all(definite) == (np.prod(signs) == 1)


@pytest.mark.parametrize("of_precision", [False, True])
def test_roots(of_precision):
    rng = np.random.default_rng(23)
    sigma = random_spd(rng, 4)
    factorised = np.linalg.inv(sigma) if of_precision else sigma
    root = Root(pt.linalg.cholesky(pt.as_tensor(factorised)), of_precision=of_precision)
    R = root.color(pt.eye(4)).eval(mode=PY)
    assert_allclose(R @ R.T, sigma, rtol=1e-10)
    assert_allclose(root.whiten(pt.as_tensor(R)).eval(mode=PY), np.eye(4), atol=1e-12)
    assert_allclose(root.logdet.eval(mode=PY), np.linalg.slogdet(sigma)[1], rtol=1e-10)
    assert root.exists.eval(mode=PY)
    assert not Root(pt.linalg.cholesky(-pt.eye(2))).exists.eval(mode=PY)
