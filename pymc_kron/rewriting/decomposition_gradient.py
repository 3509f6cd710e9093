"""Gradients through a decomposition of ``A (x) B``, by those through the ones of A and B.

The gradient in a product, through its Cholesky factor ``L`` for example, is no sum of known
terms: it is ``L^-T Phi(L' C) L^-1`` for a gradient ``C`` in ``L``, with a mask ``Phi``. But ``L``
is ``L_A (x) L_B``, so that the terms of ``C`` give the gradients in ``L_A`` and ``L_B``, and these
the ones in A and B. To find ``C``, PyTensor is asked for the gradient again, at a variable that
stands for ``C``, and what it writes is compared with the graph at hand.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, product

from pytensor import tensor as pt
from pytensor.assumptions.specify import assume
from pytensor.compile.builders import OpFromGraph
from pytensor.gradient import pullback
from pytensor.graph.basic import Apply, equal_computations
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.op import Op
from pytensor.graph.replace import graph_replace
from pytensor.scalar.basic import Add, Mul, Neg, Sub
from pytensor.tensor.basic import atleast_Nd
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.decomposition.eigen import Eigh, Eigvalsh
from pytensor.tensor.linalg.decomposition.lu import LU
from pytensor.tensor.linalg.decomposition.qr import QR
from pytensor.tensor.linalg.decomposition.svd import SVD
from pytensor.tensor.linalg.products import Expm
from pytensor.tensor.math import Sum, variadic_mul
from pytensor.tensor.type import TensorType
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import kron
from pymc_kron.rewriting.as_written import matched, summands
from pymc_kron.rewriting.bundle import as_replacement, as_written_rewrites_db, register_kron
from pymc_kron.rewriting.decomposition import cholesky_of_kron
from pymc_kron.rewriting.eigen import eigh_of_kron, eigvalsh_of_kron
from pymc_kron.rewriting.exponential import expm_of_kron_sum
from pymc_kron.rewriting.lu import lu_of_kron
from pymc_kron.rewriting.qr import qr_of_kron
from pymc_kron.rewriting.sources import is_kron_pullback
from pymc_kron.rewriting.svd import svd_of_kron
from pymc_kron.structure import (
    Matrices,
    Refusal,
    is_positive_definite,
    is_symmetric,
    kron_factors,
    split_scalars,
    strip_transposes,
)
from pymc_kron.terms import batch_scalar

FACTORWISE = {
    Cholesky: cholesky_of_kron,
    Eigh: eigh_of_kron,
    Eigvalsh: eigvalsh_of_kron,
    Expm: expm_of_kron_sum,
    LU: lu_of_kron,
    QR: qr_of_kron,
    SVD: svd_of_kron,
}
# What is promised of Q, say, doesn't say which Q it is: value and gradient take the same one
register = partial(
    register_kron,
    dbs=[as_written_rewrites_db],
    needs=[rewrite.fn.__name__ for rewrite in FACTORWISE.values()],
)


@register(OpFromGraph, Blockwise)
def pullback_of_kron_decomposition(fgraph, node):
    """pullback through kron and then chol at C -> pullback through chol(A) (x) chol(B) at C

    Also through ``eigvalsh``, ``eigh``, ``lu``, ``qr``, ``svd``, and ``expm`` of a Kronecker sum.
    """
    if not is_kron_pullback(node.op):
        return None
    *factors, K, G = node.inputs
    for user in chain(_decompositions(fgraph, K), _exponentials(fgraph, K)):
        for part, others in summands(G):
            cotangents = _cotangents(user, K, part)
            if cotangents is None:
                continue
            used = [i for i, out in enumerate(node.outputs) if fgraph.clients[out]]
            is_shared = any(_is_shared_by_batch(factors[i], node.outputs[i]) for i in used)
            if is_shared and not _is_unique(user.op.core_op, cotangents):
                raise Refusal(
                    "a batch shares a factor, and the signs of its decomposition are a convention",
                    "give each factor the batch dimensions of the product: "
                    "pt.broadcast_to(A, (n, *A.shape))",
                )
            # A factor may be a product itself, be equal to the other one, or have a part in others,
            # and a batch that shares it has a gradient for each entry
            stand_ins = {i: _stand_in(fgraph, factors[i], node.outputs[i].type) for i in used}
            copy = kron(*(stand_ins.get(i, factor) for i, factor in enumerate(factors)))
            gradients = _factorwise_gradients(
                fgraph, user, {K: copy}, list(stand_ins.values()), cotangents
            )
            if gradients is None:
                continue
            originals = {
                stand_in: _broadcast_over_batch(factors[i], node.outputs[i], K)
                for i, stand_in in stand_ins.items()
            }
            gradients = graph_replace(gradients, originals, strict=False)
            if others:
                rest = node.op(*factors, K, sum(others[1:], start=others[0]))
                gradients = [a + rest[i] for i, a in zip(used, gradients, strict=True)]
            olds = [node.outputs[i] for i in used]
            return {old: as_replacement(old, new) for old, new in zip(olds, gradients, strict=True)}
    return None


@register(Sum)
def inner_product_of_kron_decomposition(fgraph, node):
    """sum(pullback through chol(c K) at C * K) -> pullback through t of t -> chol(t c K) at C, / c

    The gradient in a scale, through the same decompositions, taken at ``t = 1``.
    """
    [summed] = node.inputs
    if node.out.type.ndim or summed.type.ndim != 2:
        return None
    entries, scales = split_scalars(summed)
    match entries.owner_op_and_inputs:
        case (Elemwise(scalar_op=Mul()), *pair) if len(pair) == 2:
            for K, G in (pair, pair[::-1]):
                users = list(_users_of_multiples(fgraph, K))
                for part, others in summands(G) if users else ():
                    gradient = _along_product(fgraph, K, part, users)
                    if gradient is None:
                        continue
                    if others:
                        gradient = gradient + (K * sum(others[1:], start=others[0])).sum()
                    gradient = variadic_mul(*map(batch_scalar, scales), gradient)
                    return [as_replacement(node.out, gradient)]
    return None


def _along_product(
    fgraph: FunctionGraph,
    K: TensorVariable,
    G: TensorVariable,
    users: Iterable[tuple[TensorVariable, Apply]],
) -> TensorVariable | None:
    """Return the inner product of a Kronecker product and a gradient in a multiple of it.

    Of what the exponential is taken of, also that of a sum, and of an identity matrix.
    """
    _, scales_of_K = split_scalars(K)
    for multiple, user in users:
        cotangents = _cotangents(user, multiple, G)
        if cotangents is None:
            continue
        t = pt.scalar(dtype=multiple.type.dtype)
        c: Matrices = ()
        if isinstance(user.op.core_op, Expm):
            # A scalar that multiplies what the exponential is taken of may be zero
            copy, start = multiple + t * K, 0
        else:
            factors = kron_factors(multiple)
            assert factors is not None
            copy, start = kron(t * factors[0], *factors[1:]), 1
            _, scales = split_scalars(multiple)
            c = scales[: len(scales) - len(scales_of_K)]
        gradients = _factorwise_gradients(fgraph, user, {multiple: copy}, [t], cotangents)
        if gradients is not None:
            [gradient] = graph_replace(gradients, {t: pt.constant(start, dtype=t.type.dtype)})
            return gradient / variadic_mul(*map(batch_scalar, c))
    return None


def _users_of_multiples(
    fgraph: FunctionGraph, K: TensorVariable
) -> Iterator[tuple[TensorVariable, Apply]]:
    """Yield the decompositions of a product times scalars, each with what it decomposes.

    And the exponentials of what that is a part of.
    """
    for multiple in _multiples(fgraph, K):
        if kron_factors(multiple) is not None:
            for user in _decompositions(fgraph, multiple):
                yield multiple, user
        for user in _exponentials(fgraph, multiple):
            yield multiple, user


def _multiples(fgraph: FunctionGraph, K: TensorVariable) -> Iterator[TensorVariable]:
    """Yield a product and what it becomes times scalars."""
    yield K
    for client, _ in fgraph.clients[K]:
        if len(client.outputs) == 1 and split_scalars(client.out)[0] is split_scalars(K)[0]:
            yield from _multiples(fgraph, client.out)


def _decompositions(fgraph: FunctionGraph, K: TensorVariable) -> Iterator[Apply]:
    """Yield the nodes that decompose a product, or another one that is made of it."""
    for client, _ in fgraph.clients[K]:
        if type(getattr(client.op, "core_op", None)) in FACTORWISE and len(client.inputs) == 1:
            yield client
        elif len(client.outputs) == 1 and kron_factors(client.out) is not None:
            yield from _decompositions(fgraph, client.out)


def _exponentials(fgraph: FunctionGraph, var: TensorVariable) -> Iterator[Apply]:
    """Yield the exponentials of what is made of a matrix entry by entry, sums for example."""
    seen, to_visit = {var}, [var]
    while to_visit:
        for client, _ in fgraph.clients[to_visit.pop()]:
            if isinstance(getattr(client.op, "core_op", None), Expm):
                yield client
            elif isinstance(client.op, Elemwise | DimShuffle) and seen.isdisjoint(client.outputs):
                seen.update(client.outputs)
                to_visit += client.outputs


def _cotangents(
    node: Apply, var: TensorVariable, gradient: TensorVariable
) -> dict[int, TensorVariable] | None:
    """Return for which gradients in the outputs of a node PyTensor writes a gradient in a variable.

    Those outputs that don't take part are left out. Some options have no gradient.
    """
    for chosen in product((True, False), repeat=len(node.outputs)):
        numbers = [i for i, is_chosen in enumerate(chosen) if is_chosen]
        if not numbers:
            return None
        outputs = [node.outputs[i] for i in numbers]
        stand_ins = [output.type() for output in outputs]
        try:
            pattern = pullback(outputs, var, stand_ins)
        except NotImplementedError:
            continue
        if gradient.type.ndim < pattern.type.ndim:
            pattern, _ = strip_transposes(pattern)
        found = matched(pattern, gradient, stand_ins)
        if found is not None:
            return dict(zip(numbers, found, strict=True))
    return None


def _factorwise_gradients(
    fgraph: FunctionGraph,
    node: Apply,
    replacements: dict[TensorVariable, TensorVariable],
    wrt: Matrices,
    cotangents: dict[int, TensorVariable],
) -> list[TensorVariable] | None:
    """Return gradients through what a decomposition becomes, once its inputs are replaced."""
    rewrite = FACTORWISE[type(node.op.core_op)].fn.__wrapped__
    outputs = rewrite(fgraph, node.op.make_node(*graph_replace(node.inputs, replacements)))
    if outputs is None:
        return None
    return pullback(
        [outputs[i] for i in cotangents],
        wrt,
        [_simplified(node.op.core_op, cotangent) for cotangent in cotangents.values()],
        disconnected_inputs="ignore",
    )


def _is_unique(op: Op, numbers: Iterable[int]) -> bool:
    """Whether those outputs of a decomposition with these numbers don't depend on a convention.

    PyTensor decomposes a diagonal matrix, one of a single entry also, without LAPACK and with other
    signs, and may see that of a factor and not of a batch of copies of it.
    """
    match op:
        case QR():
            return False
        case Eigh():
            return 1 not in numbers
        case SVD(compute_uv=True):
            return {0, 2}.isdisjoint(numbers)
    return True


def _is_shared_by_batch(factor: TensorVariable, gradient: TensorVariable) -> bool:
    return factor.type.broadcastable != gradient.type.broadcastable


def _broadcast_over_batch(
    factor: TensorVariable, gradient: TensorVariable, K: TensorVariable
) -> TensorVariable:
    """Return a factor with the batch dimensions of the gradient in it, those of the product."""
    if not _is_shared_by_batch(factor, gradient):
        return factor
    return pt.broadcast_to(factor, (*tuple(K.shape)[:-2], *tuple(factor.shape)[-2:]))


def _stand_in(
    fgraph: FunctionGraph, factor: TensorVariable, stand_in_type: TensorType
) -> TensorVariable:
    """Return a variable of which the same is known as of a factor."""
    facts = {
        "symmetric": is_symmetric(fgraph, factor),
        "positive_definite": is_positive_definite(fgraph, factor),
    }
    return assume(stand_in_type(), **{name: True for name, is_known in facts.items() if is_known})


def _simplified(op: Op, cotangent: TensorVariable) -> TensorVariable:
    """Return a gradient in an output that does for another one.

    ``tril(L' tril(C)) = tril(L' C)``: of the gradient in a Cholesky factor, no more than its own
    triangle is read. That of a solve is cut down to it.
    """
    match op:
        case Cholesky(lower=lower):
            return _without_mask(cotangent, pt.tril if lower else pt.triu)
    return cotangent


def _without_mask(var: TensorVariable, triangle: Callable) -> TensorVariable:
    """Return a matrix that has the same triangle as another one, of which that is all there is."""
    core, transposed = strip_transposes(var)
    if core is not var:
        other_triangle = pt.triu if triangle is pt.tril else pt.tril
        core = _without_mask(core, other_triangle if transposed else triangle)
        return atleast_Nd(core.mT if transposed else core, n=var.type.ndim)
    match var.owner_op_and_inputs:
        case (Elemwise(scalar_op=Add() | Sub() | Neg()) as op, *parts):
            return op(*(_without_mask(part, triangle) for part in parts))
        case (Sum(axis=tuple(axes)) as op, part) if max(axes, default=0) < part.type.ndim - 2:
            return op(_without_mask(part, triangle))
        case (DimShuffle(new_order=(*_, int(i), int(j))) as op, part) if [i, j] == [
            part.type.ndim - 2,
            part.type.ndim - 1,
        ]:
            return op(_without_mask(part, triangle))
        case (Elemwise(scalar_op=Mul()), *parts):
            for part in parts:
                masked = pt.vectorize(triangle, "(n,m)->(n,m)")(part)
                if equal_computations([masked], [var]):
                    return part
    return var
