"""``log|det(A (x) B)| = n_B log|det A| + n_A log|det B|``: never the product itself."""

from math import prod

from pytensor import tensor as pt
from pytensor.scalar.basic import Abs, Log, Sign
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.linalg.summary import Det
from pytensor.tensor.rewriting.blockwise import blockwise_of
from pytensor.tensor.rewriting.linalg.utils import clients_through_expand_dims

from pymc_kron.linalg import factor_slogdet, kron_slogdet, triangular_slogdet
from pymc_kron.rewriting.bundle import as_replacement, register_kron
from pymc_kron.rewriting.facts import root_of
from pymc_kron.structure import (
    column_sizes,
    is_empty,
    is_positive_definite,
    is_provably_not_square,
    is_triangular,
    kron_factors,
    refuse_narrow_integers,
)


@register_kron(blockwise_of(Det))
def det_of_kron(fgraph, node):
    """sign, log|.| and log of det(A (x) B), and det(A (x) B) itself -> from factor slogdets

    PyTensor writes ``slogdet`` as ``sign(det)`` and ``log(abs(det))``; each of these clients
    gets its own replacement, so that no determinant is formed unless it is asked for.
    """
    [K] = node.inputs
    [det] = node.outputs
    factors = kron_factors(K)
    if factors is None or any(map(is_empty, factors)) or K.type.numpy_dtype.kind == "b":
        return None
    refuse_narrow_integers(K)
    if any(map(is_provably_not_square, factors)):
        # A square product of rectangular factors has not the full rank, unless it is empty
        is_one = pt.eq(prod(column_sizes(factors)), 0)
        return [as_replacement(det, pt.full(tuple(K.shape)[:-2], is_one))]

    slogdets = [_slogdet(fgraph, factor.astype(det.type.dtype)) for factor in factors]
    sign, logabsdet = kron_slogdet(factors, slogdets)
    return replacements_of_det(fgraph, det, sign, logabsdet)


def replacements_of_det(fgraph, det, sign, logabsdet):
    """Return what a determinant, its sign, its absolute value and logarithm are replaced with.

    The gradient of ``log(abs(det))`` holds ``det * sign(det) / abs(det)``. With the exponential
    of one and the same logarithm above and below the line, PyTensor cancels it.
    """
    magnitude = pt.exp(logabsdet)
    values = {det: sign * magnitude}
    is_complex = det.type.numpy_dtype.kind == "c"
    for client, _ in clients_through_expand_dims(fgraph, det):
        match (client.op, *client.outputs):
            case (Elemwise(scalar_op=Sign()), sign_of_det):
                values[sign_of_det] = sign
            # The logarithm of a complex determinant is a principal value, the sum isn't
            case (Elemwise(scalar_op=Log()), log_of_det) if not is_complex:
                values[log_of_det] = pt.where(pt.lt(sign, 0), pt.nan, logabsdet)
            case (Elemwise(scalar_op=Abs()), abs_of_det):
                values[abs_of_det] = magnitude
                for abs_client, _ in clients_through_expand_dims(fgraph, abs_of_det):
                    match (abs_client.op, *abs_client.outputs):
                        case (Elemwise(scalar_op=Log()), log_abs_of_det):
                            values[log_abs_of_det] = logabsdet

    return {old_out: as_replacement(old_out, value) for old_out, value in values.items()}


def _slogdet(fgraph, factor):
    if is_positive_definite(fgraph, factor):
        logdet = root_of(fgraph, factor).logdet
        return pt.ones_like(logdet), logdet
    if is_triangular(fgraph, factor):
        return triangular_slogdet(factor)
    return factor_slogdet(factor)
