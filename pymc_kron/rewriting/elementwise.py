"""``(A (x) B) * (C (x) D) = (A * C) (x) (B * D)``, and ``f(A (x) B) = f(A) (x) f(B)``."""

from itertools import combinations

from pytensor import tensor as pt
from pytensor.graph.rewriting.unify import OpPattern
from pytensor.scalar.basic import (
    Abs,
    Cast,
    Conj,
    Mul,
    Pow,
    Real,
    Reciprocal,
    Sign,
    Sqr,
    TrueDiv,
)
from pytensor.tensor.basic import get_underlying_scalar_constant_value
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.exceptions import NotScalarConstantError
from pytensor.tensor.math import variadic_mul

from pymc_kron.linalg import kron
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.conforming import SAME_SHAPE, conforming_factors, refuse_overflow
from pymc_kron.structure import Refusal, is_scalar, kron_factors, refuse_dtype

# The functions with f(a b) = f(a) f(b), and the kinds of numbers that this is true for
MULTIPLICATIVE = {
    Sqr: "fciu",
    Pow: "fciu",
    Abs: "fc",
    Reciprocal: "fc",
    Conj: "fc",
    Cast: "fc",
    Sign: "f",
    Real: "f",
}


def _elemwise(*scalar_ops):
    return [OpPattern(Elemwise, scalar_op=OpPattern(scalar_op)) for scalar_op in scalar_ops]


@register_kron(*_elemwise(Mul))
def mul_of_kron(fgraph, node):
    """(A (x) B) * (C (x) D) * X -> ((A * C) (x) (B * D)) * X"""
    [old_out] = node.outputs
    products = {
        i: factors
        for i, factors in enumerate(map(kron_factors, node.inputs))
        if factors is not None
    }
    if len(products) < 2:
        return None
    refuse_dtype(old_out, "fciu")
    for i, factors in products.items():
        refuse_overflow(node.inputs[i], factors, old_out)

    for i, j in combinations(products, 2):
        try:
            pairs = conforming_factors(products[i], products[j], SAME_SHAPE)
        except Refusal as refusal:
            reason = refusal
            continue
        dtype = old_out.type.dtype
        others = [inp for k, inp in enumerate(node.inputs) if k not in (i, j)]
        product = kron(*(a.astype(dtype) * c.astype(dtype) for a, c in pairs))
        return [as_replacement(old_out, variadic_mul(*others, product))]
    raise reason


@register_kron(*_elemwise(TrueDiv))
def div_of_kron(fgraph, node):
    """(A (x) B) / (C (x) D) -> (A / C) (x) (B / D), and c / (A (x) B) -> (c / A) (x) (1 / B)"""
    dividend, K = node.inputs
    [old_out] = node.outputs
    factors, dividend_factors = kron_factors(K), kron_factors(dividend)
    by_scalar = is_scalar(dividend)
    if factors is None or not (by_scalar or dividend_factors):
        return None
    for product in (dividend, K):
        if not (by_scalar and product is dividend):
            refuse_dtype(product, "fc")

    if by_scalar:
        first, *others = (factor.astype(old_out.type.dtype) for factor in factors)
        one = pt.constant(1, dtype=old_out.type.dtype)
        quotients = [dividend / first, *(one / other for other in others)]
    else:
        pairs = conforming_factors(dividend_factors, factors, SAME_SHAPE)
        quotients = [a.astype(old_out.type.dtype) / c for a, c in pairs]
    return [as_replacement(old_out, kron(*quotients))]


@register_kron(*_elemwise(*MULTIPLICATIVE))
def elemwise_of_kron(fgraph, node):
    """f(A (x) B) -> f(A) (x) f(B), for squares, absolute values, ... with f(a b) = f(a) f(b)"""
    K, *exponents = node.inputs
    [old_out] = node.outputs
    factors = kron_factors(K)
    if factors is None:
        return None
    refuse_dtype(K, MULTIPLICATIVE[type(node.op.scalar_op)])
    refuse_overflow(K, factors, old_out)
    if isinstance(node.op.scalar_op, Cast):
        refuse_dtype(old_out, "fc")

    exponents = [_integer_exponent(K, exponent) for exponent in exponents]
    values = [node.op(factor.astype(K.type.dtype), *exponents) for factor in factors]
    return [as_replacement(old_out, kron(*values))]


def _integer_exponent(K, exponent):
    """Return the exponent as a scalar, if the power is a product of powers."""
    try:
        if not all(exponent.type.broadcastable):
            raise NotScalarConstantError
        value = get_underlying_scalar_constant_value(exponent).item()
    except NotScalarConstantError:
        raise Refusal("the exponent isn't a known number", "write the powers of factors") from None
    if isinstance(value, complex) or not float(value).is_integer():
        raise Refusal(f"(a b)^{value} isn't a^{value} b^{value} for two negative numbers")
    if value < 0 and K.type.numpy_dtype.kind in "iu":
        raise Refusal("integers have no negative powers", "cast to floating point numbers")
    return pt.constant(value, dtype=exponent.type.dtype)
