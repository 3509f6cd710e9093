"""``x' (A (x) B)^-1 x = |(L_A^-1 (x) L_B^-1) x|^2``: one sweep over the factors, not two."""

from pytensor.graph.rewriting.unify import OpPattern
from pytensor.scalar.basic import Mul
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import factors_batch_ndim, sum_of_squares
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import positive_definite_factors, root_of
from pymc_kron.structure import column_sizes, is_empty, square_kron_factors, strip_transposes


@register_kron(blockwise_of(OpPattern(Solve, assume_a="pos", b_ndim=1)))
def whitened_norm_of_kron_solve(fgraph, node):
    """x @ solve(A (x) B, x, assume_a="pos") -> |(whiten_A (x) whiten_B) x|^2

    Also ``(x * solve(A (x) B, x)).sum(-1)``, for a batch of vectors x. Only where the solution
    is used for nothing else, since it would have to be computed all the same.
    """
    K, b = node.inputs
    factors = square_kron_factors(K, real=True)
    if factors is None or is_empty(b) or b.type.numpy_dtype.kind == "c":
        return None
    form = _quadratic_form_in(fgraph, node)
    if form is None:
        return None
    old_out, batch_axes = form

    sizes = column_sizes(factors)
    roots = [root_of(fgraph, factor) for factor in positive_definite_factors(fgraph, factors)]
    norms = sum_of_squares(
        [root.whiten for root in roots], sizes, b, batch_ndim=factors_batch_ndim(factors)
    )
    return {old_out: as_replacement(old_out, norms.sum(axis=batch_axes))}


def _quadratic_form_in(fgraph, solve_node):
    """Return the quadratic form of the solution with its right-hand side.

    And the axes that are summed besides the last one.
    """
    _, b = solve_node.inputs
    [x] = solve_node.outputs
    client = _only_client(fgraph, x)
    match getattr(client, "op", None):
        case Elemwise(scalar_op=Mul()) if len(client.inputs) == 2:
            # (b * x).sum(-1)
            sum_node = _only_client(fgraph, client.out)
            if (
                sum_node is not None
                and isinstance(sum_node.op, Sum)
                and client.out.type.ndim == x.type.ndim
                and strip_transposes(_other_input(client, x)) == strip_transposes(b)
            ):
                vector_axis = x.type.ndim - 1
                axes = sum_node.op.axis
                axes = tuple(range(x.type.ndim)) if axes is None else axes
                if vector_axis in axes:
                    return sum_node.out, tuple(axis for axis in axes if axis != vector_axis)
        case DimShuffle(is_expand_dims=True) if x.type.ndim == 1:
            # b[None, :] @ x[:, None], which is what b @ x becomes
            column_or_row = client.out
            dot_node = _only_client(fgraph, column_or_row)
            if (
                dot_node is not None
                and isinstance(getattr(dot_node.op, "core_op", dot_node.op), Dot)
                and dot_node.out.type.broadcastable == (True, True)
            ):
                match _other_input(dot_node, column_or_row).owner_op_and_inputs:
                    case (DimShuffle(is_expand_dims=True), other) if other is b:
                        return dot_node.out, ()
    return None


def _other_input(node, var):
    left, right = node.inputs
    return left if right is var else right


def _only_client(fgraph, var):
    match fgraph.clients[var]:
        case [(client, _)]:
            return client
    return None
