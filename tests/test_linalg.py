"""The factorwise algebra, where the rewrites don't already test it."""

import numpy as np
import pytensor.tensor as pt
import pytest
from numpy.testing import assert_allclose

from pymc_kron import linalg
from pymc_kron.roots import CholeskyRoot, EigenRoot, PrecisionRoot
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


def roots():
    sigma = random_spd(np.random.default_rng(23), 4)
    values, vectors = map(pt.as_tensor, np.linalg.eigh(sigma))
    return sigma, {
        "cholesky": CholeskyRoot(pt.linalg.cholesky(pt.as_tensor(sigma))),
        "precision": PrecisionRoot(pt.linalg.cholesky(pt.as_tensor(np.linalg.inv(sigma)))),
        "eigenvectors": EigenRoot(values, vectors),
    }


@pytest.mark.parametrize("name", ["cholesky", "precision", "eigenvectors"])
def test_roots(name):
    sigma, by_name = roots()
    root = by_name[name]
    R = root.color(pt.eye(4)).eval(mode=PY)
    assert_allclose(R @ R.T, sigma, rtol=1e-10)
    assert_allclose(root.whiten(pt.as_tensor(R)).eval(mode=PY), np.eye(4), atol=1e-12)
    unwhitened = root.unwhiten(root.whiten(pt.eye(4))).eval(mode=PY)
    assert_allclose(unwhitened, np.linalg.inv(sigma), rtol=1e-10)
    assert_allclose(root.logdet.eval(mode=PY), np.linalg.slogdet(sigma)[1], rtol=1e-10)
    assert root.exists.eval(mode=PY)


def test_roots_that_do_not_exist():
    assert not CholeskyRoot(pt.linalg.cholesky(-pt.eye(2))).exists.eval(mode=PY)
    assert not PrecisionRoot(pt.linalg.cholesky(-pt.eye(2))).exists.eval(mode=PY)
    assert not EigenRoot(pt.as_tensor([1.0, 0.0]), pt.eye(2)).exists.eval(mode=PY)
