"""The closed forms in BLAS and LAPACK, called through SciPy: what the benchmarks measure against.

``docs/background/kronecker.md`` derives them. They are written for speed: arrays in C order are
read as their transposes in Fortran order, so nothing is copied to be read; solves are in place;
products that are symmetric compute one triangle. Only NumPy and SciPy are imported, so that every
environment can measure them.

`covs` are symmetric positive definite matrices in C order, of sizes ``n_1, ..., n_d``; `mu` and
`x` are vectors of ``N = n_1 ... n_d`` cells, the first factor's axis first.
"""

import math
from functools import reduce

import numpy as np
from scipy.linalg.blas import ddot, dsyr2k, dsyrk, dtrmm, dtrsm
from scipy.linalg.lapack import dlauum, dpotrf, dsyevd

LOG_2PI = math.log(2 * math.pi)


def logp(covs, mu, x):
    """Return ``-1/2 |W|^2 - sum_i (N / n_i) sum log diag L_i - N/2 log 2 pi``."""
    sizes = [len(cov) for cov in covs]
    chols = [dpotrf(cov.T, lower=1, clean=0)[0] for cov in covs]
    W = x - mu
    for axis, (L, n) in enumerate(zip(chols, sizes, strict=True)):
        if 2 * n * n <= len(W):
            # OpenBLAS's trmm is so much faster than its trsm that it pays to invert
            _multiply(_inverse_transposed(L), W, sizes, axis, transposed=True, lower=False)
        else:
            for block, side in _blocks(W, sizes, axis):
                dtrsm(1.0, L, block, side=side, lower=1, trans_a=side, overwrite_b=1)
    return _logp(chols, W, sizes)


def logp_and_gradient(covs, mu, x):
    """Return the log-density and its gradients in the factors, in `mu` and in `x`.

    With ``V_i = L_i^-T W_(i)``, ``dK_i = 1/2 (V_i V_i' - (N / n_i) K_i^-1)`` takes the fewest
    operations where a factor is at least as long as all the others together. Elsewhere it is
    ``dK_i = 1/2 L_i^-T (W_(i) W_(i)' - (N / n_i) I) L_i^-1``.
    """
    sizes = [len(cov) for cov in covs]
    N = math.prod(sizes)
    chols = [dpotrf(cov.T, lower=1, clean=0)[0] for cov in covs]
    roots = [_inverse_transposed(L) for L in chols]
    W = x - mu
    for axis, U in enumerate(roots):
        _multiply(U, W, sizes, axis, transposed=True, lower=False)
    value = _logp(chols, W, sizes)

    gradients, remaining, alpha = [], range(len(sizes)), W
    for axis, (U, n) in enumerate(zip(roots, sizes, strict=True)):
        if n * n < N:
            S = _gram(W, sizes, axis, alpha=0.5)
            S.T.ravel()[:: n + 1] -= 0.5 * N / n
            US = dtrmm(1.0, U, _symmetric(S).T, overwrite_b=1)
            gradients.append(dtrmm(1.0, U, US, side=1, trans_a=1, overwrite_b=1))
        else:
            V = W.copy()
            _multiply(U, V, sizes, axis, lower=False)
            inverse, _ = dlauum(U)
            gradients.append(
                _symmetric(_gram(V, sizes, axis, 0.5, -0.5 * N / n, inverse, lower=False))
            )
            if alpha is W:
                remaining, alpha = [other for other in remaining if other != axis], V
    for axis in remaining:
        _multiply(roots[axis], alpha, sizes, axis, lower=False)
    return value, *gradients, alpha, -alpha


def noisy_logp(covs, sigma, mu, x):
    """Return ``-1/2 sum Z^2 / Lambda - 1/2 sum log Lambda - N/2 log 2 pi``."""
    eigenvalues, Q = _eigen(covs)
    Lambda = reduce(np.multiply.outer, eigenvalues).ravel()
    Lambda += sigma**2
    Z = _multiplied([Q_i.T for Q_i in Q], x - mu)
    quadratic = ddot(Z, Z / Lambda)
    return -0.5 * (quadratic + np.log(Lambda, out=Lambda).sum() + len(x) * LOG_2PI)


def noisy_logp_and_gradient(covs, sigma, mu, x):
    """Return the log-density and its gradients in the factors, in `sigma`, in `mu` and in `x`.

    With ``T = Z / Lambda`` and ``b_i`` the product of the other factors' eigenvalues,
    ``dK_i = 1/2 Q_i (T_(i) diag(b_i) T_(i)' - diag(sum_j b_ij / Lambda_ij)) Q_i'``.
    """
    sizes = [len(cov) for cov in covs]
    eigenvalues, Q = _eigen(covs)
    Lambda = reduce(np.multiply.outer, eigenvalues).ravel()
    Lambda += sigma**2
    Z = _multiplied([Q_i.T for Q_i in Q], x - mu)
    T = Z / Lambda
    value = -0.5 * (ddot(Z, T) + np.log(Lambda, out=Z).sum() + len(x) * LOG_2PI)
    inverse = np.reciprocal(Lambda, out=Lambda)

    gradients = []
    # A covariance that is singular to working precision has eigenvalues below zero
    roots = [
        np.sqrt(np.maximum(a, 0)).reshape(-1, *[1] * len(sizes[axis + 1 :]))
        for axis, a in enumerate(eigenvalues)
    ]
    U = Z.reshape(sizes)
    for axis, (Q_i, n) in enumerate(zip(Q, sizes, strict=True)):
        H = _gram(_scaled(T.reshape(sizes), roots, axis, out=U), sizes, axis, alpha=0.5)
        diagonal = H.T.ravel()[:: n + 1]
        diagonal -= 0.5 * _contracted(inverse, eigenvalues, sizes, axis)
        # H = M + M' with M triangular, so Q H Q' = (Q M) Q' + Q (Q M)'
        diagonal *= 0.5
        QM = dtrmm(1.0, H, Q_i, side=1, lower=1)
        gradients.append(_symmetric(dsyr2k(1.0, QM, Q_i, lower=1)))
    dsigma = sigma * (ddot(T, T) - inverse.sum())
    alpha = _multiplied(Q, T)
    return value, *gradients, dsigma, alpha, -alpha


def draw(chols, mu, rng):
    """Draw ``mu + (L_1 (x) ... (x) L_d) z``, from Cholesky factors in Fortran order."""
    z = product(chols, rng.standard_normal(len(mu)))
    z += mu
    return z


def product(chols, z):
    """Overwrite `z` with ``(L_1 (x) ... (x) L_d) z``, and return it."""
    sizes = [len(L) for L in chols]
    for axis, L in enumerate(chols):
        _multiply(L, z, sizes, axis, lower=True)
    return z


def _blocks(x, sizes, axis):
    """Yield the matrices that an axis of a grid is made of, in Fortran order, not copied.

    The side on which they have the axis follows: 0, ``(n, before)``, for the last axis, and 1,
    ``(after, n)``, for another.
    """
    n, after = sizes[axis], math.prod(sizes[axis + 1 :])
    if after == 1:
        yield x.reshape(-1, n).T, 0
    else:
        for block in x.reshape(-1, n, after):
            yield block.T, 1


def _multiply(triangle, x, sizes, axis, *, transposed=False, lower):
    """Overwrite `x` with a triangular matrix, or its transpose, times it along an axis."""
    for block, side in _blocks(x, sizes, axis):
        dtrmm(
            1.0, triangle, block, side=side, lower=lower, trans_a=transposed != side, overwrite_b=1
        )


def _inverse_transposed(L):
    """Return ``L^-T``, zero below the diagonal: faster than ``trtri`` in OpenBLAS."""
    identity = np.eye(len(L), order="F")
    return dtrsm(1.0, L, identity, side=1, lower=1, trans_a=1, overwrite_b=1)


def _logp(chols, W, sizes):
    N = len(W)
    half_logdets = (N / n * np.log(L.diagonal()).sum() for L, n in zip(chols, sizes, strict=True))
    return -0.5 * (ddot(W, W) + N * LOG_2PI) - sum(half_logdets)


def _gram(x, sizes, axis, alpha=1.0, beta=1.0, c=None, *, lower=True):
    """Return one triangle of ``alpha x_(i) x_(i)' + beta c``, which overwrites `c`."""
    if c is None:
        c = np.zeros((sizes[axis], sizes[axis]), order="F")
    for block, side in _blocks(x, sizes, axis):
        c = dsyrk(alpha, block, beta, c, trans=side, lower=lower, overwrite_c=1)
        beta = 1.0
    return c


def _symmetric(triangle):
    """Return the symmetric matrix one triangle of which is given, the other one zero."""
    triangle.T.ravel()[:: len(triangle) + 1] *= 0.5
    return triangle + triangle.T


def _eigen(covs):
    values, vectors, _ = zip(*(dsyevd(cov.T, lower=1) for cov in covs), strict=True)
    return values, vectors


def _multiplied(matrices, x):
    """Return ``(Q_1 (x) ... (x) Q_d) x``; `x` stays as it is."""
    sizes = [len(Q) for Q in matrices]
    for axis, (Q, n) in enumerate(zip(matrices, sizes, strict=True)):
        after = math.prod(sizes[axis + 1 :])
        x = x.reshape(-1, n) @ Q.T if after == 1 else Q @ x.reshape(-1, n, after)
    return x.ravel()


def _scaled(x, scales, axis, out):
    """Multiply a grid by each of the scales, which broadcast, but one."""
    for other, scale in enumerate(scales):
        if other != axis:
            x = np.multiply(x, scale, out=out)
    return x


def _contracted(x, vectors, sizes, axis):
    """Sum a grid times a vector along each axis but one."""
    for vector in vectors[:axis]:
        x = vector @ x.reshape(len(vector), -1)
    for vector in reversed(vectors[axis + 1 :]):
        x = x.reshape(-1, len(vector)) @ vector
    return x
