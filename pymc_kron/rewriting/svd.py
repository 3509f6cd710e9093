"""``A (x) B = (U_A (x) U_B) (S_A (x) S_B) (V_A (x) V_B)'``, with the diagonal sorted.

``S_A (x) S_B`` is diagonal if both are square, or tall, or wide. Otherwise the singular values
that are missing are zero, and what belongs to them needs vectors that neither decomposition has.
"""

from math import prod

from pytensor import tensor as pt
from pytensor.tensor.linalg.decomposition.svd import SVD
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron, kron_of_vectors
from pymc_kron.orders import reorder
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import are_square
from pymc_kron.rewriting.orientation import rectangular_kron_factors, share_orientation
from pymc_kron.structure import Refusal, Size, column_sizes, row_sizes


@register_kron(blockwise_of(SVD))
def svd_of_kron(fgraph, node):
    """svd(A (x) B) -> (U_A (x) U_B)[:, order], (s_A (x) s_B)[order], (Vh_A (x) Vh_B)[order]"""
    [K] = node.inputs
    op = node.op.core_op
    factors = rectangular_kron_factors(K)
    if factors is None:
        return None

    if not op.compute_uv:
        return [as_replacement(node.out, _singular_values(fgraph, factors))]
    old_U, old_s, old_Vh = node.outputs
    # A node that isn't in the graph is one to take a gradient of
    if all(fgraph.clients.get(out) == [] for out in (old_U, old_Vh)):
        return {old_s: as_replacement(old_s, _singular_values(fgraph, factors))}

    if op.full_matrices and not are_square(fgraph, factors):
        raise Refusal(
            "not all factors are known to be square",
            "give them static shapes, or use full_matrices=False",
        )
    if not share_orientation(fgraph, factors):
        raise Refusal(
            "the factors aren't known to be all tall or all wide", "give them static shapes"
        )
    U, s, Vh = zip(*(_svd(factor, op.full_matrices) for factor in factors), strict=True)
    values = kron_of_vectors(s)
    order = pt.argsort(-values, axis=-1)
    news = (
        reorder(kron(*U), order, core_axis=-1),
        reorder(values, order, core_axis=-1),
        reorder(kron(*Vh), order, core_axis=-2),
    )
    return [as_replacement(old, new) for old, new in zip(node.outputs, news, strict=True)]


def _svd(factor, full_matrices):
    """Return the decomposition of a factor with its static shapes, which PyTensor forgets."""
    m, n = factor.type.shape[-2:]
    k = None if m is None or n is None else min(m, n)
    shapes = [(m, m if full_matrices else k), (k,), (n if full_matrices else k, n)]
    batch = (None,) * (factor.type.ndim - 2)
    return [
        pt.specify_shape(part, (*batch, *shape))
        for part, shape in zip(pt.linalg.svd(factor, full_matrices), shapes, strict=True)
    ]


def _singular_values(fgraph, factors):
    values = kron_of_vectors([pt.linalg.svd(factor, compute_uv=False) for factor in factors])
    if not share_orientation(fgraph, factors):
        rows, columns = row_sizes(factors), column_sizes(factors)
        n_values = prod(map(_minimum, rows, columns))
        n_zeros = _minimum(prod(rows), prod(columns)) - n_values
        zeros = pt.zeros((*tuple(values.shape)[:-1], n_zeros), dtype=values.type.dtype)
        values = pt.concatenate([values, zeros], axis=-1)
    return pt.sort(values, axis=-1)[..., ::-1]


def _minimum(a: Size, b: Size) -> Size:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else pt.minimum(a, b)
