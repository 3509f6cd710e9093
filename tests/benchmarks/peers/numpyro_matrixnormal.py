"""NumPyro's `MatrixNormal`: two factors, no noise."""

import jax.numpy as jnp
from numpyro.distributions import MatrixNormal

from tests.benchmarks import measure
from tests.benchmarks.peers import in_jax


def logp(covs, sigma, mu, x):
    if len(covs) != 2 or sigma is not None:
        raise NotImplementedError("two factors, no noise")
    sizes = [len(cov) for cov in covs]
    chols = map(jnp.linalg.cholesky, covs)
    return MatrixNormal(mu.reshape(sizes), *chols).log_prob(x.reshape(sizes))


if __name__ == "__main__":
    measure.main({"NumPyro": in_jax.prepare(logp)}, ["jax", "numpyro"])
