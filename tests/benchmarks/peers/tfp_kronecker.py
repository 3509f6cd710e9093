"""`LinearOperatorKronecker` of TensorFlow Probability on JAX.

Without noise it is the scale of `MultivariateNormalLinearOperator`. TensorFlow Probability has no
operator for a Kronecker product plus noise: there, eigenvectors are multiplied as an operator.
"""

from functools import reduce

import jax.numpy as jnp
from tensorflow_probability.substrates import jax as tfp

from tests.benchmarks import measure
from tests.benchmarks.peers import in_jax

linalg = tfp.tf2jax.linalg


def logp(covs, sigma, mu, x):
    if sigma is None:
        chols = [linalg.LinearOperatorLowerTriangular(jnp.linalg.cholesky(cov)) for cov in covs]
        scale = linalg.LinearOperatorKronecker(chols)
        return tfp.distributions.MultivariateNormalLinearOperator(mu, scale).log_prob(x)
    eigenvalues, Q = zip(*(jnp.linalg.eigh(cov) for cov in covs), strict=True)
    vectors = linalg.LinearOperatorKronecker(list(map(linalg.LinearOperatorFullMatrix, Q)))
    Lambda = reduce(jnp.multiply.outer, eigenvalues).ravel() + sigma**2
    Z = vectors.matvec(x - mu, adjoint=True)
    return tfp.distributions.Normal(0.0, jnp.sqrt(Lambda)).log_prob(Z).sum()


if __name__ == "__main__":
    measure.main({"TFP": in_jax.prepare(logp)}, ["jax", "tfp-nightly"])
