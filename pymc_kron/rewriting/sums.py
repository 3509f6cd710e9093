"""Reading a matrix as a sum of Kronecker products that one basis diagonalises.

What people write for a covariance with noise, ``kron(A, B) + s**2 * pt.eye(N)``,
``kron(A, B) + kron(C, D)`` and ``kron(A, I) + kron(I, B)``, becomes a `KronSum`.
"""

from collections.abc import Sequence
from functools import cache

from pytensor import tensor as pt
from pytensor.graph.basic import Constant
from pytensor.graph.fg import FunctionGraph
from pytensor.scalar.basic import Add, Mul, Neg, ScalarOp, Second, Sub, TrueDiv
from pytensor.tensor.basic import Alloc, ExtractDiag
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.shape import Reshape
from pytensor.tensor.variable import TensorVariable

from pymc_kron.kron_sum import KronSum, Layout
from pymc_kron.rewriting.facts import is_promised_symmetric, nan_unless_symmetric
from pymc_kron.sizes import Sizes
from pymc_kron.structure import (
    Matrices,
    Refusal,
    is_identity,
    is_positive_definite,
    is_provably_not_square,
    is_scalar,
    is_symmetric,
    refuse_dtype,
    strip_transposes,
    without_assumptions,
)
from pymc_kron.terms import Product, Term, may_have_factors, require_agreement, terms_of

type Parts = list[tuple[Matrices, Matrices | None]]


def kron_sum_of(fgraph: FunctionGraph, var: TensorVariable) -> KronSum | None:
    """Return what diagonalises a symmetric sum of Kronecker products, or None if it is no sum.

    Raises
    ------
    Refusal
        If one basis isn't known to diagonalise the sum, or the matrices aren't known to be
        symmetric.
    """
    core, _ = strip_transposes(without_assumptions(var))
    parts = read_sum(core)
    if parts is None:
        return None
    refuse_dtype(var, "f")

    splits = [factors for _, factors in parts if factors is not None]
    for factors in splits[1:]:
        require_agreement(splits[0], -2, factors, -2)
    n_axes = len(splits[0])
    uses_signal: list[list[bool]] = [[] for _ in parts]
    signals: list[TensorVariable] = []
    metrics: list[TensorVariable] = []
    has_metric: list[bool] = []
    for axis in range(n_axes):
        own = [None if factors is None else factors[axis] for _, factors in parts]
        signal, metric = _signal_and_metric(fgraph, axis, own)
        like = next(matrix for matrix in own if matrix is not None)
        for flags, matrix in zip(uses_signal, own, strict=True):
            flags.append(signal is not None and matrix is not None and _is_same(matrix, signal))
        signals.append(like if signal is None else _symmetric(fgraph, var, axis, signal))
        has_metric.append(metric is not None)
        if metric is not None:
            metrics.append(metric)

    dtype = var.type.dtype
    scales = [scalar_product(scales, dtype) for scales, _ in parts]
    layout = Layout(tuple(map(tuple, uses_signal)), tuple(has_metric))
    return KronSum(
        layout,
        scales,
        [signal.astype(dtype) for signal in signals],
        [metric.astype(dtype) for metric in metrics],
    )


def read_sum(var: TensorVariable) -> Parts | None:
    """Return the scalars and the factors of each term, with None for an identity matrix.

    None if there is no Kronecker product in the sum, or nothing else.

    Raises
    ------
    Refusal
        If anything else than Kronecker products and multiples of the identity is in the sum.
    """
    core = without_assumptions(var)
    addends = _addends(core)
    if addends is None:
        return None
    sizes = Sizes(core)
    # What kron_sum_of is asked for, only a square matrix has
    for addend in addends:
        if addend.type.ndim > 1 and not any(addend.type.broadcastable[-2:]):
            sizes.note_square(addend)
    known = [
        terms_of(addend, sizes)
        for addend in addends
        if not is_scalar(addend) and may_have_factors(addend, sizes)
    ]
    if not any(
        isinstance(term, Product) and term.left is not None
        for terms in known
        for term in terms or ()
    ):
        return None
    terms = terms_of(core, sizes)
    if terms is None:
        raise Refusal(
            "a matrix that is no Kronecker product is added to it",
            "add a multiple of the identity or a Kronecker product of the same factors' sizes",
        )
    parts = [part_of_sum(term) for term in terms]
    return None if all(factors is None for _, factors in parts) else parts


def _addends(var: TensorVariable) -> Matrices | None:
    """Return the terms of a sum, without the scalars that it may be multiplied with.

    The sum may be transposed; its terms aren't.
    """
    core, _ = strip_transposes(without_assumptions(var))
    match core.owner_op_and_inputs:
        case (Elemwise(scalar_op=Add() | Sub()), *addends):
            return addends
        case (Elemwise(scalar_op=Neg()), matrix):
            return _addends(matrix)
        case (Elemwise(scalar_op=TrueDiv()), matrix, divisor) if is_scalar(divisor):
            return _addends(matrix)
        case (Elemwise(scalar_op=Mul()), *inputs):
            matrices = [inp for inp in inputs if not is_scalar(inp)]
            return _addends(matrices[0]) if len(matrices) == 1 else None
    return None


def part_of_sum(term: Term) -> tuple[Matrices, Matrices | None]:
    """Return the scalars and the factors of a term, with None for an identity matrix."""
    match term:
        case Product(left=left, diagonal=None, scales=scales):
            if left is None or all(map(is_identity, left)):
                return scales, None
            for i, factor in enumerate(left, 1):
                if is_provably_not_square(factor):
                    raise Refusal(
                        f"factor {i} is {factor.type.shape[-2]} x {factor.type.shape[-1]}",
                        "only sums of products of square factors are diagonal in one basis",
                    )
            return scales, left
        case Product(left=None, diagonal=diagonal, right=None, scales=scales):
            entry = _constant_entry(diagonal)
            if entry is not None:
                return (*scales, entry), None
            raise Refusal(
                "the diagonal matrix that is added to it isn't known to be a multiple of the "
                "identity",
                "write noise that is the same everywhere as sigma**2 * pt.eye(N), and noise that "
                "differs between the levels of a factor as a Kronecker product of diagonal "
                "matrices that are known to be positive definite, "
                "pytensor.assumptions.assume(pt.diag(v), positive_definite=True)",
            )
    raise Refusal(
        "a matrix that is no Kronecker product is added to it",
        "add a multiple of the identity or a Kronecker product of the same factors' sizes",
    )


def _constant_entry(vector: TensorVariable) -> TensorVariable | None:
    """Return the scalar that all entries of a vector are equal to, if the graph shows that."""
    if not all(vector.type.broadcastable[:-1]):
        # One scalar wouldn't have the batch dimensions of the vectors
        return None

    @cache
    def entry_of(array: TensorVariable) -> TensorVariable | None:
        if all(array.type.broadcastable):
            return array.squeeze()
        match array:
            case Constant(data=data) if data.size and (data == data.flat[0]).all():
                return pt.constant(data.flat[0])
        match array.owner_op_and_inputs:
            case (Elemwise(scalar_op=Second()), _, value):
                return entry_of(value)
            case (Alloc() | DimShuffle() | Reshape(), value, *_):
                return entry_of(value)
            case (ExtractDiag(offset=0), matrix) if is_identity(matrix):
                return pt.constant(1, dtype=matrix.type.dtype)
            case (Elemwise(scalar_op=ScalarOp(nout=1)) as op, *inputs):
                # f(c 1, d 1, ...) = f(c, d, ...) 1
                entries = [entry_of(inp) for inp in inputs]
                return None if None in entries else op(*entries)
        return None

    return entry_of(vector)


def scalar_product(scalars: Sequence[TensorVariable], dtype: str) -> TensorVariable:
    """Return the product of some scalars, as a variable of the given dtype."""
    product = pt.constant(1.0, dtype=dtype)
    for i, scalar in enumerate(scalars):
        product = scalar.astype(dtype) if i == 0 else product * scalar
    return product.astype(dtype)


def _is_same(left: TensorVariable, right: TensorVariable) -> bool:
    return left is right or (isinstance(left, Constant) and left.equals(right))


def _signal_and_metric(
    fgraph: FunctionGraph, axis: int, matrices: Sequence[TensorVariable | None]
) -> tuple[TensorVariable | None, TensorVariable | None]:
    """Choose which matrix of an axis is the signal, and which the metric."""
    distinct: list[TensorVariable] = []
    for matrix in matrices:
        if (
            matrix is not None
            and not is_identity(matrix)
            and not any(_is_same(matrix, other) for other in distinct)
        ):
            distinct.append(matrix)
    has_identity = any(matrix is None or is_identity(matrix) for matrix in matrices)
    match distinct:
        case []:
            return None, None
        case [signal]:
            return signal, None
        case [signal, metric] if not has_identity:
            if is_positive_definite(fgraph, metric):
                return signal, metric
            if is_positive_definite(fgraph, signal):
                return metric, signal
            raise Refusal(
                f"of the two matrices for factor {axis + 1}, none is known to be positive definite",
                "say so: pytensor.assumptions.assume(C, positive_definite=True)",
            )
    n_matrices = len(distinct) + has_identity
    raise Refusal(
        f"factor {axis + 1} differs between {n_matrices} terms, and one basis diagonalises two "
        "matrices",
        "use the same matrix, or the identity, in the other terms",
    )


def _symmetric(
    fgraph: FunctionGraph, var: TensorVariable, axis: int, signal: TensorVariable
) -> TensorVariable:
    if is_symmetric(fgraph, signal):
        return signal
    if is_promised_symmetric(fgraph, var):
        return nan_unless_symmetric(fgraph, signal)
    raise Refusal(
        f"factor {axis + 1} isn't known to be symmetric",
        "say so: assume_a='pos' in the solve, or pytensor.assumptions.assume(A, symmetric=True)",
    )
