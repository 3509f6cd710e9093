"""The log-density of ``N(0, M)`` with a `KronSum` M, and its gradient in closed form.

With the basis ``P = P_1 (x) ... (x) P_d``, ``P' M P = diag(Lambda)``, of `pymc_kron.kron_sum`::

    Z = P' x,    T = Z / Lambda
    logp = -1/2 sum Z^2 / Lambda - 1/2 log det M - N/2 log(2 pi)

Its gradient in M is ``G = 1/2 P (T T' - diag(1 / Lambda)) P'``, since ``inv(M) = P diag(1 / Lambda)
P'``. In a factor ``F_ti`` of a term ``c_t (F_t1 (x) ... (x) F_td)``, summed over the blocks of the
product, it is::

    dlogp/dF_ti = 1/2 P_i (T_(i) diag(u_ti) T_(i)' - diag(sum of u_ti / Lambda)) P_i'

with ``u_ti = c_t (the product of the other axes' v_tj)``, the sum over the other axes, and
the eigenvalues ``v_tj`` of the factors, since ``P_j' F_tj P_j = diag(v_tj)``. No eigenvector is
differentiated, and there is no ``1 / (w_j - w_i)``: it is exact at repeated eigenvalues. The
scalars have ``dlogp/dc_t = 1/2 sum ((T^2 - 1 / Lambda) v_t)``, the residual ``dlogp/dx = -P T``.
"""

import math
from collections.abc import Sequence
from functools import reduce

from pytensor import tensor as pt
from pytensor.gradient import grad
from pytensor.tensor.variable import TensorVariable

from pymc_kron.closed_form import LogDensityOp, summed_to
from pymc_kron.kernels import contract
from pymc_kron.kron_sum import Basis, KronSum, KronSumOp, KronSumQuadratic, KronSumSLogDet
from pymc_kron.linalg import grid_along, kron_of_vectors
from pymc_kron.structure import column_sizes


class KronSumLogp(LogDensityOp, KronSumOp):
    """Log-density of a residual: the parts of a `KronSum` and ``(n1*...*nd)->(),()``."""

    __props__ = ("layout",)

    def build_inner_graph(self, *inputs: TensorVariable) -> list[TensorVariable]:
        kron_sum, [delta] = self.split(inputs)
        basis = kron_sum.basis()
        quadratic_form = (basis.project(delta) ** 2 / basis.values).sum(axis=-1)
        exists = pt.all(pt.gt(basis.values, 0), axis=-1)
        return [_logp(kron_sum, quadratic_form, basis.slogdet()[1]), exists]

    def gradients(
        self, inputs: Sequence[TensorVariable], logp_bar: TensorVariable
    ) -> list[TensorVariable]:
        kron_sum, [delta] = self.split(inputs)
        basis = kron_sum.basis()
        sizes = column_sizes(basis.vectors)
        batch_ndim = kron_sum.batch_ndim
        T = basis.project(delta) / basis.values
        weighted = logp_bar[..., None] * T
        # The weights of all vectors that share a sum
        total = logp_bar.sum(axis=tuple(range(logp_bar.type.ndim - batch_ndim)))[..., None]
        n_shared = T.type.ndim - 1 - batch_ndim

        def along(x: TensorVariable, axis: int) -> TensorVariable:
            return grid_along(x, sizes, axis, batch_ndim=batch_ndim)

        def in_matrix(i: int, terms: Sequence[int], matrix: TensorVariable) -> TensorVariable:
            """Return the gradient in the matrix that some terms have on an axis."""
            vectors = basis.vectors[i]
            others = reduce(pt.add, [_values_of_others(kron_sum, basis, t, i) for t in terms])
            grid = along(T, i)
            products = contract(_times_shared(along(weighted, i), others, n_shared), grid)
            traces = (along(total / basis.values, i) * others).sum(axis=(-3, -1))
            products, traces = summed_to(products, vectors), summed_to(traces, vectors[..., 0])
            gradient = (vectors @ products - vectors * traces[..., None, :]) @ vectors.mT
            return summed_to(0.5 * gradient, matrix)

        in_scales = []
        for t, scale in enumerate(kron_sum.scales):
            values = kron_sum.eigenvalues_of(t, basis.axes)
            excess = weighted * T - logp_bar[..., None] / basis.values
            in_scale = 0.5 * (excess * values).sum(axis=-1)
            in_scales.append(summed_to(in_scale, scale))

        in_signals: list[TensorVariable | None] = []
        in_metrics: list[TensorVariable | None] = []
        for i, axis in enumerate(kron_sum.axes):
            uses_signal = [term[i] for term in kron_sum.layout.uses_signal]
            with_signal = [t for t, uses in enumerate(uses_signal) if uses]
            with_metric = [t for t, uses in enumerate(uses_signal) if not uses]
            in_signals.append(
                in_matrix(i, with_signal, axis.signal_matrix) if with_signal else None
            )
            in_metrics.append(
                in_matrix(i, with_metric, axis.metric)
                if with_metric and axis.metric is not None
                else None
            )

        return [
            *in_scales,
            *kron_sum.gradients_in_matrices(in_signals, in_metrics),
            summed_to(-basis.combine(weighted), delta),
        ]

    def differentiable_gradients(
        self, inputs: Sequence[TensorVariable], logp_bar: TensorVariable
    ) -> list[TensorVariable]:
        """Return the gradients of the sum of its two parts, which have closed forms as well."""
        kron_sum, _ = self.split(inputs)
        quadratic_form = KronSumQuadratic(layout=self.layout)(*inputs)
        _, logdet = KronSumSLogDet(layout=self.layout)(*kron_sum.inputs)
        logp = _logp(kron_sum, quadratic_form, logdet)
        return grad((logp_bar * logp).sum(), inputs, disconnected_inputs="ignore")


def _logp(
    kron_sum: KronSum, quadratic_form: TensorVariable, logdet: TensorVariable
) -> TensorVariable:
    N = math.prod(column_sizes(kron_sum.signals))
    return -0.5 * quadratic_form - 0.5 * logdet - N * (0.5 * math.log(2 * math.pi))


def _values_of_others(kron_sum: KronSum, basis: Basis, term: int, axis: int) -> TensorVariable:
    """Return ``u_ti`` for all indices of the axes before and after its own: ``(p,1,q)``."""
    values = kron_sum.term_values(term, basis.axes)
    one = pt.ones((1,), dtype=values[axis].type.dtype)
    before, after = (kron_of_vectors(part or [one]) for part in (values[:axis], values[axis + 1 :]))
    return kron_sum.scales[term][..., None, None, None] * (
        before[..., :, None, None] * after[..., None, None, :]
    )


def _times_shared(grid: TensorVariable, others: TensorVariable, n_shared: int) -> TensorVariable:
    """Multiply the grids of all vectors that share a sum: ``(s*p,n,q),(p,1,q)->(s*p,n,q)``."""
    if n_shared == 0:
        return grid * others
    *batch_shape, _, n, q = tuple(grid.shape)
    each = grid.reshape((*batch_shape, -1, others.shape[-3], n, q))
    return (each * others[..., None, :, :, :]).reshape(grid.shape)
