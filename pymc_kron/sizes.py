"""Proving that two axes have the same size, also where no static shape says so.

`axis_size` follows an axis back through the operations that keep it, to numbers and to axes of
variables that it knows nothing about. Two axes whose sizes come out equal have the same size; of
two that don't, nothing is known.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from pytensor.assumptions.specify import SpecifyAssumptions
from pytensor.graph.basic import Constant, Variable
from pytensor.scalar.basic import Cast, Mul
from pytensor.tensor.basic import (
    Alloc,
    AllocDiag,
    Eye,
    MakeVector,
    ScalarFromTensor,
    TensorFromScalar,
)
from pytensor.tensor.blockwise import Blockwise
from pytensor.tensor.elemwise import DimShuffle, Elemwise
from pytensor.tensor.linalg.products import KroneckerProduct
from pytensor.tensor.math import Dot
from pytensor.tensor.shape import Shape, Shape_i, SpecifyShape
from pytensor.tensor.subtensor import Subtensor
from pytensor.tensor.utils import _parse_gufunc_signature
from pytensor.tensor.variable import TensorVariable


@dataclass(frozen=True)
class SizeProduct:
    """A size, as a number times sizes that are only known by where they come from.

    Attributes
    ----------
    number
        The known part.
    unknowns
        The unknown parts, each with its exponent: an axis of a variable, or a scalar.
    """

    number: int
    unknowns: frozenset[tuple[tuple[Variable, int | None], int]] = frozenset()

    def __mul__(self, other: "SizeProduct") -> "SizeProduct":
        unknowns = Counter(dict(self.unknowns)) + Counter(dict(other.unknowns))
        return SizeProduct(self.number * other.number, frozenset(unknowns.items()))

    @property
    def is_known(self) -> bool:
        """Whether the size is a number."""
        return not self.unknowns


def axis_size(var: TensorVariable, axis: int) -> SizeProduct:
    """Return what is known about the size of an axis.

    Examples
    --------
    >>> import pytensor.tensor as pt
    >>> from pymc_kron.sizes import axis_size
    >>> A = pt.matrix("A")
    >>> axis_size(pt.linalg.inv(A), 0) == axis_size(pt.exp(-A), 0)
    True
    """
    axis %= var.type.ndim
    known = var.type.shape[axis]
    if known is not None:
        return SizeProduct(int(known))

    from_end = axis - var.type.ndim
    match var.owner_op_and_inputs:
        case (DimShuffle(new_order=new_order), inp):
            return axis_size(inp, new_order[axis])
        case (Elemwise(), *inputs):
            # All inputs that aren't broadcast along the axis agree
            return axis_size(next(inp for inp in inputs if inp.type.shape[axis] != 1), axis)
        case (SpecifyAssumptions() | SpecifyShape(), inp, *_):
            return axis_size(inp, axis)
        case (Alloc(), _, *shape):
            return _scalar_size(shape[axis])
        case (Eye(), rows, columns, _):
            return _scalar_size((rows, columns)[axis])
        case (AllocDiag(offset=0), diagonal) if from_end >= -2:
            return axis_size(diagonal, -1)
        case (KroneckerProduct() | Blockwise(core_op=KroneckerProduct()), left, right):
            if left.type.ndim == right.type.ndim and from_end >= -2:
                return axis_size(left, from_end) * axis_size(right, from_end)
        case (Dot(), left, right):
            return axis_size((left, right)[axis], axis)
        case (op, *inputs):
            return _core_axis_size(op, inputs, var, from_end)
    return _unknown(var, axis)


def _core_axis_size(op, inputs, var: TensorVariable, from_end: int) -> SizeProduct:
    """Return the size of a core dimension, which the signature of an operation names."""
    signature = getattr(op, "signature", None) or getattr(op, "gufunc_signature", None)
    if signature is not None:
        input_cores, output_cores = _parse_gufunc_signature(signature)
        core = output_cores[var.owner.outputs.index(var)]
        if -from_end <= len(core):
            for inp, input_core in zip(inputs, input_cores, strict=False):
                if core[from_end] in input_core:
                    return axis_size(inp, input_core.index(core[from_end]) - len(input_core))
    return _unknown(var, from_end + var.type.ndim)


def _scalar_size(size: Variable) -> SizeProduct:
    """Return what is known about a size that the graph computes."""
    match size:
        case Constant(data=data):
            return SizeProduct(int(data))
    match size.owner_op_and_inputs:
        case (TensorFromScalar() | ScalarFromTensor(), inp):
            return _scalar_size(inp)
        case (Elemwise(scalar_op=Cast()), inp):
            return _scalar_size(inp)
        case (Elemwise(scalar_op=Mul()), *inputs):
            return prod(map(_scalar_size, inputs), start=SizeProduct(1))
        case (Shape_i(i=axis), inp):
            return axis_size(inp, axis)
        case (Subtensor(idx_list=(int(),)), shape, Constant(data=axis)):
            match shape.owner_op_and_inputs:
                case (Shape(), inp):
                    return axis_size(inp, int(axis))
                case (MakeVector(), *sizes):
                    return _scalar_size(sizes[int(axis)])
    return _unknown(size, None)


def _unknown(var: Variable, axis: int | None) -> SizeProduct:
    return SizeProduct(1, frozenset({((var, axis), 1)}))


def is_provably_square(var: TensorVariable) -> bool:
    """Whether the last two axes of an array are known to have the same size."""
    return axis_size(var, -2) == axis_size(var, -1)


def sizes_agree(pairs: Iterable[tuple[TensorVariable, int, TensorVariable, int]]) -> bool:
    """Whether each pair of axes, as ``(left, axis, right, axis)``, has the same size."""
    return all(axis_size(a, i) == axis_size(b, j) for a, i, b, j in pairs)
