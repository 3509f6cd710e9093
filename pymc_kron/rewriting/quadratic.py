"""``x' (A (x) B)^-1 x = |(L_A^-1 (x) L_B^-1) x|^2``: one sweep over the factors, not two."""

import numpy as np
from pytensor.graph.rewriting.unify import OpPattern
from pytensor.scalar.basic import Mul, Pow, Sqr
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
    form = quadratic_form_in(fgraph, node)
    if form is None:
        return None
    old_out, batch_axes = form

    sizes = column_sizes(factors)
    roots = [root_of(fgraph, factor) for factor in positive_definite_factors(fgraph, factors)]
    norms = sum_of_squares(
        [root.whiten for root in roots], sizes, b, batch_ndim=factors_batch_ndim(factors)
    )
    return {old_out: as_replacement(old_out, norms.sum(axis=batch_axes))}


def quadratic_form_in(fgraph, solve_node):
    """Return the quadratic form of the solution with its right-hand side.

    And the axes that are summed besides the last one.
    """
    _, b = solve_node.inputs
    [x] = solve_node.outputs
    client = _only_client(fgraph, x)
    match getattr(client, "op", None):
        case Elemwise(scalar_op=Mul()) if len(client.inputs) == 2:
            # (b * x).sum(-1)
            if strip_transposes(_other_input(client, x)) == strip_transposes(b):
                return _sum_over_vectors(fgraph, client.out, x)
        case DimShuffle(is_expand_dims=True) if x.type.ndim == 1:
            # b[None, :] @ x[:, None], which is what b @ x becomes
            column_or_row = client.out
            dot_node = _only_client(fgraph, column_or_row)
            if _is_inner_product(dot_node):
                match _other_input(dot_node, column_or_row).owner_op_and_inputs:
                    case (DimShuffle(is_expand_dims=True), other) if other is b:
                        return dot_node.out, ()
    return None


def squared_norm_of(fgraph, node):
    """Return the squared norm of the result of a node, as `quadratic_form_in` does."""
    [w] = node.outputs
    clients = list(dict.fromkeys(client for client, _ in fgraph.clients[w]))
    match [(client.op, *client.inputs) for client in clients]:
        case [(Elemwise(scalar_op=Sqr()), _)]:
            return _sum_over_vectors(fgraph, clients[0].out, w)
        case [(Elemwise(scalar_op=Pow()), base, exponent)] if base is w:
            while isinstance(exponent.owner_op, DimShuffle):
                [exponent] = exponent.owner.inputs
            if np.all(getattr(exponent, "data", 0) == 2):
                return _sum_over_vectors(fgraph, clients[0].out, w)
        case [(Elemwise(scalar_op=Mul()), left, right)] if left is w and right is w:
            return _sum_over_vectors(fgraph, clients[0].out, w)
        case [(DimShuffle(is_expand_dims=True), _), (DimShuffle(is_expand_dims=True), _)]:
            # w[None, :] @ w[:, None], which is what w @ w becomes
            dot_nodes = {_only_client(fgraph, client.out) for client in clients}
            if w.type.ndim == 1 and len(dot_nodes) == 1:
                [dot_node] = dot_nodes
                if _is_inner_product(dot_node):
                    return dot_node.out, ()
    return None


def _sum_over_vectors(fgraph, products, vectors):
    """Return the only use of some products, if it is a sum over the last axis of the vectors."""
    sum_node = _only_client(fgraph, products)
    if (
        sum_node is None
        or not isinstance(sum_node.op, Sum)
        or products.type.ndim != vectors.type.ndim
    ):
        return None
    vector_axis = vectors.type.ndim - 1
    axes = sum_node.op.axis
    axes = tuple(range(vectors.type.ndim)) if axes is None else axes
    if vector_axis not in axes:
        return None
    return sum_node.out, tuple(axis for axis in axes if axis != vector_axis)


def _is_inner_product(node):
    return (
        node is not None
        and isinstance(getattr(node.op, "core_op", node.op), Dot)
        and node.out.type.broadcastable == (True, True)
    )


def _other_input(node, var):
    left, right = node.inputs
    return left if right is var else right


def _only_client(fgraph, var):
    match fgraph.clients[var]:
        case [(client, _)]:
            return client
    return None
