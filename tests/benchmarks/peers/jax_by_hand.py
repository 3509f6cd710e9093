"""The factorwise log-density as it is first written in JAX."""

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from tests.benchmarks import measure
from tests.benchmarks.peers import in_jax


def along_axes(function, matrices, x):
    """Apply a function of a matrix and columns along each axis of a grid."""
    for axis, matrix in enumerate(matrices):
        columns = jnp.moveaxis(x, axis, 0)
        x = function(matrix, columns.reshape(len(matrix), -1)).reshape(columns.shape)
        x = jnp.moveaxis(x, 0, axis)
    return x


def logp(covs, sigma, mu, x):
    sizes = [len(cov) for cov in covs]
    delta = (x - mu).reshape(sizes)
    if sigma is None:
        chols = [jnp.linalg.cholesky(cov) for cov in covs]
        W = along_axes(lambda L, b: solve_triangular(L, b, lower=True), chols, delta)
        quadratic = jnp.sum(W**2)
        logdet = 2 * sum(
            x.size / n * jnp.sum(jnp.log(jnp.diag(L))) for L, n in zip(chols, sizes, strict=True)
        )
    else:
        eigenvalues, Q = zip(*(jnp.linalg.eigh(cov) for cov in covs), strict=True)
        Lambda = jnp.ones(())
        for a in eigenvalues:
            Lambda = jnp.multiply.outer(Lambda, a)
        Lambda = Lambda + sigma**2
        Z = along_axes(lambda Q_i, b: Q_i.T @ b, Q, delta)
        quadratic = jnp.sum(Z**2 / Lambda)
        logdet = jnp.sum(jnp.log(Lambda))
    return -0.5 * (quadratic + logdet + x.size * jnp.log(2 * jnp.pi))


if __name__ == "__main__":
    measure.main({"JAX by hand": in_jax.prepare(logp)}, ["jax"])
