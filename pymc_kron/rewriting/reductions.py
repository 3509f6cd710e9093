"""``sum(A (x) B) = sum(A) sum(B)``, also along one axis, along the diagonal, and of squares."""

from pytensor import tensor as pt
from pytensor.tensor.basic import ExtractDiag, atleast_Nd
from pytensor.tensor.elemwise import DimShuffle
from pytensor.tensor.math import Dot, Sum, variadic_mul
from pytensor.tensor.shape import Reshape

from pymc_kron.linalg import kron_of_vectors
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.conforming import SAME_SHAPE, conforming_factors, refuse_overflow
from pymc_kron.rewriting.facts import are_square
from pymc_kron.rewriting.indexing import is_of_last_axes
from pymc_kron.structure import kron_factors, refuse_dtype, split_scalars


@register_kron(Sum)
def sum_of_kron(fgraph, node):
    """sum(A (x) B) -> sum(A) * sum(B); sum(A (x) B, axis) -> sum(A, axis) (x) sum(B, axis)

    And ``trace(A (x) B) -> trace(A) * trace(B)``. Sums over batch dimensions are left over.
    """
    [X] = node.inputs
    [old_out] = node.outputs
    ndim = X.type.ndim
    is_trace = isinstance(X.owner_op, ExtractDiag) and is_of_last_axes(X.owner)
    K = X.owner.inputs[0] if is_trace else X
    factors = kron_factors(K)
    if factors is None:
        return None
    axes = set(range(ndim) if node.op.axis is None else node.op.axis)
    core_ndim = 1 if is_trace else 2
    core_axes = axes & set(range(ndim - core_ndim, ndim))
    if not core_axes:
        return None
    if is_trace and (X.owner.op.offset != 0 or not are_square(fgraph, factors)):
        # Left to the gathered diagonal
        return None
    refuse_dtype(K, "fciu")
    refuse_overflow(K, factors, old_out)

    def total(x, axis):
        return pt.sum(x, axis=axis, dtype=old_out.type.dtype, acc_dtype=node.op.acc_dtype)

    summands = [factor.astype(K.type.dtype) for factor in factors]
    if is_trace:
        summands = [pt.diagonal(summand, axis1=-2, axis2=-1) for summand in summands]
    sums = [total(summand, [axis - ndim for axis in core_axes]) for summand in summands]
    new_out = variadic_mul(*sums) if len(core_axes) == core_ndim else kron_of_vectors(sums)
    batch_axes = axes - core_axes
    if batch_axes:
        new_out = total(atleast_Nd(new_out, n=ndim - len(core_axes)), sorted(batch_axes))
    return [as_replacement(old_out, new_out)]


@register_kron(Dot)
def frobenius_product_of_kron(fgraph, node):
    """vec(A (x) B)' vec(C (x) D) -> sum(A * C) * sum(B * D), as in ``pt.linalg.norm``"""
    (left, left_scales), (right, right_scales) = map(_flattened_matrix, node.inputs)
    [old_out] = node.outputs
    if left is None or right is None or old_out.type.broadcastable != (True, True):
        return None
    left_factors, right_factors = kron_factors(left), kron_factors(right)
    refuse_dtype(old_out, "fciu")
    refuse_overflow(left, left_factors, old_out)
    refuse_overflow(right, right_factors, old_out)
    dtype = old_out.type.dtype
    if left is right:
        pairs = [(factor, factor) for factor in left_factors]
    else:
        pairs = conforming_factors(left_factors, right_factors, SAME_SHAPE)
    sums = [(a.astype(dtype) * c.astype(dtype)).sum(dtype=dtype) for a, c in pairs]
    return [as_replacement(old_out, variadic_mul(*left_scales, *right_scales, *sums))]


def _flattened_matrix(var):
    """Return the Kronecker product whose entries, times scalars, a row or a column holds."""
    scales = []
    while True:
        if var.type.numpy_dtype.kind in "fc":
            # PyTensor takes the sign of -K out of its Reshape
            var, more_scales = split_scalars(var, core_ndim=var.type.ndim)
            scales += [scale.squeeze() for scale in more_scales]
        match var.owner_op_and_inputs:
            case (DimShuffle(), inner):
                var = inner
            # With one axis that isn't of size one, the entries keep their order
            case (Reshape(), K, _) if (
                var.type.broadcastable.count(False) <= 1
                and K.type.ndim == 2
                and kron_factors(K) is not None
            ):
                return K, scales
            case _:
                return None, scales
