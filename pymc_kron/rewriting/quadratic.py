"""``x' (A (x) B)^-1 x = |(L_A^-1 (x) L_B^-1) x|^2``: one sweep over the factors, not two."""

from pytensor.graph.rewriting.basic import copy_stack_trace, node_rewriter
from pytensor.graph.rewriting.unify import OpPattern
from pytensor.scalar.basic import Mul
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.rewriting.linalg.utils import strip_left_expand_dims_and_transpose

from pymc_kron.linalg import apply_to_vectors, factors_batch_ndim
from pymc_kron.rewriting.bundle import register_kron
from pymc_kron.rewriting.facts import positive_definite_factors, root_of
from pymc_kron.structure import column_sizes, is_provably_not_square, kron_factors


@register_kron
@node_rewriter([blockwise_of(OpPattern(Solve, assume_a="pos", b_ndim=1))])
def whitened_norm_of_kron_solve(fgraph, node):
    """x @ solve(A (x) B, x, assume_a="pos") -> |(whiten_A (x) whiten_B) x|^2

    Also ``(x * solve(A (x) B, x)).sum(-1)``, for a batch of vectors x. Only where the solution
    is used for nothing else, since it would have to be computed all the same.
    """
    K, b = node.inputs
    factors = kron_factors(K)
    if (
        factors is None
        or any(map(is_provably_not_square, factors))
        or K.type.numpy_dtype.kind == "c"
        or b.type.numpy_dtype.kind == "c"
    ):
        return None
    form = _quadratic_form_with(fgraph, node)
    if form is None:
        return None
    old_out, sum_op = form

    sizes = column_sizes(factors)
    roots = [root_of(fgraph, factor) for factor in positive_definite_factors(fgraph, factors)]
    whitened = apply_to_vectors(
        [root.whiten for root in roots],
        sizes,
        sizes,
        b,
        batch_ndim=factors_batch_ndim(factors),
    )
    new_out = sum_op(whitened**2)
    # The inner product of a row and a column has both of their dummy axes
    new_out = new_out.reshape((1,) * old_out.type.ndim) if sum_op.axis is None else new_out
    new_out = new_out.astype(old_out.type.dtype)
    copy_stack_trace(old_out, new_out)
    return {old_out: new_out}


def _quadratic_form_with(fgraph, node):
    """Return the quadratic form that the solution is used in and the sum in it, or None."""
    _, b = node.inputs
    [x] = node.outputs
    client = _only_client(fgraph, x)
    match getattr(client, "op", None):
        case Elemwise(scalar_op=Mul()) if len(client.inputs) == 2:
            [other] = [inp for inp in client.inputs if inp is not x] or [x]
            sum_client = _only_client(fgraph, client.out)
            if (
                sum_client is not None
                and isinstance(sum_client.op, Sum)
                and _same_up_to_left_dims(other, b)
                and x.type.ndim == client.out.type.ndim
                and (sum_client.op.axis is None or x.type.ndim - 1 in sum_client.op.axis)
            ):
                axis = sum_client.op.axis
                return sum_client.out, Sum(axis=tuple(range(x.type.ndim)) if axis is None else axis)
        case DimShuffle(is_expand_dims=True) if x.type.ndim == 1 and client.out.type.ndim == 2:
            dot_client = _only_client(fgraph, client.out)
            if dot_client is None or not isinstance(dot_client.op, Dot):
                return None
            [other] = [inp for inp in dot_client.inputs if inp is not client.out] or [x]
            match other.owner_op_and_inputs:
                case (DimShuffle(is_expand_dims=True), other_core) if (
                    other_core is b and dot_client.out.type.broadcastable == (True, True)
                ):
                    return dot_client.out, Sum(axis=None)
    return None


def _only_client(fgraph, var):
    match fgraph.clients[var]:
        case [(client, _)] if client in fgraph.apply_nodes:
            return client
    return None


def _same_up_to_left_dims(x, y):
    x_core, x_transposed = strip_left_expand_dims_and_transpose(x)
    y_core, y_transposed = strip_left_expand_dims_and_transpose(y)
    return x_core is y_core and x_transposed == y_transposed
