from pymc_kron.distributions.kronecker_mvnormal import KroneckerMvNormal
from pymc_kron.distributions.tensor_normal import TensorNormal

__all__ = ["KroneckerMvNormal", "TensorNormal"]
