"""Reading a graph: which variable is a Kronecker product, and of which factors.

Everything here only looks; nothing is built except transposes and multiples of factors.
"""

from collections.abc import Sequence

import numpy as np
from pytensor import tensor as pt
from pytensor.assumptions import (
    LOWER_TRIANGULAR,
    ORTHOGONAL,
    POSITIVE_DEFINITE,
    SYMMETRIC,
    UPPER_TRIANGULAR,
    check_assumption,
)
from pytensor.assumptions.specify import SpecifyAssumptions
from pytensor.compile.mode import Mode
from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.traversal import graph_inputs
from pytensor.scalar.basic import Add, Mul, Neg, TrueDiv
from pytensor.tensor.basic import Eye
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import Elemwise
from pytensor.tensor.linalg.inverse import MatrixInverse
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.math import Dot, neg, variadic_mul
from pytensor.tensor.rewriting.linalg.utils import strip_left_expand_dims_and_transpose
from pytensor.tensor.variable import TensorVariable

from pymc_kron.unfolded import without_unfolded

type Matrices = Sequence[TensorVariable]
type Size = int | TensorVariable


class Refusal(Exception):
    """Why a rewrite leaves a Kronecker product as it is.

    Parameters
    ----------
    reason
        The guard that failed, in words: "factor 2 isn't known to be square".
    advice
        What the user can do about it: "give it a static shape".
    """

    def __init__(self, reason: str, advice: str = ""):
        super().__init__(f"{reason}: {advice}" if advice else reason)
        self.reason = reason
        self.advice = advice

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Refusal):
            return NotImplemented
        return (self.reason, self.advice) == (other.reason, other.advice)

    def __hash__(self) -> int:
        return hash((self.reason, self.advice))


def kron_factors(var: TensorVariable) -> tuple[TensorVariable, ...] | None:
    """Return the factors of a (nested, transposed, batched) Kronecker product, or None.

    ``kron(A, kron(B, C).T)`` gives ``(A, B.T, C.T)``: the product is associative, and
    ``(A (x) B).T = A.T (x) B.T``. A scalar multiple, negation or quotient goes to the first
    factor, ``c (A (x) B) = (c A) (x) B``. A factor of a batched product keeps its own batch
    dimensions without the dummy ones on the left, so that a factor that the whole batch
    shares stays a matrix.

    None also for ``kron`` of anything but matrices: with more than two dimensions
    ``pt.linalg.kron`` multiplies the leading ones instead of batching over them.
    """
    core, transposed = strip_transposes(without_assumptions(var))
    core = without_assumptions(core)
    factors = _factors_of_product(core) or _factors_of_multiple(core)
    if factors is None:
        return None
    return tuple(factor.mT if transposed else factor for factor in factors)


def square_kron_factors(
    var: TensorVariable, *, real: bool = False
) -> tuple[TensorVariable, ...] | None:
    """Return the factors as `kron_factors` does, as numbers of its dtype, if they may be square.

    Known shapes decide; where they don't, a product of rectangular factors is singular anyway.

    Raises
    ------
    Refusal
        If a factor is known not to be square or to be empty, if the factors are booleans, which
        have no linear algebra to save, or integers that may overflow, and with `real` if they are
        complex.
    """
    factors = kron_factors(var)
    if factors is None:
        return None
    refuse_dtype(var, "fiu" if real else "fciu")
    refuse_narrow_integers(var)
    for i, factor in enumerate(factors, 1):
        if is_provably_not_square(factor):
            rows, columns = factor.type.shape[-2:]
            raise Refusal(
                f"factor {i} is {rows} x {columns}, not square",
                "write the identity with the factors themselves",
            )
        if is_empty(factor):
            raise Refusal(f"factor {i} is empty", "there is nothing to save")
    return tuple(factor.astype(var.type.dtype) for factor in factors)


def refuse_dtype(var: TensorVariable, kinds: str) -> None:
    """Raise a `Refusal` if the dtype isn't of one of the kinds, as NumPy abbreviates them."""
    if var.type.numpy_dtype.kind not in kinds:
        raise Refusal(
            f"the product is of dtype {var.type.dtype}",
            "cast the factors to floating point numbers",
        )


def is_narrow_integer(var: TensorVariable) -> bool:
    """Whether the entries are integers of less than 64 bits, which a product soon exceeds."""
    return var.type.numpy_dtype.kind in "iu" and var.type.numpy_dtype.itemsize < 8


def refuse_narrow_integers(var: TensorVariable) -> None:
    """Raise a `Refusal` if the entries of a product may be cut off at a width.

    The floating point numbers that are computed from the factors wouldn't be.
    """
    if is_narrow_integer(var):
        raise Refusal(
            f"the product is of dtype {var.type.dtype}, in which it may overflow",
            "cast the factors to floating point numbers",
        )


def is_empty(var: TensorVariable) -> bool:
    """Whether the static shape shows that an array has no entries."""
    return 0 in var.type.shape


def _factors_of_product(var: TensorVariable) -> tuple[TensorVariable, ...] | None:
    match var.owner_op_and_inputs:
        case (KroneckerProduct() as kron, *operands):
            pass
        case (Blockwise(core_op=KroneckerProduct() as kron), *operands):
            pass
        case _:
            return None
    if any(input_type.ndim != 2 for input_type in kron.input_types):
        return None

    factors: list[TensorVariable] = []
    for operand in map(without_unfolded, operands):
        nested = kron_factors(operand)
        if nested is None:
            matrix, transposed = strip_transposes(operand)
            nested = (matrix.mT if transposed else matrix,)
        factors.extend(nested)
    return tuple(factors)


def _factors_of_multiple(var: TensorVariable) -> tuple[TensorVariable, ...] | None:
    if var.type.numpy_dtype.kind in "bu":
        # There is no negative factor
        return None
    match var.owner_op_and_inputs:
        case (Elemwise(scalar_op=Neg()), product):
            multiple = neg
        case (Elemwise(scalar_op=TrueDiv()), product, scalar) if is_scalar(scalar):

            def multiple(factor: TensorVariable) -> TensorVariable:
                return factor / scalar

        case (Elemwise(scalar_op=Mul()), *inputs):
            products = [inp for inp in inputs if not is_scalar(inp)]
            scalars = [inp for inp in inputs if is_scalar(inp)]
            if len(products) != 1:
                return None
            [product] = products

            def multiple(factor: TensorVariable) -> TensorVariable:
                return variadic_mul(*scalars, factor)

        case _:
            return None
    factors = kron_factors(product)
    if factors is None or (is_narrow_integer(product) and product.type.dtype != var.type.dtype):
        return None
    first, *others = factors
    # A factor may be of less precision, or have no negative numbers
    return multiple(first.astype(var.type.dtype)), *others


def is_scalar(var: TensorVariable, core_ndim: int = 2) -> bool:
    """Whether a variable broadcasts one value over the last axes, as many as a matrix has."""
    return all(var.type.broadcastable[-core_ndim:])


def split_scalars(var: TensorVariable, core_ndim: int = 2) -> tuple[TensorVariable, Matrices]:
    """Split ``c X`` into ``X`` and the scalars, one for each matrix or vector of a batch.

    Parameters
    ----------
    var
        The multiple.
    core_ndim
        The number of axes along which the scalars have one entry.
    """
    scales: list[TensorVariable] = []
    while var.type.numpy_dtype.kind not in "bu":
        match var.owner_op_and_inputs:
            case (Elemwise(scalar_op=Neg()), inner):
                scales.append(pt.constant(-1, dtype=var.type.dtype))
            case (Elemwise(scalar_op=Add()), inner, other) if inner is other:
                # The gradient of w * w
                scales.append(pt.constant(2, dtype=var.type.dtype))
            case (Elemwise(scalar_op=TrueDiv()), inner, divisor) if is_scalar(divisor, core_ndim):
                scales.append(reciprocal(divisor, var))
            case (Elemwise(scalar_op=Mul()), *inputs):
                others = [inp for inp in inputs if not is_scalar(inp, core_ndim)]
                if len(others) != 1:
                    return var, scales
                [inner] = others
                scales.extend(inp for inp in inputs if is_scalar(inp, core_ndim))
            case _:
                return var, scales
        var = inner
    return var, scales


def reciprocal(divisor: TensorVariable, quotient: TensorVariable) -> TensorVariable:
    """Return one divided by a divisor, in the precision of the quotient.

    The reciprocal of a small integer, as an operation of its own, is of single precision.
    """
    return pt.constant(1, dtype=quotient.type.dtype) / divisor


def strip_transposes(var: TensorVariable) -> tuple[TensorVariable, bool]:
    """Peel matrix transposes and dummy leading dimensions off, and say if one is left over."""
    transposed = False
    while True:
        core, peeled_transpose = strip_left_expand_dims_and_transpose(var)
        if core is var:
            return core, transposed
        var, transposed = core, transposed != peeled_transpose


def eye_sizes(var: TensorVariable) -> tuple[Variable, Variable] | None:
    """Return the numbers of rows and columns of a matrix that ``pt.eye`` made, or None."""
    match var.owner_op_and_inputs:
        case (Eye() | Blockwise(core_op=Eye()), rows, columns, Constant(data=0)):
            return rows, columns
    return None


def is_identity(var: TensorVariable) -> bool:
    """Whether a matrix is known to be an identity matrix, by how it is made or as a constant."""
    core, _ = strip_transposes(without_assumptions(var))
    sizes = eye_sizes(core)
    if sizes is not None:
        rows, columns = map(without_unfolded, sizes)
        return rows is columns or (
            isinstance(rows, Constant) and isinstance(columns, Constant) and rows.equals(columns)
        )
    return isinstance(core, Constant) and core.type.ndim == 2 and _is_identity_array(core.data)


def _is_identity_array(array: np.ndarray) -> bool:
    rows, columns = array.shape
    return rows == columns and np.array_equal(array, np.eye(rows))


def row_sizes(factors: Matrices) -> tuple[Size, ...]:
    """Return the number of rows of each factor, as an int where it is known."""
    return tuple(_size(factor, -2) for factor in factors)


def column_sizes(factors: Matrices) -> tuple[Size, ...]:
    """Return the number of columns of each factor, as an int where it is known."""
    return tuple(_size(factor, -1) for factor in factors)


def _size(factor: TensorVariable, axis: int) -> Size:
    known = factor.type.shape[axis]
    return factor.shape[axis] if known is None else known


def is_provably_not_square(factor: TensorVariable) -> bool:
    """Whether the static shape of a factor shows that it isn't square."""
    rows, columns = factor.type.shape[-2:]
    return rows is not None and columns is not None and rows != columns


def with_square_shape(matrix: TensorVariable, *likes: TensorVariable) -> TensorVariable:
    """Show the size of a square matrix that its own type shows, or that of one of the same size.

    PyTensor infers that an axis is of size one where the type doesn't show it, and may take it
    for one that isn't broadcast.
    """
    known = {size for known in (matrix, *likes) for size in known.type.shape[-2:]} - {None}
    if len(known) != 1 or None not in matrix.type.shape[-2:]:
        return matrix
    [size] = known
    return pt.specify_shape(matrix, (*matrix.type.shape[:-2], size, size))


def is_positive_definite(fgraph: FunctionGraph, factor: TensorVariable) -> bool:
    """Whether PyTensor's assumptions prove the factor symmetric positive definite."""
    return check_assumption(fgraph, factor, POSITIVE_DEFINITE)


def is_symmetric(fgraph: FunctionGraph, factor: TensorVariable) -> bool:
    """Whether PyTensor's assumptions prove the factor symmetric."""
    return check_assumption(fgraph, factor, SYMMETRIC)


def is_triangular(fgraph: FunctionGraph, factor: TensorVariable) -> bool:
    """Whether PyTensor's assumptions prove the factor lower or upper triangular."""
    return check_assumption(fgraph, factor, LOWER_TRIANGULAR) or check_assumption(
        fgraph, factor, UPPER_TRIANGULAR
    )


def without_assumptions(var: TensorVariable) -> TensorVariable:
    """Return the variable that ``assume`` was called on."""
    while isinstance(var.owner_op, SpecifyAssumptions):
        [var] = var.owner.inputs
    return var


def inverted_matrix(var: TensorVariable) -> TensorVariable | None:
    """Return ``Q`` if ``var`` is ``inv(Q)``."""
    match without_assumptions(var).owner_op_and_inputs:
        case (Blockwise(core_op=MatrixInverse()), Q):
            return Q
    return None


def gram_root(var: TensorVariable) -> TensorVariable | None:
    """Return ``M`` if ``var`` is ``M @ M.mT``."""
    match without_assumptions(var).owner_op_and_inputs:
        case (Dot() | Blockwise(core_op=Dot()), left, right):
            left_core, left_transposed = strip_transposes(left)
            right_core, right_transposed = strip_transposes(right)
            if left_core is right_core and left_transposed != right_transposed:
                return left
    return None


def eigendecomposition(
    fgraph: FunctionGraph, var: TensorVariable
) -> tuple[TensorVariable, TensorVariable] | None:
    """Return ``w`` and ``Q`` if ``var`` is ``(Q * w) @ Q.mT`` and Q is known to be orthogonal."""
    match without_assumptions(var).owner_op_and_inputs:
        case (Dot() | Blockwise(core_op=Dot()), scaled, right):
            vectors, transposed = strip_transposes(right)
        case _:
            return None
    match scaled.owner_op_and_inputs:
        case (Elemwise(scalar_op=Mul()), *inputs) if transposed and len(inputs) == 2:
            others = [inp for inp in inputs if strip_transposes(inp) != (vectors, False)]
        case _:
            return None
    if len(others) != 1 or not check_assumption(fgraph, vectors, ORTHOGONAL):
        return None
    [values] = others
    return (values.squeeze(-2), vectors) if values.type.broadcastable[-2] else None


def is_lower_triangular(fgraph: FunctionGraph, var: TensorVariable) -> bool:
    """Whether a matrix is known to be lower triangular, by PyTensor or by PyMC's tag."""
    if getattr(var.tag, "lower_triangular", False):
        return True
    return check_assumption(fgraph, var, LOWER_TRIANGULAR)


def current_length(length: int | np.integer | Variable) -> int | None:
    """Return a length that is known or that data and coords have now."""
    if not isinstance(length, Variable):
        return int(length)
    value = None if length.type.ndim else evaluated(length, Constant, SharedVariable)
    return None if value is None else int(value)


def evaluated(var: TensorVariable, *kinds: type[Variable]) -> np.ndarray | None:
    """Return the value of what is computed from inputs of these kinds alone."""
    if not all(isinstance(inp, kinds) for inp in graph_inputs([var])):
        return None
    return var.eval(mode=Mode(linker="py", optimizer=None))
