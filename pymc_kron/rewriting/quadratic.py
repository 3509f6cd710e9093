"""``x' (A (x) B)^-1 x = |(L_A^-1 (x) L_B^-1) x|^2``: one sweep over the factors, not two."""

from dataclasses import dataclass

import numpy as np
from pytensor import tensor as pt
from pytensor.graph.basic import Variable
from pytensor.graph.rewriting.unify import OpPattern
from pytensor.scalar.basic import Mul, Neg, Pow, Sqr
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.solvers.general import Solve
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import apply_to_vectors, factors_batch_ndim
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import positive_definite_factors, root_of
from pymc_kron.structure import (
    column_sizes,
    is_empty,
    is_scalar,
    split_scalars,
    square_kron_factors,
    strip_transposes,
)


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

    sizes = column_sizes(factors)
    roots = [root_of(fgraph, factor) for factor in positive_definite_factors(fgraph, factors)]
    whitened = apply_to_vectors(
        [root.whiten for root in roots], sizes, sizes, b, batch_ndim=factors_batch_ndim(factors)
    )
    return form.replaced_by((whitened**2).sum(axis=-1))


@dataclass(frozen=True)
class Form:
    """A number that a rewrite replaces: some scalars times a quadratic form or squared norm.

    Attributes
    ----------
    out
        What is replaced.
    batch_axes
        The axes that are summed besides the last one.
    scales
        The scalars.
    """

    out: TensorVariable
    batch_axes: tuple[int, ...] = ()
    scales: tuple[TensorVariable, ...] = ()

    def replaced_by(self, norms: TensorVariable) -> dict[Variable, Variable]:
        """Return the replacement of the form, given the norm or the form of each vector."""
        total = norms.sum(axis=self.batch_axes) if self.batch_axes else norms
        for scale in self.scales:
            total = scale.squeeze() * total
        return {self.out: as_replacement(self.out, total)}


def quadratic_form_in(fgraph, solve_node) -> Form | None:
    """Return the quadratic form of the solution with its right-hand side, its only use."""
    _, b = solve_node.inputs
    [x] = solve_node.outputs
    match list(_uses(fgraph, x)):
        case [(node, operand, scales)]:
            pass
        case _:
            return None
    match node.op:
        case Elemwise(scalar_op=Mul()) if len(node.inputs) == 2:
            # (b * x).sum(-1)
            other, other_scales = _without_scalars(_other_input(node, operand))
            if not other_scales and strip_transposes(other) == strip_transposes(b):
                return _sum_over_vectors(fgraph, node.out, x, scales)
        case Dot() | Blockwise(core_op=Dot()) if _is_inner_product(node, x):
            # b[None, :] @ x[:, None], which is what b @ x becomes
            other, other_scales = _without_scalars(_other_input(node, operand))
            if other is b:
                return Form(node.out, scales=(*scales, *other_scales))
    return None


def squared_norm_of(fgraph, node) -> Form | None:
    """Return the squared norm of the result of a node, its only use."""
    [w] = node.outputs
    uses = list(_uses(fgraph, w))
    match [(use.op, scales) for use, _, scales in uses]:
        case [(Elemwise(scalar_op=Sqr()), ())]:
            return _sum_over_vectors(fgraph, uses[0][0].out, w, ())
        case [(Elemwise(scalar_op=Pow()), ())]:
            base, exponent = uses[0][0].inputs
            while isinstance(exponent.owner_op, DimShuffle):
                [exponent] = exponent.owner.inputs
            if base is w and np.all(getattr(exponent, "data", 0) == 2):
                return _sum_over_vectors(fgraph, uses[0][0].out, w, ())
        case [(Elemwise(scalar_op=Mul()), left), (Elemwise(scalar_op=Mul()), right)]:
            if uses[0][0] is uses[1][0] and len(uses[0][0].inputs) == 2:
                return _sum_over_vectors(fgraph, uses[0][0].out, w, (*left, *right))
        case [
            (Dot() | Blockwise(core_op=Dot()), left),
            (Dot() | Blockwise(core_op=Dot()), right),
        ]:
            # w[None, :] @ w[:, None], which is what w @ w becomes
            if uses[0][0] is uses[1][0] and _is_inner_product(uses[0][0], w):
                return Form(uses[0][0].out, scales=(*left, *right))
    return None


def _uses(fgraph, var, scales=()):
    """Yield the nodes that use a vector, or scalar multiples of it, as ``(node, input, scalars)``.

    Axes that are added to a vector are looked through.
    """
    for client, _ in fgraph.clients[var]:
        match client.op:
            case DimShuffle(is_expand_dims=True):
                yield from _uses(fgraph, client.out, scales)
                continue
            case Elemwise(scalar_op=Mul()):
                others = [inp for inp in client.inputs if inp is not var]
                if len(others) == len(client.inputs) - 1 and all(map(_is_number, others)):
                    yield from _uses(fgraph, client.out, (*scales, *others))
                    continue
            case Elemwise(scalar_op=Neg()):
                yield from _uses(fgraph, client.out, (*scales, pt.constant(-1.0)))
                continue
        yield client, var, scales


def _without_scalars(var):
    """Split a scalar multiple of a vector, with axes added, into the vector and the scalars."""
    core, scales = split_scalars(var, var.type.ndim)
    match core.owner_op_and_inputs:
        case (DimShuffle(is_expand_dims=True), inner):
            vector, others = _without_scalars(inner)
            return vector, (*scales, *others)
    return core, tuple(scales)


def _is_number(var):
    return is_scalar(var, var.type.ndim)


def _sum_over_vectors(fgraph, products, vectors, scales):
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
    return Form(sum_node.out, tuple(axis for axis in axes if axis != vector_axis), scales)


def _is_inner_product(node, vector):
    return vector.type.ndim == 1 and node.out.type.broadcastable == (True, True)


def _other_input(node, var):
    left, right = node.inputs
    return left if right is var else right


def _only_client(fgraph, var):
    match fgraph.clients[var]:
        case [(client, _)]:
            return client
    return None
