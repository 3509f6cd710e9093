"""``exp(A (x) I + I (x) B) = exp(A) (x) exp(B)``: the terms of a Kronecker sum commute.

(Higham, N. J. (2008), "Functions of matrices", theorem 10.9.)
"""

from pytensor import tensor as pt
from pytensor.tensor.linalg.products import Expm
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.variable import TensorVariable

from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.sums import part_of_sum, read_sum, scalar_product
from pymc_kron.structure import Refusal, is_identity, kron_factors, with_square_shape
from pymc_kron.terms import require_agreement, terms_of


@register_kron(blockwise_of(Expm))
def expm_of_kron_sum(fgraph, node):
    """expm(a A (x) I + b I (x) B + c I) -> exp(c) expm(a A) (x) expm(b B)"""
    [X] = node.inputs
    [old_out] = node.outputs
    parts = [part_of_sum(*terms_of(X))] if kron_factors(X) is not None else read_sum(X)
    if parts is None or all(factors is None for _, factors in parts):
        return None

    products = [factors for _, factors in parts if factors is not None]
    for factors in products[1:]:
        require_agreement(products[0], -2, factors, -2)
    dtype = old_out.type.dtype
    constant = pt.constant(0.0, dtype=dtype)
    exponents: dict[int, TensorVariable] = {}
    for scalars, factors in parts:
        scale = scalar_product(scalars, dtype)
        if factors is None:
            constant = constant + scale
            continue
        axes = [axis for axis, factor in enumerate(factors) if not is_identity(factor)]
        if len(axes) != 1:
            raise Refusal(
                "a term has more than one factor that isn't known to be an identity matrix",
                "the exponential of a Kronecker product isn't one; that of a sum of products with "
                "identity matrices is",
            )
        [axis] = axes
        term = scale[..., None, None] * factors[axis].astype(dtype)
        exponents[axis] = exponents[axis] + term if axis in exponents else term
    exponentials = []
    for axis, likes in enumerate(zip(*products, strict=True)):
        if axis in exponents:
            exponential = pt.linalg.expm(with_square_shape(exponents[axis], *likes))
        else:
            exponential = likes[0].astype(dtype)
        exponentials.append(exponential)
    new_out = pt.exp(constant)[..., None, None] * kron(*exponentials)
    return [as_replacement(old_out, new_out)]
