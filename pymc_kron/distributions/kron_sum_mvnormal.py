"""The multivariate normal whose covariance is a sum of Kronecker products that one basis fits.

What `KroneckerMvNormal` with noise is, and what ``pm.MvNormal`` with
``cov=kron(A, B) + s**2 * pt.eye(N)`` is turned into.
"""

import math

import pytensor
from pymc.distributions.dist_math import check_parameters
from pymc.distributions.distribution import SymbolicRandomVariable, _support_point
from pymc.distributions.moments.means import _mean
from pymc.distributions.shape_utils import implicit_size_from_params, rv_size_is_none
from pymc.logprob.abstract import _logprob
from pymc.pytensorf import normalize_rng_param
from pytensor import tensor as pt
from pytensor.tensor.random.utils import normalize_size_param

from pymc_kron.distributions.arguments import check_value
from pymc_kron.kron_sum import KronSum, Layout
from pymc_kron.kron_sum_logp import KronSumLogp
from pymc_kron.linalg import kron_matmul
from pymc_kron.structure import column_sizes


class KronSumMvNormalRV(SymbolicRandomVariable):
    """Random variable that draws ``mu + R (sqrt(Lambda) z)``; its covariance is ``R Lambda R'``."""

    ndim_supp = 1
    _print_name = ("KronSumMvNormal", "\\operatorname{KronSumMvNormal}")

    def __init__(self, *args, layout: Layout, **kwargs):
        self.layout = layout
        super().__init__(*args, **kwargs)

    @classmethod
    def rv_op(cls, mu, *parts, layout: Layout, size=None, rng=None, dtype=None):
        mu = pt.as_tensor_variable(mu)
        parts = tuple(map(pt.as_tensor_variable, parts))
        rng = normalize_rng_param(rng)
        size = normalize_size_param(size)
        kron_sum = KronSum.from_inputs(layout, parts)

        if rv_size_is_none(size):
            ndims_params = [1, *KronSum.core_ndims(layout)]
            size = implicit_size_from_params(mu, *parts, ndims_params=ndims_params)
        N = math.prod(column_sizes(kron_sum.signals))
        next_rng, z = pt.random.normal(size=(*size, N), rng=rng, return_next_rng=True)
        basis = kron_sum.basis()
        draws = mu + kron_matmul(kron_sum.roots(basis), pt.sqrt(basis.values) * z)

        signals = [f"(n{i},n{i})" for i in range(len(kron_sum.signals))]
        metrics = [f"(n{i},n{i})" for i, has_metric in enumerate(layout.has_metric) if has_metric]
        eigenvalues = [f"(n{i})" for i, decomposed in enumerate(layout.is_decomposed) if decomposed]
        scales = ["()" for _ in kron_sum.scales]
        core_shapes = ",".join([*scales, *signals, *metrics, *eigenvalues])
        return cls(
            inputs=[rng, size, mu, *parts],
            outputs=[next_rng, draws.astype(dtype or pytensor.config.floatX)],
            layout=layout,
            extended_signature=f"[rng],[size],(n),{core_shapes}->[rng],(n)",
        )(rng, size, mu, *parts)

    def rebuild_rv(self, *args, **kwargs):
        return self.rv_op(*args, layout=self.layout, dtype=self.output_types[1].dtype, **kwargs)


@_logprob.register(KronSumMvNormalRV)
def kron_sum_mvnormal_logp(op, values, rng, size, mu, *parts, **kwargs):
    [value] = values
    kron_sum = KronSum.from_inputs(op.layout, parts)
    check_value(value, op.output_types[1].shape, column_sizes(kron_sum.signals))
    logp, exists = KronSumLogp(layout=op.layout)(*parts, value - mu)
    return check_parameters(logp, exists, msg="posdef covariance")


@_mean.register(KronSumMvNormalRV)
@_support_point.register(KronSumMvNormalRV)
def kron_sum_mvnormal_mean(op, rv, rng, size, mu, *parts):
    return pt.full_like(rv, mu)
