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

import numpy as np
from pytensor import tensor as pt
from pytensor.gradient import DisconnectedType
from pytensor.graph.basic import Apply
from pytensor.tensor.variable import TensorVariable

from pymc_kron.closed_form import ClosedFormOp, summed_to
from pymc_kron.kernels import Multiply, finite_eigh
from pymc_kron.linalg import apply_to_vectors, copies_of, factors_batch_ndim, kron_of_vectors
from pymc_kron.roots import CholeskyRoot
from pymc_kron.structure import Matrices, column_sizes, with_square_shape
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
    is_decomposed
        For each axis, whether the signal is given by its eigenvectors and eigenvalues.
    """

    uses_signal: tuple[tuple[bool, ...], ...]
    has_metric: tuple[bool, ...]
    is_decomposed: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.is_decomposed:
            object.__setattr__(self, "is_decomposed", (False,) * len(self.has_metric))

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
        For each axis, ``S_i``, ``(..., n_i, n_i)``, or its eigenvectors where it is decomposed;
        on an axis without a signal, an identity.
    metrics
        For each axis that has one, ``D_i``.
    eigenvalues
        For each axis whose signal is decomposed, its eigenvalues, ``(..., n_i)``.
    """

    layout: Layout
    scales: Matrices
    signals: Matrices
    metrics: Matrices = ()
    eigenvalues: Matrices = ()

    @property
    def inputs(self) -> list[TensorVariable]:
        """All variables, as the inputs of an operation."""
        return [*self.scales, *self.signals, *self.metrics, *self.eigenvalues]

    @classmethod
    def from_inputs(cls, layout: Layout, inputs: Sequence[TensorVariable]) -> "KronSum":
        """Return the sum whose `inputs` these are."""
        remaining = iter(inputs)
        counts = map(len, (layout.uses_signal, layout.has_metric))
        scales, signals = ([next(remaining) for _ in range(count)] for count in counts)
        metrics = [next(remaining) for _ in range(sum(layout.has_metric))]
        return cls(layout, scales, signals, metrics, list(remaining))

    @classmethod
    def core_ndims(cls, layout: Layout) -> list[int]:
        """Return the number of core dimensions of each of the `inputs`."""
        n_matrices = len(layout.has_metric) + sum(layout.has_metric)
        return [0] * len(layout.uses_signal) + [2] * n_matrices + [1] * sum(layout.is_decomposed)

    @property
    def batch_ndim(self) -> int:
        """The number of batch dimensions of the sum."""
        return max(
            inp.type.ndim - core_ndim
            for inp, core_ndim in zip(self.inputs, self.core_ndims(self.layout), strict=True)
        )

    @property
    def axes(self) -> list["Axis"]:
        """What there is on each axis."""
        metrics, eigenvalues = iter(self.metrics), iter(self.eigenvalues)
        return [
            Axis(
                signal,
                next(eigenvalues) if is_decomposed else None,
                next(metrics) if has_metric else None,
                self.layout.has_signal(i),
            )
            for i, (signal, is_decomposed, has_metric) in enumerate(
                zip(self.signals, self.layout.is_decomposed, self.layout.has_metric, strict=True)
            )
        ]

    def factors(self, term: int) -> list[TensorVariable]:
        """Return the factors of a term."""
        return [
            axis.signal_matrix if uses_signal else axis.metric_matrix
            for uses_signal, axis in zip(self.layout.uses_signal[term], self.axes, strict=True)
        ]

    def basis(self) -> "Basis":
        """Return what diagonalises the sum."""
        axes = [axis.decompose() for axis in self.axes]
        values = [
            scale[..., None] * self.eigenvalues_of(term, axes)
            for term, scale in enumerate(self.scales)
        ]
        if not any(map(any, self.layout.uses_signal)):
            values.append(pt.zeros_like(kron_of_vectors([axis.values for axis in axes])))
        return Basis(axes, reduce(pt.add, values))

    def eigenvalues_of(self, term: int, axes: Sequence["AxisBasis"]) -> TensorVariable:
        """Return the eigenvalues of a term, ``v_t1 (x) ... (x) v_td``, or a one for all."""
        if not any(self.layout.uses_signal[term]):
            return pt.ones((1,), dtype=axes[0].values.type.dtype)
        return kron_of_vectors(self.term_values(term, axes))

    def term_values(self, term: int, axes: Sequence["AxisBasis"]) -> list[TensorVariable]:
        """Return the eigenvalues of the factors of a term, ``v_ti``."""
        return [
            axis.values if uses_signal else pt.ones_like(axis.values)
            for uses_signal, axis in zip(self.layout.uses_signal[term], axes, strict=True)
        ]

    def roots(self, basis: "Basis") -> list[TensorVariable]:
        """Return ``inv(P_i)'`` for each axis: ``M = R diag(Lambda) R'`` with their product R."""
        # P' D P = I
        return [
            vectors if axis.metric is None else axis.metric @ vectors
            for axis, vectors in zip(self.axes, basis.vectors, strict=True)
        ]

    def pull_back(self, term: Term) -> list[TensorVariable]:
        """Return the gradients in all `inputs`, given the gradient in the sum as a term."""
        scale_gradients = []
        in_signals: list[TensorVariable | None] = [None] * len(self.axes)
        in_metrics: list[TensorVariable | None] = [None] * len(self.axes)
        for t, scale in enumerate(self.scales):
            factors = self.factors(t)
            scale_gradients.append(summed_to(inner(term, Product(factors)), scale))
            for i, uses_signal in enumerate(self.layout.uses_signal[t]):
                gradients = in_signals if uses_signal else in_metrics
                if uses_signal or self.layout.has_metric[i]:
                    part = scale[..., None, None] * contract(term, factors, i, i + 1)
                    part = summed_to(part, factors[i])
                    known = gradients[i]
                    gradients[i] = part if known is None else known + part
        return [*scale_gradients, *self.gradients_in_matrices(in_signals, in_metrics)]

    def gradients_in_matrices(
        self,
        in_signals: Sequence[TensorVariable | None],
        in_metrics: Sequence[TensorVariable | None],
    ) -> list[TensorVariable]:
        """Return the gradients in all `inputs` but the scalars.

        Parameters
        ----------
        in_signals, in_metrics
            For each axis, the gradients in ``S_i`` and ``D_i``, or None where there is none.
        """
        signals, metrics, eigenvalues = [], [], []
        for axis, in_signal, in_metric in zip(self.axes, in_signals, in_metrics, strict=True):
            if in_signal is None:
                # Only the size of the matrix counts
                signals.append(axis.signal.zeros_like())
            elif axis.eigenvalues is None:
                signals.append(in_signal)
            else:
                # dS = dQ w Q' + Q dw Q' + Q w dQ'
                rotated = in_signal @ axis.signal
                both = rotated + in_signal.mT @ axis.signal
                signals.append(summed_to(both * axis.eigenvalues[..., None, :], axis.signal))
                in_values = (axis.signal * rotated).sum(axis=-2)
                eigenvalues.append(summed_to(in_values, axis.eigenvalues))
            if axis.metric is not None:
                metrics.append(axis.metric.zeros_like() if in_metric is None else in_metric)
        return [*signals, *metrics, *eigenvalues]


@dataclass(frozen=True)
class Axis:
    """What a `KronSum` has on one axis.

    Attributes
    ----------
    signal
        The signal ``S``, ``(..., n, n)``, or its eigenvectors.
    eigenvalues
        Its eigenvalues, ``(..., n)``, or None where they aren't given.
    metric
        The metric ``D``, or None for the identity.
    has_signal
        Whether any term has the signal.
    """

    signal: TensorVariable
    eigenvalues: TensorVariable | None
    metric: TensorVariable | None
    has_signal: bool

    @property
    def signal_matrix(self) -> TensorVariable:
        """The signal."""
        if self.eigenvalues is None:
            return self.signal
        return (self.signal * self.eigenvalues[..., None, :]) @ self.signal.mT

    @property
    def metric_matrix(self) -> TensorVariable:
        """The metric."""
        if self.metric is not None:
            return self.metric
        [size] = column_sizes([self.signal])
        return pt.eye(size, dtype=self.signal.type.dtype)

    def decompose(self) -> "AxisBasis":
        """Return the generalised eigenvalues and eigenvectors."""
        ones = pt.ones_like(pt.diagonal(self.signal, axis1=-2, axis2=-1))
        if self.metric is None:
            if not self.has_signal:
                return AxisBasis(ones, self.metric_matrix, None)
            if self.eigenvalues is not None:
                return AxisBasis(self.eigenvalues, self.signal, None)
            return AxisBasis(*finite_eigh(self._with_known_sizes(self.signal)), None)
        root = CholeskyRoot(pt.linalg.cholesky(self.metric))
        if not self.has_signal:
            inverse = root.whiten(pt.eye(self.metric.shape[-1], dtype=self.metric.type.dtype))
            return AxisBasis(ones, inverse.mT, root.logdet)
        # S P = D P w is the symmetric problem (C^-1 S C^-T) Q = Q w with P = C^-T Q
        whitened = root.whiten(root.whiten(self.signal_matrix).mT)
        values, vectors = finite_eigh(self._with_known_sizes(whitened))
        return AxisBasis(values, root.unwhiten(vectors), root.logdet)

    def _with_known_sizes(self, matrix: TensorVariable) -> TensorVariable:
        matrices = [self.signal] if self.metric is None else [self.signal, self.metric]
        return with_square_shape(matrix, *matrices)


@dataclass(frozen=True)
class AxisBasis:
    """The generalised eigenvectors of one axis.

    Attributes
    ----------
    values
        The eigenvalues ``w``, ``(..., n)``, ones where there is no signal.
    vectors
        The matrix ``P``, whose columns are the eigenvectors.
    metric_logdet
        ``log det D``, or None for the identity.
    """

    values: TensorVariable
    vectors: TensorVariable
    metric_logdet: TensorVariable | None


@dataclass(frozen=True)
class Basis:
    """What diagonalises a `KronSum`.

    Attributes
    ----------
    axes
        The eigenvectors of each axis.
    values
        ``Lambda``, ``(..., n_1*...*n_d)``.
    """

    axes: Sequence[AxisBasis]
    values: TensorVariable

    @property
    def vectors(self) -> list[TensorVariable]:
        """For each axis, ``P_i``."""
        return [axis.vectors for axis in self.axes]

    def project(self, x: TensorVariable) -> TensorVariable:
        """Return ``P' x`` of a batch of vectors, ``(n_1*...*n_d)->(n_1*...*n_d)``."""
        return self._apply([vectors.mT for vectors in self.vectors], x)

    def combine(self, z: TensorVariable) -> TensorVariable:
        """Return ``P z`` of a batch of vectors, ``(n_1*...*n_d)->(n_1*...*n_d)``."""
        return self._apply(self.vectors, z)

    def _apply(self, matrices: Matrices, x: TensorVariable) -> TensorVariable:
        sizes = column_sizes(self.vectors)
        batch_ndim = factors_batch_ndim(self.vectors)
        return apply_to_vectors(
            list(map(Multiply, matrices)), sizes, sizes, x, batch_ndim=batch_ndim
        )

    def slogdet(self) -> tuple[TensorVariable, TensorVariable]:
        """Return the sign and the log absolute determinant of the sum."""
        sign = pt.sign(self.values).prod(axis=-1)
        logabsdet = pt.log(pt.abs(self.values)).sum(axis=-1)
        sizes = column_sizes(self.vectors)
        for i, axis in enumerate(self.axes):
            if axis.metric_logdet is not None:
                logabsdet = logabsdet + copies_of(sizes, i) * axis.metric_logdet
        return sign, logabsdet


def as_low_rank(kron_sum: KronSum, left: TensorVariable, right: TensorVariable) -> LowRank:
    """Return the sum of the outer products of a batch of vectors, ``(..., N)`` each.

    Over the leading dimensions that the sum of products doesn't have itself.
    """
    n_shared = left.type.ndim - 1 - kron_sum.batch_ndim
    if n_shared <= 0:
        return LowRank(left[..., None], right[..., None])

    def as_columns(vectors: TensorVariable) -> TensorVariable:
        columns = pt.moveaxis(vectors, range(n_shared), range(-n_shared, 0))
        return columns.reshape((*tuple(columns.shape)[:-n_shared], -1))

    return LowRank(as_columns(left), as_columns(right))


class KronSumOp(ClosedFormOp):
    """An operation on a `KronSum`, whose parts are its inputs."""

    __props__: tuple[str, ...] = ("layout",)
    layout: Layout

    def split(self, inputs: Matrices) -> tuple[KronSum, Matrices]:
        """Return the sum and the inputs that don't belong to it."""
        n_parts = len(KronSum.core_ndims(self.layout))
        return KronSum.from_inputs(self.layout, inputs[:n_parts]), inputs[n_parts:]

    def connection_pattern(self, node: Apply) -> list[list[bool]]:
        """Return that all inputs count: the gradient in a signal that only has a size is zero."""
        return [[True] * len(node.outputs) for _ in node.inputs]


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

    def build_inner_graph(self, *inputs: TensorVariable) -> list[TensorVariable]:
        kron_sum, [b] = self.split(inputs)
        basis = kron_sum.basis()
        return [basis.combine(basis.project(b) / self.eigenvalues(basis))]

    def pullback(
        self, inputs: Matrices, outputs: Matrices, cotangents: Matrices
    ) -> list[TensorVariable]:
        kron_sum, [_b] = self.split(inputs)
        [x], [x_bar] = outputs, cotangents
        b_bar = self(*kron_sum.inputs, x_bar)
        term = as_low_rank(kron_sum, -b_bar, x)
        return [*kron_sum.pull_back(term), summed_to(b_bar, inputs[-1])]


class KronSumQuadratic(DefiniteKronSumOp):
    """Quadratic form of the inverse of a `KronSum`: ``...,(N)->()``, batched over the vectors."""

    def build_inner_graph(self, *inputs: TensorVariable) -> list[TensorVariable]:
        kron_sum, [b] = self.split(inputs)
        basis = kron_sum.basis()
        return [(basis.project(b) ** 2 / self.eigenvalues(basis)).sum(axis=-1)]

    def pullback(
        self, inputs: Matrices, outputs: Matrices, cotangents: Matrices
    ) -> list[TensorVariable]:
        kron_sum, [b] = self.split(inputs)
        [form_bar] = cotangents
        x = KronSumSolve(layout=self.layout, definite=self.definite)(*inputs)
        scaled = form_bar[..., None] * x
        term = as_low_rank(kron_sum, -scaled, x)
        return [*kron_sum.pull_back(term), summed_to(2 * scaled, b)]


class KronSumSLogDet(KronSumOp):
    """Sign and log absolute determinant of a `KronSum`: ``...->(),()``."""

    def build_inner_graph(self, *inputs: TensorVariable) -> list[TensorVariable]:
        kron_sum, _ = self.split(inputs)
        return list(kron_sum.basis().slogdet())

    def pullback(
        self, inputs: Matrices, outputs: Matrices, cotangents: Matrices
    ) -> list[TensorVariable]:
        kron_sum, _ = self.split(inputs)
        _, logabsdet_bar = cotangents
        if isinstance(logabsdet_bar.type, DisconnectedType):
            return [inp.zeros_like() for inp in inputs]
        basis = kron_sum.basis()
        term = Product(basis.vectors, logabsdet_bar[..., None] / basis.values, basis.vectors)
        return kron_sum.pull_back(term)
