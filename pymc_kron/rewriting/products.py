"""``(A (x) B) vec(X) = vec(A X B')`` and ``(A (x) B) (C (x) D) = AC (x) BD``: small products."""

from pytensor.assumptions.specify import assume
from pytensor.tensor.math import Dot
from pytensor.tensor.rewriting.blockwise import blockwise_of

from pymc_kron.linalg import kron, kron_matmul
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.conforming import conforming_factors, refuse_overflow
from pymc_kron.sizes import Sizes
from pymc_kron.structure import (
    gram_root,
    is_empty,
    is_lower_triangular,
    kron_factors,
    refuse_dtype,
)
from pymc_kron.terms import LowRank, Product, is_unread, scaled, terms_of


@register_kron(Dot, blockwise_of(Dot))
def mixed_product_of_kron(fgraph, node):
    """(A (x) B) @ (C (x) D) -> (A @ C) (x) (B @ D)

    A root stays one: K @ K.T -> (A @ A.T) (x) (B @ B.T), each as triangular as K.
    """
    left, right = node.inputs
    [old_out] = node.outputs
    left_factors, right_factors = kron_factors(left), kron_factors(right)
    if left_factors is None or right_factors is None:
        return None
    refuse_dtype(old_out, "fciu")
    refuse_overflow(left, left_factors, old_out)
    refuse_overflow(right, right_factors, old_out)

    dtype = old_out.type.dtype
    root = gram_root(old_out)
    if root is not None:
        # One variable for a factor on both sides, so that each product is seen to be a square
        roots = [factor.astype(dtype) for factor in kron_factors(root)]
        if is_lower_triangular(fgraph, root):
            roots = [assume(factor, lower_triangular=True) for factor in roots]
        pairs = [(factor, factor.mT) for factor in roots]
    else:
        pairs = [
            (a.astype(dtype), c.astype(dtype))
            for a, c in conforming_factors(left_factors, right_factors, [(-1, -2)])
        ]
    return [as_replacement(old_out, kron(*(a @ c for a, c in pairs)))]


@register_kron(Dot, blockwise_of(Dot))
def matmul_of_kron(fgraph, node):
    """(A (x) B) @ X -> A and B applied along the axes of X, and X @ (A (x) B) likewise

    A product of two Kronecker products is itself one, and left as it is. So is a product with
    one whose columns are scaled, ``Q diag(w) Q'``, which is written with its factors. A product
    with an outer product is one again.
    """
    left, right = node.inputs
    [old_out] = node.outputs
    left_factors, right_factors = kron_factors(left), kron_factors(right)
    if (left_factors is None) == (right_factors is None):
        return None
    if any(map(is_empty, (left, right))) or old_out.type.numpy_dtype.kind == "b":
        return None
    K, factors, other = (
        (left, left_factors, right) if right_factors is None else (right, right_factors, left)
    )
    refuse_overflow(K, factors, old_out)
    sizes = Sizes(left, right)
    if is_unread(other, sizes):
        return None
    # A vector is an outer product too, of itself and a one
    axis = -1 if other is right else -2
    is_vector = other.type.broadcastable[axis]
    match None if is_vector else terms_of(other, sizes):
        case (LowRank(weights=None) as term,):
            if term.may_be_narrower_than(other.type.shape[axis]):
                if left_factors is not None:
                    u, v = left @ term.left, term.right
                else:
                    u, v = term.left, right.mT @ term.right
                new_out = scaled(u @ v.mT, Product(scales=term.scales), 2)
                return [as_replacement(old_out, new_out)]
        case terms if terms is not None:
            return None
    other = other.astype(old_out.type.dtype)
    if left_factors is not None:
        new_out = kron_matmul(left_factors, other, x_ndim=2)
    else:
        # X K = (K' X')'
        new_out = kron_matmul([factor.mT for factor in right_factors], other.mT, x_ndim=2).mT
    return [as_replacement(old_out, new_out)]
