"""GPyTorch's multivariate normal of a `KroneckerProductLinearOperator`, with and without noise."""

import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    KroneckerProductAddedDiagLinearOperator,
    KroneckerProductLinearOperator,
)

from tests.benchmarks import measure


def logp(covs, sigma, mu, x):
    K = KroneckerProductLinearOperator(*covs)
    if sigma is not None:
        noise = ConstantDiagLinearOperator(sigma.square().unsqueeze(-1), len(x))
        K = KroneckerProductAddedDiagLinearOperator(K, noise)
    return MultivariateNormal(mu, K).log_prob(x)


def prepare(work, covs, sigma, mu, x):
    torch.set_num_threads(1)

    def tensor(array):
        return torch.tensor(array, requires_grad=work.with_gradient)

    covs, mu, x = [tensor(cov) for cov in covs], tensor(mu), tensor(x)
    sigma = None if sigma is None else tensor(sigma)
    inputs = [*covs, *([] if sigma is None else [sigma]), mu, x]

    def call():
        value = logp(covs, sigma, mu, x)
        if work.with_gradient:
            return value.detach(), *torch.autograd.grad(value, inputs)
        return value.detach()

    return call


if __name__ == "__main__":
    measure.main({"GPyTorch": prepare}, ["gpytorch", "linear-operator", "torch"])
