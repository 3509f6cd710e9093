from pymc_kron.distributions.kronecker_mvnormal import KroneckerMvNormal

__all__ = ["KroneckerMvNormal"]
