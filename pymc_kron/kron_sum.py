"""Sums of Kronecker products that one basis diagonalises.

With at most two different matrices on each axis, a signal ``S_i`` and a positive definite metric
``D_i`` (the identity where none is given), every sum ::

    M = sum_t c_t (F_t1 (x) ... (x) F_td),    F_ti = S_i or D_i

is diagonal in the generalised eigenvectors of the pairs, ``S_i P_i = D_i P_i diag(w_i)`` with
``P_i' D_i P_i = I`` (Golub and Van Loan (2013), "Matrix computations", section 8.7.2)::

    P' M P = diag(Lambda),    Lambda = sum_t c_t (v_t1 (x) ... (x) v_td),    P = P_1 (x) ... (x) P_d

where ``v_ti`` is ``w_i`` or ones. Noise is of this kind: ``A (x) B + s^2 I``, and with C and D
positive definite ``A (x) B + C (x) D``. So is the Kronecker sum ``A (x) I + I (x) B``. Hence::

    inv(M) = P diag(1 / Lambda) P',    log det M = sum log Lambda + sum_i (N / n_i) log det D_i

The gradients don't go through the eigenvectors, whose derivatives hold ``1 / (w_j - w_i)`` and
don't exist at repeated eigenvalues: that of the log-determinant is ``inv(M)`` and that of a
solution ``-inv(M) g x'``, both summed over the blocks as `pymc_kron.terms` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
from pytensor import tensor as pt
from pytensor.gradient import DisconnectedType, disconnected_type
from pytensor.tensor.symbolic import TensorSymbolicOp
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import kron_matmul, kron_of_vectors
from pymc_kron.roots import Root
from pymc_kron.structure import Matrices, column_sizes
from pymc_kron.terms import LowRank, Product, Term, contract, inner


@dataclass(frozen=True)
class Layout:
    """Which matrix each term has on each axis.

    Attributes
    ----------
    uses_signal
        For each term and axis, whether the factor is the signal, rather than the metric.
    has_metric
        For each axis, whether there is a metric other than the identity.
    """

    uses_signal: tuple[tuple[bool, ...], ...]
    has_metric: tuple[bool, ...]

    def has_signal(self, axis: int) -> bool:
        """Whether any term has the signal on an axis."""
        return any(term[axis] for term in self.uses_signal)


@dataclass(frozen=True)
class KronSum:
    """A sum of Kronecker products that one basis diagonalises.

    Attributes
    ----------
    layout
        Which matrix each term has on each axis.
    scales
        For each term, the scalar ``c_t``, ``(...)``.
    signals
        For each axis, ``S_i``, ``(..., n_i, n_i)``; on an axis without a signal, an identity.
    metrics
        For each axis that has one, ``D_i``.
    """

    layout: Layout
    scales: Matrices
    signals: Matrices
    metrics: Matrices

    @property
    def inputs(self) -> list[TensorVariable]:
        """All variables, as the inputs of an operation."""
        return [*self.scales, *self.signals, *self.metrics]

    @classmethod
    def from_inputs(cls, layout: Layout, inputs: Sequence[TensorVariable]) -> "KronSum":
        """Return the sum whose `inputs` these are."""
        n_terms, n_axes = len(layout.uses_signal), len(layout.has_metric)
        signals_end = n_terms + n_axes
        return cls(layout, inputs[:n_terms], inputs[n_terms:signals_end], inputs[signals_end:])

    @property
    def batch_ndim(self) -> int:
        """The number of batch dimensions of the sum."""
        matrices = (*self.signals, *self.metrics)
        return max(
            *(scale.type.ndim for scale in self.scales),
            *(matrix.type.ndim - 2 for matrix in matrices),
        )

    @property
    def axes(self) -> list[tuple[TensorVariable, TensorVariable | None]]:
        """For each axis, the signal and the metric, None for the identity."""
        metrics = iter(self.metrics)
        return [
            (signal, next(metrics) if has_metric else None)
            for signal, has_metric in zip(self.signals, self.layout.has_metric, strict=True)
        ]

    def factors(self, term: int) -> list[TensorVariable]:
        """Return the factors of a term."""
        return [
            signal if uses_signal else _identity_like(signal) if metric is None else metric
            for uses_signal, (signal, metric) in zip(
                self.layout.uses_signal[term], self.axes, strict=True
            )
        ]

    def basis(self) -> "Basis":
        """Return what diagonalises the sum."""
        decompositions = [
            _decompose(signal if self.layout.has_signal(axis) else None, metric, signal)
            for axis, (signal, metric) in enumerate(self.axes)
        ]
        eigenvalues = []
        for scale, uses_signal in zip(self.scales, self.layout.uses_signal, strict=True):
            vectors = [
                values if uses else pt.ones_like(values)
                for uses, (values, _, _) in zip(uses_signal, decompositions, strict=True)
            ]
            together = kron_of_vectors(vectors)
            eigenvalues.append(scale[..., None] * together)
        return Basis(
            [vectors for _, vectors, _ in decompositions],
            reduce(pt.add, eigenvalues),
            [logdet for _, _, logdet in decompositions],
        )

    def roots(self, basis: "Basis") -> list[TensorVariable]:
        """Return ``inv(P_i)'`` for each axis: ``M = R diag(Lambda) R'`` with their product R."""
        # P' D P = I
        return [
            vectors if metric is None else metric @ vectors
            for (_, metric), vectors in zip(self.axes, basis.vectors, strict=True)
        ]

    def pull_back(self, term: Term) -> list[TensorVariable]:
        """Return the gradients in all `inputs`, given the gradient in the sum as a term."""
        scale_gradients = []
        # On an axis without a signal, only the size of the matrix counts
        signal_gradients = [
            signal.zeros_like() if self.layout.has_signal(axis) else disconnected_type()
            for axis, signal in enumerate(self.signals)
        ]
        metric_gradients = [None if m is None else m.zeros_like() for _, m in self.axes]
        for t, scale in enumerate(self.scales):
            factors = self.factors(t)
            scale_gradients.append(_summed_to(inner(term, Product(factors)), scale))
            for axis, uses_signal in enumerate(self.layout.uses_signal[t]):
                gradients = signal_gradients if uses_signal else metric_gradients
                if gradients[axis] is not None:
                    part = scale[..., None, None] * contract(term, factors, axis, axis + 1)
                    gradients[axis] = gradients[axis] + _summed_to(part, factors[axis])
        metric_gradients = [gradient for gradient in metric_gradients if gradient is not None]
        return [*scale_gradients, *signal_gradients, *metric_gradients]


@dataclass(frozen=True)
class Basis:
    """What diagonalises a `KronSum`.

    Attributes
    ----------
    vectors
        For each axis, ``P_i``, whose columns are the generalised eigenvectors.
    values
        ``Lambda``, ``(..., n_1*...*n_d)``.
    metric_logdets
        For each axis, ``log det D_i``, or None for the identity.
    """

    vectors: Matrices
    values: TensorVariable
    metric_logdets: Sequence[TensorVariable | None]

    def project(self, x: TensorVariable) -> TensorVariable:
        """Return ``P' x`` of a batch of vectors, ``(n_1*...*n_d)->(n_1*...*n_d)``."""
        return kron_matmul([vectors.mT for vectors in self.vectors], x)

    def slogdet(self) -> tuple[TensorVariable, TensorVariable]:
        """Return the sign and the log absolute determinant of the sum."""
        sign = pt.sign(self.values).prod(axis=-1)
        logabsdet = pt.log(pt.abs(self.values)).sum(axis=-1)
        sizes = column_sizes(self.vectors)
        for axis, logdet in enumerate(self.metric_logdets):
            if logdet is not None:
                logabsdet = logabsdet + prod(sizes[:axis] + sizes[axis + 1 :]) * logdet
        return sign, logabsdet


def _decompose(signal, metric, like) -> tuple:
    """Return the eigenvalues, the eigenvectors and ``log det D`` of one axis."""
    if metric is None:
        if signal is None:
            return pt.ones_like(pt.diagonal(like, axis1=-2, axis2=-1)), _identity_like(like), None
        return *_eigh(signal), None
    root = Root(pt.linalg.cholesky(metric))
    if signal is None:
        inverse = root.whiten(pt.eye(like.shape[-1], dtype=metric.type.dtype))
        return pt.ones_like(pt.diagonal(like, axis1=-2, axis2=-1)), inverse.mT, root.logdet
    # S P = D P w is the symmetric problem (C^-1 S C^-T) Q = Q w with P = C^-T Q
    values, vectors = _eigh(root.whiten(root.whiten(signal).mT))
    return values, pt.linalg.solve_triangular(root.chol.mT, vectors, lower=False), root.logdet


def _eigh(matrix: TensorVariable) -> tuple[TensorVariable, TensorVariable]:
    """Return eigenvalues and eigenvectors, with NaN eigenvalues of a matrix that isn't finite.

    LAPACK may run for ever on NaN, and SciPy raises an error. A sampler that has strayed off
    needs to be told NaN, as by a Cholesky factor.
    """
    is_finite = pt.all(pt.lt(pt.abs(matrix), np.inf), axis=(-2, -1), keepdims=True)
    values, vectors = pt.linalg.eigh(pt.switch(is_finite, matrix, 0).astype(matrix.type.dtype))
    return pt.switch(is_finite[..., 0], values, np.nan).astype(values.type.dtype), vectors


def _identity_like(matrix: TensorVariable) -> TensorVariable:
    [size] = column_sizes([matrix])
    return pt.eye(size, dtype=matrix.type.dtype)


def _summed_to(gradient: TensorVariable, like: TensorVariable) -> TensorVariable:
    """Sum a gradient over the axes along which its variable was broadcast."""
    extra = gradient.type.ndim - like.type.ndim
    if extra > 0:
        gradient = gradient.sum(axis=tuple(range(extra)))
    broadcast = [
        axis
        for axis, (one, other) in enumerate(
            zip(like.type.broadcastable, gradient.type.broadcastable, strict=True)
        )
        if one and not other
    ]
    return gradient.sum(axis=broadcast, keepdims=True) if broadcast else gradient


def _as_low_rank(kron_sum: KronSum, left: TensorVariable, right: TensorVariable) -> LowRank:
    """Return the sum of the outer products of a batch of vectors, ``(..., N)`` each.

    Over the leading dimensions that the sum of products doesn't have itself.
    """
    n_shared = left.type.ndim - 1 - kron_sum.batch_ndim
    if n_shared <= 0:
        return LowRank(left[..., None], right[..., None])

    def as_columns(vectors):
        columns = pt.moveaxis(vectors, range(n_shared), range(-n_shared, 0))
        return columns.reshape((*tuple(columns.shape)[:-n_shared], -1))

    return LowRank(as_columns(left), as_columns(right))


class KronSumOp(TensorSymbolicOp):
    """An operation on a `KronSum`, whose parts are its inputs."""

    __props__: tuple[str, ...] = ("layout",)
    inline = True

    def split(self, inputs) -> tuple[KronSum, list[TensorVariable]]:
        """Return the sum and the inputs that don't belong to it."""
        has_metric = self.layout.has_metric
        n_parts = len(self.layout.uses_signal) + len(has_metric) + sum(has_metric)
        return KronSum.from_inputs(self.layout, inputs[:n_parts]), inputs[n_parts:]


class DefiniteKronSumOp(KronSumOp):
    """An operation that takes the sum to be positive definite if `definite` is set.

    Where the sum isn't, the result is NaN then, as that of a Cholesky factor is.
    """

    __props__ = ("layout", "definite")
    definite = False

    def eigenvalues(self, basis: Basis) -> TensorVariable:
        """Return the eigenvalues to divide by."""
        if not self.definite:
            return basis.values
        exists = pt.all(pt.gt(basis.values, 0), axis=-1, keepdims=True)
        return pt.switch(exists, basis.values, np.nan).astype(basis.values.type.dtype)


class KronSumSolve(DefiniteKronSumOp):
    """Solution of a system with a `KronSum`: ``...,(N)->(N)``, batched over the vectors."""

    def build_inner_graph(self, *inputs):
        kron_sum, [b] = self.split(inputs)
        basis = kron_sum.basis()
        return [kron_matmul(basis.vectors, basis.project(b) / self.eigenvalues(basis))]

    def pullback(self, inputs, outputs, cotangents):
        kron_sum, [_b] = self.split(inputs)
        [x], [x_bar] = outputs, cotangents
        b_bar = self(*kron_sum.inputs, x_bar)
        term = _as_low_rank(kron_sum, -b_bar, x)
        return [*kron_sum.pull_back(term), _summed_to(b_bar, inputs[-1])]


class KronSumQuadratic(DefiniteKronSumOp):
    """Quadratic form of the inverse of a `KronSum`: ``...,(N)->()``, batched over the vectors."""

    def build_inner_graph(self, *inputs):
        kron_sum, [b] = self.split(inputs)
        basis = kron_sum.basis()
        return [(basis.project(b) ** 2 / self.eigenvalues(basis)).sum(axis=-1)]

    def pullback(self, inputs, outputs, cotangents):
        kron_sum, [b] = self.split(inputs)
        [form_bar] = cotangents
        x = KronSumSolve(layout=self.layout, definite=self.definite)(*inputs)
        scaled = form_bar[..., None] * x
        term = _as_low_rank(kron_sum, -scaled, x)
        return [*kron_sum.pull_back(term), _summed_to(2 * scaled, b)]


class KronSumSLogDet(KronSumOp):
    """Sign and log absolute determinant of a `KronSum`: ``...->(),()``."""

    def build_inner_graph(self, *inputs):
        kron_sum, _ = self.split(inputs)
        return list(kron_sum.basis().slogdet())

    def pullback(self, inputs, outputs, cotangents):
        kron_sum, _ = self.split(inputs)
        _, logabsdet_bar = cotangents
        if isinstance(logabsdet_bar.type, DisconnectedType):
            return [inp.zeros_like() for inp in inputs]
        basis = kron_sum.basis()
        term = Product(basis.vectors, logabsdet_bar[..., None] / basis.values, basis.vectors)
        return kron_sum.pull_back(term)
