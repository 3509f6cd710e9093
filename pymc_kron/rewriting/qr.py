"""``A (x) B = (Q_A (x) Q_B) (R_A (x) R_B)``, where ``R_A (x) R_B`` is upper triangular.

It is if no R has more rows than columns. The signs of the rows of R, which LAPACK doesn't define,
are those of the product of the factors' rows.
"""

from functools import partial

from pytensor import tensor as pt
from pytensor.tensor.linalg.decomposition.qr import QR
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.orientation import is_wide, rectangular_kron_factors, share_orientation
from pymc_kron.structure import Refusal


@register_kron(blockwise_of(QR))
def qr_of_kron(fgraph, node):
    """qr(A (x) B) -> Q_A (x) Q_B, R_A (x) R_B"""
    [K] = node.inputs
    op = node.op.core_op
    factors = rectangular_kron_factors(K)
    if factors is None:
        return None
    if op.pivoting:
        raise Refusal(
            "pivoting orders the columns of the whole product", "use pivoting=False, or svd"
        )
    if op.mode == "raw":
        raise Refusal(
            "the reflections of a product aren't products of reflections", 'use mode="economic"'
        )
    if op.mode == "economic" and not share_orientation(fgraph, factors):
        raise Refusal(
            "the factors aren't known to be all tall or all wide", "give them static shapes"
        )
    if op.mode in ("full", "r") and not all(is_wide(fgraph, factor) for factor in factors):
        raise Refusal(
            "a factor may have more rows than columns",
            'give the factors static shapes, or use mode="economic"',
        )
    qr = partial(pt.linalg.qr, mode=op.mode)
    if op.mode == "r":
        news = [kron(*map(qr, factors))]
    else:
        Q, R = zip(*map(qr, factors), strict=True)
        news = [kron(*Q), kron(*R)]
    return [as_replacement(old, new) for old, new in zip(node.outputs, news, strict=True)]
