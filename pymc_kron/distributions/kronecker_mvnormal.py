"""The multivariate normal with a Kronecker-structured covariance."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np
from pymc.distributions.continuous import Continuous
from pymc.distributions.dist_math import check_parameters
from pymc.distributions.distribution import SymbolicRandomVariable
from pymc.distributions.moments.means import _mean
from pymc.distributions.shape_utils import implicit_size_from_params, rv_size_is_none
from pymc.logprob.abstract import _logprob
from pymc.pytensorf import normalize_rng_param
from pytensor import tensor as pt
from pytensor.assumptions.specify import assume
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.replace import clone_replace
from pytensor.tensor import TensorLike
from pytensor.tensor.random.utils import normalize_size_param
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import apply_to_vectors, factors_batch_ndim, kron
from pymc_kron.rewriting import bundle_rewriter
from pymc_kron.roots import Root
from pymc_kron.structure import column_sizes, is_provably_not_square

Form = Literal["cov", "chol", "tau"]
"""What a factor is: a covariance, its lower Cholesky factor, or its inverse."""


def covariance(factor: TensorVariable, form: Form) -> TensorVariable:
    """Write down the covariance that a factor stands for: ``(n,n)->(n,n)``."""
    match form:
        case "cov":
            cov = factor
        case "chol":
            chol = assume(factor, lower_triangular=True)
            cov = chol @ chol.mT
        case "tau":
            cov = pt.linalg.inv(factor)
    return assume(cov, positive_definite=True)


def root(factor: TensorVariable, form: Form) -> Root:
    """Return the root of the covariance that a factor stands for."""
    chol = factor if form == "chol" else pt.linalg.cholesky(factor)
    return Root(chol, of_precision=form == "tau")


def dense_logp(
    value: TensorVariable, mu: TensorVariable, factors: Sequence[TensorVariable], forms: Sequence[Form]
) -> TensorVariable:
    """Write down the log-density of a multivariate normal with covariance ``kron(*covs)``.

    ``-1/2 (x - mu)' K^-1 (x - mu) - 1/2 log|K| - N/2 log(2 pi)``, with the dense ``K``: the
    formula that `rewritten_logp` turns into the one that is computed.
    """
    K = kron(*map(covariance, factors, forms))
    delta = value - mu
    quadratic_form = (delta * pt.linalg.solve(K, delta, assume_a="pos", b_ndim=1)).sum(axis=-1)
    _, logdet = pt.linalg.slogdet(K)
    N = prod(column_sizes(factors))
    return -0.5 * quadratic_form - 0.5 * logdet - 0.5 * N * np.log(2 * np.pi)


def rewritten_logp(
    value: TensorVariable, mu: TensorVariable, factors: Sequence[TensorVariable], forms: Sequence[Form]
) -> TensorVariable:
    """Return the log-density in its factorwise form: `dense_logp` after the rewrite bundle.

    The bundle sees the formula alone, on inputs that stand for its arguments, so that nothing
    else in the graph is touched.
    """
    arguments = [value, mu, *factors]
    inputs = [argument.type() for argument in arguments]
    logp = dense_logp(inputs[0], inputs[1], inputs[2:], forms)
    fgraph = FunctionGraph(inputs, [logp], clone=False)
    bundle_rewriter().rewrite(fgraph)
    [logp] = clone_replace(fgraph.outputs, replace=dict(zip(fgraph.inputs, arguments, strict=True)))
    return logp


class KroneckerMvNormalRV(SymbolicRandomVariable):
    """Random variable of `KroneckerMvNormal`. Its inner graph draws ``mu + (R_1 (x) ...) z``."""

    ndim_supp = 1
    _print_name = ("KroneckerMvNormal", "\\operatorname{KroneckerMvNormal}")

    def __init__(self, *args, forms: tuple[Form, ...], **kwargs):
        self.forms = forms
        super().__init__(*args, **kwargs)

    @classmethod
    def rv_op(cls, mu, *factors, forms, size=None, rng=None):
        mu, *factors = map(pt.as_tensor_variable, (mu, *factors))
        rng = normalize_rng_param(rng)
        size = normalize_size_param(size)

        signature = ",".join(f"(n{i},n{i})" for i in range(len(factors)))
        batch_shape = (
            implicit_size_from_params(mu, *factors, ndims_params=[1, *[2 for _ in factors]])
            if rv_size_is_none(size)
            else size
        )
        sizes = column_sizes(factors)
        next_rng, z = pt.random.normal(
            size=(*batch_shape, prod(sizes)), rng=rng, return_next_rng=True
        )
        draws = mu + apply_to_vectors(
            [root(factor, form).color for factor, form in zip(factors, forms, strict=True)],
            sizes,
            sizes,
            z,
            batch_ndim=factors_batch_ndim(factors),
        )
        return cls(
            inputs=[rng, size, mu, *factors],
            outputs=[next_rng, draws],
            forms=tuple(forms),
            extended_signature=f"[rng],[size],(n),{signature}->[rng],(n)",
        )(rng, size, mu, *factors)

    def rebuild_rv(self, *args, **kwargs):
        return self.rv_op(*args, forms=self.forms, **kwargs)


@_logprob.register(KroneckerMvNormalRV)
def kronecker_mvnormal_logp(op, values, rng, size, mu, *factors, **kwargs):
    [value] = values
    return check_parameters(
        rewritten_logp(value, mu, factors, op.forms),
        *(root(factor, form).exists for factor, form in zip(factors, op.forms, strict=True)),
        msg="posdef covariance",
    )


@_mean.register(KroneckerMvNormalRV)
def kronecker_mvnormal_mean(op, rv, rng, size, mu, *factors):
    return pt.full_like(rv, mu)


class KroneckerMvNormal(Continuous):
    rv_type = KroneckerMvNormalRV
    rv_op = KroneckerMvNormalRV.rv_op

    @classmethod
    def dist(cls, mu=0, covs=None, *, chols=None, taus=None, lower=True, **kwargs):
        factors, forms = [], []
        n = len(covs or chols or taus)
        for i in range(n):
            for form, l in (("cov", covs), ("chol", chols), ("tau", taus)):
                if l is not None and l[i] is not None:
                    f = pt.as_tensor_variable(l[i])
                    if form == "chol" and not lower:
                        f = f.mT
                    factors.append(f)
                    forms.append(form)
        mu = pt.as_tensor_variable(mu)
        N = prod(column_sizes(factors))
        if mu.ndim==0 or mu.type.shape[-1] != N:
            mu = pt.broadcast_to(mu, (*tuple(mu.shape)[:-1], N))
        return super().dist([mu, *factors], forms=tuple(forms), **kwargs)

    def support_point(rv, rng, size, mu, *factors):
        return pt.full_like(rv, mu)
