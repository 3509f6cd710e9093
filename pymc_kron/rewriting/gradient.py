"""The gradient in the factors, from a gradient in the product that is never formed.

``pt.grad``, taken before the rewrites, ends in the pullback of ``kron``: the sums over the blocks
of a matrix ``G`` of the size of the product. It is linear in ``G``, and for

- ``G = u v'``: ``dA = U B V'``, ``dB = U' A V``, with u and v as matrices;
- ``G = C (x) D``: ``dA = C sum(D * B)``, ``dB = D sum(C * A)``;

and all sums, multiples, transposes and products of these, `pymc_kron.terms` knows the sums.
"""

from pytensor import tensor as pt
from pytensor.compile.builders import OpFromGraph
from pytensor.tensor.blockwise import Blockwise

from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import note_square_factors
from pymc_kron.rewriting.sources import is_kron_pullback
from pymc_kron.sizes import Sizes
from pymc_kron.structure import Refusal, kron_factors
from pymc_kron.terms import contract, require_conforming, terms_of


@register_kron(OpFromGraph, Blockwise)
def pullback_of_kron(fgraph, node):
    """pullback of kron at G -> the sums of the terms of G over the blocks"""
    if not is_kron_pullback(node.op):
        return None
    A, B, K, G = node.inputs
    sizes = Sizes(A, B, K, G)
    terms = terms_of(G, sizes)
    if terms is None:
        raise Refusal(
            "the gradient in the product isn't a sum of outer products and Kronecker products",
            "where the product itself was rewritten, take the gradient after the rewrites: "
            "pt.grad(pymc.pytensorf.rewrite_pregrad(loss), ...)",
        )
    groups = [kron_factors(factor) or (factor,) for factor in (A, B)]
    factors = (*groups[0], *groups[1])
    split = len(groups[0])
    note_square_factors(fgraph, factors, sizes)
    for term in terms:
        require_conforming(term, factors, sizes)
    news = []
    for old, factor, start, stop in zip(
        node.outputs, (A, B), (0, split), (split, len(factors)), strict=True
    ):
        gradients = [contract(term, factors, start, stop) for term in terms]
        new = sum(gradients[1:], start=gradients[0]) if gradients else factor.zeros_like()
        if old.type.ndim > 2 and new.type.broadcastable != old.type.broadcastable:
            new = pt.broadcast_to(new, (*tuple(K.shape)[:-2], *tuple(new.shape)[-2:]))
        news.append(as_replacement(old, new))
    return news
