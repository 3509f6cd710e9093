"""Gradients through the Cholesky factor of a sum with noise, taken before the rewrites.

The factor ``L`` of ``M = A (x) B + s^2 I`` has no factorwise form, and neither has a gradient in
it. But for what it is made for, the norm of a whitened vector, the log-determinant and solutions,
the gradient in ``M`` has one. With ``alpha = inv(M) x``, and along symmetric changes of M::

    d |inv(L) x|^2 = -alpha' dM alpha,    d sum log diag L = 1/2 sum(inv(M) * dM)
    d alpha = -inv(M) dM alpha

All are sums of terms (see `pymc_kron.terms`), which the pullback of ``kron`` takes to the factors.
"""

from collections.abc import Callable, Iterator
from functools import partial

from pytensor.gradient import pullback
from pytensor.graph.basic import Apply
from pytensor.graph.fg import FunctionGraph
from pytensor.scalar.basic import Add, Log, Mul, Neg, Pow, Sqr
from pytensor.tensor.basic import ExtractDiag
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.decomposition.cholesky import Cholesky
from pytensor.tensor.linalg.solvers.psd import CholeskySolve
from pytensor.tensor.linalg.solvers.triangular import SolveTriangular
from pytensor.tensor.math import Dot, Sum
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.variable import TensorVariable

from pymc_kron.kron_sum import KronSum, KronSumSolve, as_low_rank
from pymc_kron.rewriting.as_written import matched, summands
from pymc_kron.rewriting.bundle import as_replacement, as_written_rewrites_db, register_kron
from pymc_kron.rewriting.facts import clients_of
from pymc_kron.rewriting.noise import factorized_by, inverse_of
from pymc_kron.rewriting.quadratic import Form, squared_norm_of
from pymc_kron.rewriting.sums import kron_sum_of
from pymc_kron.structure import Refusal

type Gradient = Callable[[TensorVariable], TensorVariable]


@register_kron(blockwise_of(Cholesky), dbs=[as_written_rewrites_db])
def pullback_of_kron_sum_cholesky(fgraph, node):
    """pullback through chol(M) of |inv(L) x|^2, sum log diag L -> -alpha alpha', inv(M) / 2"""
    [M] = node.inputs
    if M.type.numpy_dtype.kind == "c":
        # PyTensor has no gradients of complex variables
        return None
    L_bar = node.out.type()
    [pattern] = pullback([node.out], [M], [L_bar])
    found = {}
    for other in fgraph.apply_nodes:
        if other.op == pattern.owner.op:
            match = matched(pattern, other.out, [L_bar])
            if match is not None:
                [found[other.out]] = match
    if not found or not all(M.type.broadcastable[:-2]):
        return None
    kron_sum = kron_sum_of(fgraph, M)
    if kron_sum is None:
        return None
    gradients = dict(_gradients(fgraph, node, kron_sum))
    news = {}
    for old, cotangent in found.items():
        parts = [part for part, _ in summands(cotangent) if not _is_sum(part)]
        first, *others = (_in_sum(part, node.out, gradients) for part in parts)
        news[old] = as_replacement(old, sum(others, start=first))
    return news


def _is_sum(var: TensorVariable) -> bool:
    return isinstance(getattr(var.owner_op, "scalar_op", None), Add)


def _in_sum(
    cotangent: TensorVariable, chol: TensorVariable, gradients: dict[TensorVariable, Gradient]
) -> TensorVariable:
    """Return the gradient in the sum, given a part of that in its Cholesky factor."""
    for out, gradient in gradients.items():
        out_bar = out.type()
        [pattern] = pullback([out], [chol], [out_bar])
        match = matched(pattern, cotangent, [out_bar])
        if match is not None:
            return gradient(*match)
    raise Refusal(
        "the Cholesky factor of a sum is used for more than whitened norms, a log-determinant and "
        "`cho_solve`",
        "where these uses are rewritten themselves, take the gradient after the rewrites: "
        "pt.grad(pymc.pytensorf.rewrite_pregrad(loss), ...)",
    )


def _gradients(
    fgraph: FunctionGraph, node: Apply, kron_sum: KronSum
) -> Iterator[tuple[TensorVariable, Gradient]]:
    """Yield what a Cholesky factor is used for.

    And the gradient in the sum as a function of the one in that.
    """
    [M] = node.inputs
    for client, _ in clients_of(fgraph, node.out):
        match client.op:
            case Blockwise(core_op=SolveTriangular(b_ndim=1, lower=True)) if (
                factorized_by(client.inputs[0], lower=True) is M
            ):
                for form in _squared_norms(fgraph, client):
                    yield form.out, partial(_of_squared_norm, kron_sum, client.inputs[1], form)
            case Blockwise(core_op=CholeskySolve(b_ndim=1, lower=lower)) if (
                factorized_by(client.inputs[0], lower=lower) is M
            ):
                yield client.out, partial(_of_solution, kron_sum, client.inputs[1])
            case ExtractDiag(offset=0):
                for logs, _ in clients_of(fgraph, client.out):
                    if isinstance(getattr(logs.op, "scalar_op", None), Log):
                        for reduction, _ in clients_of(fgraph, logs.out):
                            if isinstance(reduction.op, Sum) and all(
                                reduction.out.type.broadcastable
                            ):
                                yield reduction.out, partial(_of_logdet, kron_sum)


def _squared_norms(fgraph: FunctionGraph, node: Apply) -> Iterator[Form]:
    """Yield the squared norms of the result of a node, whatever else it is used for."""
    for out in _reductions(fgraph, node.out):
        form = squared_norm_of(FunctionGraph(outputs=[out], clone=False), node)
        if form is not None and form.out is out:
            yield form


def _reductions(fgraph: FunctionGraph, var: TensorVariable) -> Iterator[TensorVariable]:
    for client, _ in fgraph.clients[var]:
        match client.op:
            case Sum() | Dot() | Blockwise(core_op=Dot()):
                yield client.out
            case DimShuffle() | Elemwise(scalar_op=Mul() | Neg() | Pow() | Sqr()):
                yield from _reductions(fgraph, client.out)


def _of_squared_norm(
    kron_sum: KronSum, x: TensorVariable, form: Form, form_bar: TensorVariable
) -> TensorVariable:
    alpha = _solution(kron_sum, x)
    norms = (x * alpha).sum(axis=-1)
    [norms_bar] = pullback([*form.replaced_by(norms).values()], [norms], [form_bar])
    return _outer_products(kron_sum, -norms_bar[..., None] * alpha, alpha)


def _of_solution(kron_sum: KronSum, x: TensorVariable, alpha_bar: TensorVariable) -> TensorVariable:
    return _outer_products(kron_sum, -_solution(kron_sum, alpha_bar), _solution(kron_sum, x))


def _solution(kron_sum: KronSum, x: TensorVariable) -> TensorVariable:
    return KronSumSolve(layout=kron_sum.layout, definite=True)(*kron_sum.inputs, x)


def _outer_products(
    kron_sum: KronSum, left: TensorVariable, right: TensorVariable
) -> TensorVariable:
    term = as_low_rank(kron_sum, left, right)
    return term.left @ term.right.mT


def _of_logdet(kron_sum: KronSum, logdet_bar: TensorVariable) -> TensorVariable:
    basis = kron_sum.basis()
    definite = KronSumSolve(layout=kron_sum.layout, definite=True)
    return logdet_bar.squeeze() / 2 * inverse_of(basis, definite.eigenvalues(basis))
