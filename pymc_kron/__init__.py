from pymc_kron import rewriting
from pymc_kron.distributions import KroneckerMvNormal
