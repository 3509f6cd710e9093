"""``(A (x) B) (u (x) v) = (a b) (u (x) v)`` if ``A u = a u`` and ``B v = b v``.

Of the generalised problem likewise: ``A u = a C u`` and ``B v = b D v`` give ``(A (x) B) (u (x) v)
= (a b) (C (x) D) (u (x) v)``, and eigenvectors that are orthonormal for C and for D are so for
their product. LAPACK returns the eigenvalues in ascending order.
"""

from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.linalg.decomposition.eigen import Eigh, Eigvalsh
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.kernels import eigh_of_finite
from pymc_kron.linalg import kron, kron_of_vectors
from pymc_kron.orders import reorder
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.conforming import conforming_factors
from pymc_kron.rewriting.facts import positive_definite_factors, symmetric_factors
from pymc_kron.rewriting.orientation import proved_square_kron_factors
from pymc_kron.structure import Refusal, kron_factors, square_kron_factors


@register_kron(blockwise_of(Eigvalsh))
def eigvalsh_of_kron(fgraph, node):
    """eigvalsh(A (x) B) -> sort(eigvalsh(A) (x) eigvalsh(B))"""
    problems = _factor_problems(fgraph, node)
    if problems is None:
        return None
    lower = node.op.core_op.lower

    def eigvalsh(*problem):
        return [pt.linalg.eigvalsh(*problem, lower=lower)]

    [w] = zip(*(eigh_of_finite(eigvalsh, *problem) for problem in problems), strict=True)
    return [as_replacement(node.out, pt.sort(kron_of_vectors(w), axis=-1))]


@register_kron(blockwise_of(Eigh))
def eigh_of_kron(fgraph, node):
    """eigh(A (x) B) -> sort(w_A (x) w_B), (Q_A (x) Q_B)[:, order]

    `matmul_of_selected_kron` sees to it that a product with the eigenvectors doesn't form them.
    """
    problems = _factor_problems(fgraph, node)
    if problems is None:
        return None
    op = node.op.core_op
    eigh = partial(pt.linalg.eigh, lower=op.lower, driver=op.driver)
    w, Q = zip(*(eigh_of_finite(eigh, *problem) for problem in problems), strict=True)
    values = kron_of_vectors(w)
    order = pt.argsort(values, axis=-1)
    news = reorder(values, order, core_axis=-1), reorder(kron(*Q), order, core_axis=-1)
    return [as_replacement(old, new) for old, new in zip(node.outputs, news, strict=True)]


def _factor_problems(fgraph, node):
    """Return the arguments of the eigenvalue problem of each factor.

    The call promises that the matrix is symmetric, and that the metric of a generalised problem
    is positive definite.
    """
    matrix, *metrics = node.inputs
    dtype = node.outputs[0].type.dtype
    if all(kron_factors(inp) is None for inp in node.inputs):
        return None
    if not metrics:
        factors = proved_square_kron_factors(fgraph, matrix, real=True)
        factors = [factor.astype(dtype) for factor in factors]
        return [[factor] for factor in symmetric_factors(fgraph, factors)]

    [metric] = metrics
    factors = square_kron_factors(matrix, real=True)
    metric_factors = square_kron_factors(metric, real=True)
    if factors is None or metric_factors is None:
        raise Refusal(
            "only one of the two matrices is a Kronecker product",
            "write the other one as a product too, of the identity for example",
        )
    # A positive definite metric has square factors, and the others have their sizes
    pairs = conforming_factors(factors, metric_factors, [(-2, -2), (-1, -1)])
    return zip(
        symmetric_factors(fgraph, [factor.astype(dtype) for factor, _ in pairs]),
        positive_definite_factors(fgraph, [factor.astype(dtype) for _, factor in pairs]),
        strict=True,
    )
